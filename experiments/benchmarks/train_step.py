"""What does a train step cost in time? Ratios to the dense base's, measured side by side.

  python -m experiments.benchmarks.train_step --suite=NAME[,NAME] [--scale=mini]
  python -m experiments.benchmarks.train_step --show

Each distinct step of the suites' arms is timed in one process with that of the dense base it
extends: rounds of a few steps of each in turn, in an order that rotates; a ratio is a step's time
over the base's in the same round, so that what slows the machine down slows both. Steps are timed
on as many cores as a run has in training (--cores), from fresh weights: a step's time does not
depend on them, but for the grouped dispatch, which takes a little less the more even the loads are.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from experiments import cli, results
from experiments import suite as suite_lib
from experiments.lines import Row
from experiments.results import Results
from experiments.step0 import Surgery, use_compilation_cache
from experiments.suite import KEY_LENGTH, Arm, Run, Suite
from moejax.config import check
from moejax.data import DataConfig
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import loop, malloc, metrics, workdir
from moejax.train.plan import Plan
from moejax.train.validate import validate

RESULTS = pathlib.Path(__file__).parent.parent / 'results/step_times.jsonl'
ROUNDS = 15
SECONDS = 0.25    # a round of one step, roughly
MOST = 50         # steps in a round
TOGETHER = 6      # steps timed against a base at once, for the sake of memory and caches
BATCHES = 8       # different ones a step is fed in turn
DEFAULTS = DataConfig()

Table = Mapping[tuple[str, str, str], float]   # (devices, base's step, step) -> ratio
Advance = Callable[[int], int]                 # takes at least so many steps, waits; how many


def timed(run: Run) -> run_config.RunConfig:
  """The config with everything at its default that does not move a step's time."""
  config = run.settings
  moes = {field.name: _timed_moe(getattr(config.model, field.name))
          for field in dataclasses.fields(config.model) if field.type in ('MoEConfig', MoEConfig)}
  unread = {name: getattr(DEFAULTS, name) for name in ('eval_examples', 'eval_repeats', 'threads')}
  return run_config.RunConfig(
      model=dataclasses.replace(config.model, **moes),
      data=dataclasses.replace(config.data, eval_batch_size=config.data.batch_size, **unread),
      optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-3),
      task=config.task, mesh=config.mesh, parallel=config.parallel,
      microbatches=config.microbatches)


def _timed_moe(moe: MoEConfig) -> MoEConfig:
  if moe.layers == 'none':
    return MoEConfig()
  return dataclasses.replace(moe, eval_capacity_factor=moe.capacity_factor,
                             router_init_std=MoEConfig.router_init_std)


def key(run: Run) -> str:
  """Runs whose steps take the same time on the same devices share it."""
  changed = json.dumps(run_config.changes(timed(run)), sort_keys=True)
  return hashlib.sha256(changed.encode()).hexdigest()[:KEY_LENGTH]


def ratios(path: pathlib.Path = RESULTS) -> Table:
  """What is measured."""
  return {_identity(line): line['ratio'] for line in metrics.read_lines(path)}


def ratio_of(arm: Arm, devices: str, table: Table) -> float | None:
  """An arm's step time over its base's on such devices; None if it was not measured."""
  steps = key(arm.base), key(arm.run)
  return 1.0 if steps[0] == steps[1] else table.get((devices, *steps))


def fill(found: Results, suite: Suite, path: pathlib.Path = RESULTS) -> Results:
  """Results with the time ratio of every arm of the suite that was measured on its devices."""
  table = ratios(path)
  arms = {(arm.domain, arm.name, arm.pair): arm for arm in filter(_has_steps, suite.arms)}

  def filled(row: Row) -> Row:
    arm = arms.get((row['domain'], row['arm'], row['pair']))
    if arm is None or arm.run.key != row['key']:
      return row
    ratio = ratio_of(arm, row['devices'], table)
    return row if ratio is None else {**row, 'time_ratio': ratio}

  return dataclasses.replace(found, rows=[filled(row) for row in found.rows])


def _has_steps(arm: Arm) -> bool:
  """Whether there is a step of its own to time: not with a teacher, who may not be trained yet."""
  return not isinstance(arm.run, Surgery) and not arm.run.settings.task.teacher


def measure(suites: Iterable[Suite], rounds: int, path: pathlib.Path = RESULTS) -> None:
  """Times the steps that are not in `path` yet, under a progress bar; a few lines at a time."""
  devices = workdir.provenance()['devices']
  groups = list(_groups(suites, devices, ratios(path)))
  total = (rounds + 2) * sum(1 + len(arms) for arms in groups)
  with tqdm(total=total, unit='round', dynamic_ncols=True,
            disable=not sys.stderr.isatty()) as bar:
    for arms in groups:
      runs = [arms[0][1].base, *(arm.run for _, arm in arms)]
      advances = [prepare(timed(run), bar.update) for run in runs]
      found = interleaved(advances, rounds, bar.update)
      lines = [_line(label, arm, devices, per_round)
               for (label, arm), per_round in zip(arms, found)]
      results.write_text(path, ''.join(
          json.dumps(line) + '\n' for line in [*metrics.read_lines(path), *lines]))


