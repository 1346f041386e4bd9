"""Tables of what suites would train, and how long that may take; nothing is started."""

import collections
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from experiments import results as results_lib
from experiments import results_page, scheduler
from experiments.scheduler import Job, Shard
from moejax.train import metrics
from moejax.train.workdir import Workdir

HEADER = ('', 'jobs', 'finished', 'steps', 'FLOPs', 'FLOPs left', 'core-hours left')


def table(suites: Mapping[str, Sequence[Job]], folder: pathlib.Path, max_workers: int,
          shard: Shard | None = None) -> str:
  """Returns a table: each suite, all suites (shared jobs counted once), this shard's own jobs.

  Core-hours count train steps without compilation and evaluation, as if a worker kept its share of
  the cores busy. They are known for a config file if `folder` has a finished run of it, or if the
  committed results do, which were measured on another machine.

  Args:
    suites: {suite: its jobs}.
    folder: of the jobs' folders.
    max_workers: workers at a time.
    shard: this machine's.
  """
  jobs, keys = scheduler.merge(suites)
  finished = {key: job.finished(folder) for key, job in jobs.items()}
  worker_cores = len(scheduler.share_of_cores(scheduler.cores(), max_workers, 0))
  measured, committed = measured_seconds(folder), committed_seconds(results_page.FOLDER)
  core_seconds = committed | {name: value * worker_cores for name, value in measured.items()}

  def row(name: str, chosen: Iterable[str]) -> list[str]:
    chosen = [jobs[key] for key in jobs if key in set(chosen)]
    ahead = [job for job in chosen if not finished[job.key]]
    left = {job.key: job.cost * (1 - job.done(folder) / job.work) for job in ahead}
    known = [job for job in ahead if family(job.name) in core_seconds]
    hours = sum(left[job.key] * core_seconds[family(job.name)] for job in known) / 3600
    return [name, f'{len(chosen)}', f'{len(chosen) - len(ahead)}',
            f'{sum(job.work for job in chosen):,}', f'{sum(job.cost for job in chosen):.2e}',
            f'{sum(left.values()):.2e}', _hours(hours, len(known), len(ahead))]

  rows = [list(HEADER), *(row(name, keys[name]) for name in suites)]
  if len(suites) > 1:
    rows.append(row('all, shared jobs once', jobs))
  if shard:
    rows.append(row(f'shard {shard}', shard.own(jobs.values())))
  widths = [max(map(len, column)) for column in zip(*rows)]
  out = ['  '.join([row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows]
  ahead = {family(job.name) for key, job in jobs.items() if not finished[key]}
  if names := sorted((ahead & set(committed)) - set(measured)):
    out.append(f'Times of {", ".join(names)}: of the committed results, on another machine.')
  return '\n'.join(out)


def _hours(hours: float, known: int, ahead: int) -> str:
  if known == ahead:
    return f'{hours:.2f}'
  return f'{hours:.2f} + {ahead - known} jobs unknown' if known else 'unknown'


def family(name: str) -> str:
  """The config file in a workdir's name: jobs of one file take about equal time per FLOP."""
  return name.rsplit('-', 2)[0]


def _per_flop(measured: Iterable[tuple[str, float, float]]) -> dict[str, float]:
  """{family: seconds per FLOP} of (family, seconds, FLOPs)."""
  seconds, flops = collections.Counter(), collections.Counter()
  for name, took, spent in measured:
    seconds[name] += took
    flops[name] += spent
  return {name: seconds[name] / flops[name] for name in seconds if flops[name]}


def committed_seconds(folder: pathlib.Path) -> dict[str, float]:
  """{family: seconds of one core per FLOP}, over all arms in a folder of suites' results."""
  def measured():
    for file in sorted(folder.glob(f'*/{results_lib.FILE}')):
      for record in results_lib.read(file.parent).records:
        config = re.search(r'--config=configs/(?:\w+/)?(\w+)\.py', record['command'])
        if config and record['devices'] == '1 x cpu':
          flops = results_lib.extra_steps(record) * record['flops_per_step']
          yield config[1], record['seconds'], flops
  return _per_flop(measured())


def measured_seconds(folder: pathlib.Path) -> dict[str, float]:
  """{family: seconds of train steps per FLOP}, over all finished runs in a folder."""
  def measured():
    for file in sorted(folder.glob('*/run.json')):
      workdir = Workdir(file.parent)
      status = workdir.path / 'status.json'
      if status.exists() and workdir.read(status.name)['phase'] == 'finished':
        per_step = workdir.read('run.json')['train_flops_per_step']
        for line in metrics.read_lines(workdir.path / 'timing.jsonl'):
          yield family(workdir.path.name), line['seconds'], line['steps'] * per_step
  return _per_flop(measured())
