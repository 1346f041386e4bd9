"""What suites would train, and how long that may take, before anything is started."""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from experiments import jobs as jobs_lib
from experiments import results, results_page, scheduler
from experiments.jobs import Job
from experiments.shards import Shard
from moejax.train import metrics
from moejax.train.workdir import Workdir

HEADER = ('', 'jobs', 'finished', 'steps', 'FLOPs', 'FLOPs left', 'core-hours left')


def table(groups: Mapping[str, Sequence[Job]], folder: pathlib.Path, slots: int,
          shard: Shard | None = None) -> str:
  """A line per suite; of all together, shared jobs once; and of this shard's own.

  Core-hours are those of train steps, without compilation and evaluation: a worker keeps its share
  of the cores busy. They are known for jobs of config files of which `folder` has a finished run,
  or else the committed results have one, on another machine.

  Args:
    groups: {suite: its jobs}.
    folder: of the jobs' folders.
    slots: workers at a time.
    shard: this machine's.
  """
  jobs, keys = jobs_lib.merge(groups)
  measured, elsewhere = seconds_per_flop(folder), committed(results_page.FOLDER)
  finished = {key: job.finished(folder) for key, job in jobs.items()}
  share = len(scheduler.share(scheduler.cores(), slots, 0))
  seconds = {name: value / share for name, value in elsewhere.items()} | measured

  def line(name: str, chosen: Iterable[str]) -> list[str]:
    chosen = [jobs[key] for key in jobs if key in set(chosen)]
    ahead = [job for job in chosen if not finished[job.key]]
    left = {job.key: job.cost * (1 - job.done(folder) / job.work) for job in ahead}
    known = [job for job in ahead if family(job.name) in seconds]
    hours = sum(left[job.key] * seconds[family(job.name)] for job in known) * share / 3600
    return [name, f'{len(chosen)}', f'{len(chosen) - len(ahead)}',
            f'{sum(job.work for job in chosen):,}', f'{sum(job.cost for job in chosen):.2e}',
            f'{sum(left.values()):.2e}', _hours(hours, len(known), len(ahead))]

  lines = [list(HEADER), *(line(name, keys[name]) for name in groups)]
  if len(groups) > 1:
    lines.append(line('all, shared jobs once', jobs))
  if shard:
    lines.append(line(f'shard {shard}', shard.own(list(jobs.values()))))
  widths = [max(map(len, column)) for column in zip(*lines)]
  out = ['  '.join([row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in lines]
  ahead = {family(job.name) for key, job in jobs.items() if not finished[key]}
  if names := sorted((ahead & set(elsewhere)) - set(measured)):
    out.append(f'Times of {", ".join(names)}: of the committed results, on another machine.')
  return '\n'.join(out)


def _hours(hours: float, known: int, ahead: int) -> str:
  if known == ahead:
    return f'{hours:.2f}'
  return f'{hours:.2f} + {ahead - known} jobs unknown' if known else 'unknown'


def family(name: str) -> str:
  """What jobs that take about the same time per FLOP have in common: the config file."""
  return name.rsplit('-', 2)[0]


def committed(folder: pathlib.Path) -> dict[str, float]:
  """{family: seconds of one core per FLOP}, over all arms in a folder of suites' results."""
  seconds: dict[str, float] = {}
  spent: dict[str, float] = {}
  for file in sorted(folder.glob(f'*/{results.FILE}')):
    for row in results.read(file.parent).rows:
      config = re.search(r'--config=configs/(?:\w+/)?(\w+)\.py', row['command'])
      if config and row['devices'] == '1 x cpu':
        steps = row['end_step'] - row['start_step']
        seconds[config[1]] = seconds.get(config[1], 0) + row['seconds']
        spent[config[1]] = spent.get(config[1], 0) + steps * row['flops_per_step']
  return {name: seconds[name] / spent[name] for name in seconds if spent[name]}


def seconds_per_flop(folder: pathlib.Path) -> dict[str, float]:
  """{family: seconds of train steps per FLOP}, over all finished runs in a folder."""
  seconds: dict[str, float] = {}
  spent: dict[str, float] = {}
  for file in sorted(folder.glob('*/run.json')):
    workdir = Workdir(file.parent)
    status = workdir.path / 'status.json'
    if not status.exists() or workdir.read(status.name)['phase'] != 'finished':
      continue
    per_step = workdir.read('run.json')['train_flops_per_step']
    for line in metrics.read_lines(workdir.path / 'timing.jsonl'):
      name = family(workdir.path.name)
      seconds[name] = seconds.get(name, 0) + line['seconds']
      spent[name] = spent.get(name, 0) + line['steps'] * per_step
  return {name: seconds[name] / spent[name] for name in seconds}