def _groups(suites: Iterable[Suite], devices: str, known: Table
            ) -> Iterable[list[tuple[str, Arm]]]:
  """(label, arm) of distinct steps that are not known, at most TOGETHER of one base.

  A step that several arms share goes by the first.
  """
  by_base: dict[str, dict[str, tuple[str, Arm]]] = {}
  for suite in suites:
    for arm in filter(_has_steps, suite.arms):
      if ratio_of(arm, devices, known) is None:
        label = f'{arm.domain}, {suite.name}: {arm.name}'
        by_base.setdefault(key(arm.base), {}).setdefault(key(arm.run), (label, arm))
  for found in by_base.values():
    arms = list(found.values())
    yield from (arms[start:start + TOGETHER] for start in range(0, len(arms), TOGETHER))


def prepare(config: run_config.RunConfig, tick: Callable[[], Any] = lambda: None) -> Advance:
  """Compiles a run's train step and takes the first."""
  trainer = loop.Trainer(validate(config, Plan.make(config, 0)))
  trainer.compile()
  state, _ = trainer.programs.first_state()
  batches = [trainer.put(batch) for batch in itertools.islice(trainer.train_batches(0), BATCHES)]
  done = 0

  def advance(steps: int) -> int:
    nonlocal state, done
    dispatches = -(-steps // trainer.programs.steps)
    for _ in range(dispatches):
      state, marker = trainer.train_step(state, batches[done % len(batches)])
      done += 1
    jax.block_until_ready(marker)
    return dispatches * trainer.programs.steps

  advance(1)
  tick()
  return advance


def interleaved(advances: Sequence[Advance], rounds: int, tick: Callable[[], Any] = lambda: None
                ) -> list[list[float]]:
  """Rounds of a few steps of each, the order rotating, after one round to warm up.

  Returns:
    For all but the first of `advances` its time per step over the first's, a number per round.
  """
  counts = [max(1, min(MOST, round(SECONDS / _seconds(advance, 2)))) for advance in advances]
  took = []
  for i in range(rounds + 1):
    start = i % len(advances)
    order = [*range(start, len(advances)), *range(start)]
    per_step = {}
    for which in order:
      per_step[which] = _seconds(advances[which], counts[which])
      tick()
    took.append(per_step)
  return [[one[which] / one[0] for one in took[1:]] for which in range(1, len(advances))]


def _seconds(advance: Advance, steps: int) -> float:
  """Seconds per step, of at least so many."""
  started = time.perf_counter()
  taken = advance(steps)
  return (time.perf_counter() - started) / taken


def _line(label: str, arm: Arm, devices: str, per_round: list[float]) -> dict[str, Any]:
  """One of the file: `low` and `high` are quartiles."""
  low, median, high = statistics.quantiles(per_round, n=4, method='inclusive')
  return {'devices': devices, 'base': key(arm.base), 'key': key(arm.run),
          'label': label, 'config': arm.run.config,
          'ratio': round(median, 4), 'low': round(low, 4), 'high': round(high, 4),
          'flops_ratio': round(arm.run.step_flops / arm.base.step_flops, 4),
          'rounds': len(per_round), 'settings': run_config.changes(timed(arm.run)),
          'versions': workdir.versions()}


def _identity(line: dict[str, Any]) -> tuple[str, str, str]:
  return line['devices'], line['base'], line['key']


def table(lines: list[dict[str, Any]]) -> str:
  """Markdown of measured lines, sorted by label."""
  rows = ['| step | time / base | quartiles | FLOPs / base | time / FLOPs | rounds | devices |',
          '|---|---:|---:|---:|---:|---:|---|']
  for line in sorted(lines, key=lambda line: (line['label'], _identity(line))):
    rows.append(f'| {line["label"]} | {line["ratio"]:.2f} | {line["low"]:.2f} to {line["high"]:.2f}'
                f' | {line["flops_ratio"]:.2f} | {line["ratio"] / line["flops_ratio"]:.2f} '
                f'| {line["rounds"]} | {line["devices"]} |')
  return '\n'.join(rows) + '\n'


def use_cores(number: int) -> None:
  """Makes this process what a worker is, on `number` cores; 0: on all. Before JAX is used."""
  malloc.keep_freed()
  if number and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def main(argv: list[str] | None = None) -> int:
  """Times, or shows; returns the exit code. Raises ConfigError on what cannot work."""
  parser = cli.Parser('python -m experiments.benchmarks.train_step', __doc__)
  parser.add_argument('--suite', metavar='NAME[,NAME]',
                      help='whose steps: all, or some of ' + ', '.join(suite_lib.names()))
  parser.add_argument('--scale', metavar='SCALE', default='mini',
                      help='how large (default: %(default)s)')
  parser.add_argument('--rounds', type=int, default=ROUNDS,
                      help='rounds of each step (default: %(default)s)')
  parser.add_argument('--cores', type=int, default=1,
                      help='cores to time on, those of one run in training; 0: all (default: '
                           '%(default)s)')
  parser.add_argument('--results', metavar='FILE', type=pathlib.Path, default=RESULTS,
                      help='file of the measurements, to be added to (default: %(default)s)')
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  args = parser.parse(argv, suite_required=False)
  if not args.show:
    check(args.suite is not None, '--suite', args.suite, 'names of suites, or all',
          'Or print what is measured with --show.')
    check(args.rounds >= 2, '--rounds', args.rounds, '2 or more', 'Quartiles need a few.')
    check(args.cores >= 0, '--cores', args.cores, '0 or more', 'Leave it out for one core.')
    use_cores(args.cores)
    use_compilation_cache()
    names = suite_lib.names() if args.suite == 'all' else args.suite.split(',')
    measure([suite_lib.load(name, args.scale) for name in names], args.rounds, args.results)
  print(table(metrics.read_lines(args.results)), end='')
  return 0


if __name__ == '__main__':
  cli.run(main)
