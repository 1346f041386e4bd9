"""Measures the time of each arm's train step over that of its dense base, side by side.

  python -m experiments.benchmarks.train_step --suite=NAME[,NAME] [--scale=mini]
  python -m experiments.benchmarks.train_step --show

Each distinct step of the suites' arms is timed in one process with the step of the dense base that
it extends. A round runs a few steps of each in turn, in an order that rotates. A ratio is a step's
time over the base's in that round, so a busy machine slows both. Steps are timed on as many cores
as a run has in training (--cores), from fresh weights. A step's time does not depend on the
weights, except that grouped dispatch takes a little less time if loads are more even.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from experiments import cli
from experiments import results as results_lib
from experiments import suite as suite_lib
from experiments.benchmarks import common
from experiments.benchmarks.common import Line
from experiments.results import Record, Results
from experiments.suite import KEY_LENGTH, Arm, Run, Suite
from experiments.untrained import UntrainedRun
from moejax.config import check
from moejax.data import DataConfig
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import metrics, workdir

FILE = common.RESULTS / 'step_times.jsonl'
ROUNDS = 15
SECONDS = 0.25    # of a round of one step, roughly
MOST = 50         # steps in a round
TOGETHER = 6      # steps timed against a base at once, for the sake of memory and caches
BATCHES = 8       # different ones that a step takes in turn
DEFAULTS = DataConfig()

Ratios = Mapping[tuple[str, str, str], float]   # (devices, base's step key, step key) -> ratio


def timed_config(run: Run) -> run_config.RunConfig:
  """A run's config, with every setting at its default that a step's time does not depend on."""
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


def step_key(run: Run) -> str:
  """Hash that runs share whose steps take equal time on equal devices."""
  changed = json.dumps(run_config.changes(timed_config(run)), sort_keys=True)
  return hashlib.sha256(changed.encode()).hexdigest()[:KEY_LENGTH]


def known_ratios(path: pathlib.Path = FILE) -> Ratios:
  """All ratios measured so far."""
  return {_identity(line): line['ratio'] for line in metrics.read_lines(path)}


def ratio_of(arm: Arm, devices: str, known: Ratios) -> float | None:
  """An arm's step time over its base's on such devices; None if it was not measured."""
  base, own = step_key(arm.base), step_key(arm.run)
  return 1.0 if base == own else known.get((devices, base, own))


def fill(results: Results, suite: Suite, path: pathlib.Path = FILE) -> Results:
  """Results with the time ratio of every arm of the suite that was measured on its devices."""
  known = known_ratios(path)
  arms = {(arm.domain, arm.name, arm.pair): arm for arm in filter(_can_time, suite.arms)}

  def filled(record: Record) -> Record:
    arm = arms.get((record['domain'], record['arm'], record['pair']))
    if arm is None or arm.run.key != record['key']:
      return record
    ratio = ratio_of(arm, record['devices'], known)
    return record if ratio is None else {**record, 'time_ratio': ratio}

  return dataclasses.replace(results, records=[filled(record) for record in results.records])


def _can_time(arm: Arm) -> bool:
  """Whether an arm has a step to time: not with a teacher, which may not be trained yet."""
  return not isinstance(arm.run, UntrainedRun) and not arm.run.settings.task.teacher


def measure(suites: Iterable[Suite], rounds: int, path: pathlib.Path = FILE) -> None:
  """Times the steps that are not in `path` yet, under a progress bar; a few lines at a time."""
  devices = workdir.provenance()['devices']
  pieces = list(_missing(suites, devices, known_ratios(path)))
  total = (rounds + 2) * sum(1 + len(arms) for arms in pieces)
  with common.progress(total=total, unit='round') as bar:
    tick = lambda key: bar.update()
    for arms in pieces:
      runs = [arms[0][1].base, *(arm.run for _, arm in arms)]
      steps = [TimedStep(timed_config(run), tick) for run in runs]
      measured = interleaved(steps, rounds, tick)
      lines = [_line(label, arm, devices, ratios) for (label, arm), ratios in zip(arms, measured)]
      results_lib.write_lines(path, [*metrics.read_lines(path), *lines])


def _missing(suites: Iterable[Suite], devices: str, known: Ratios
             ) -> Iterable[list[tuple[str, Arm]]]:
  """(label, arm) of distinct steps without a ratio, at most TOGETHER of one base at a time.

  A step that several arms share has the label of the first.
  """
  by_base: dict[str, dict[str, tuple[str, Arm]]] = {}
  for suite in suites:
    for arm in filter(_can_time, suite.arms):
      if ratio_of(arm, devices, known) is None:
        label = f'{arm.domain}, {suite.name}: {arm.name}'
        by_base.setdefault(step_key(arm.base), {}).setdefault(step_key(arm.run), (label, arm))
  for by_key in by_base.values():
    arms = list(by_key.values())
    yield from (arms[start:start + TOGETHER] for start in range(0, len(arms), TOGETHER))


class TimedStep:
  """A run's compiled train step, after the first call; `steps` are taken in one call."""

  def __init__(self, config: run_config.RunConfig, tick: Callable[[Any], Any] = lambda key: None):
    self.trainer, self.state = common.trainer(config)
    self.steps = self.trainer.programs.steps
    batches = itertools.islice(self.trainer.train_batches(0), BATCHES)
    self.batches = itertools.cycle([self.trainer.put(batch) for batch in batches])
    self.advance(1)
    tick(self)

  def advance(self, calls: int) -> None:
    """Makes so many calls, and waits for them."""
    for _ in range(calls):
      self.state, marker = self.trainer.train_step(self.state, next(self.batches))
    jax.block_until_ready(marker)


def interleaved(steps: Sequence[TimedStep], rounds: int,
                tick: Callable[[Any], Any] = lambda key: None) -> list[list[float]]:
  """For all but the first of `steps`, its time per step over the first's, a number per round."""
  works, taken = {}, {}
  for i, step in enumerate(steps):
    per_step = common.seconds(lambda step=step: step.advance(-(-2 // step.steps))) / max(
        2, step.steps)
    count = max(1, min(MOST, round(SECONDS / per_step)))
    calls = -(-count // step.steps)
    works[i] = lambda step=step, calls=calls: step.advance(calls)
    taken[i] = calls * step.steps
  took = common.in_turns(works, rounds, tick)
  per_step = {i: [seconds / taken[i] for seconds in took[i]] for i in took}
  return [common.ratios(per_step[i], per_step[0]) for i in range(1, len(steps))]


def _line(label: str, arm: Arm, devices: str, ratios: list[float]) -> Line:
  """A line of FILE: `ratio` is the median, `low` and `high` are quartiles."""
  low, median, high = common.quartiles(ratios)
  return {'devices': devices, 'base': step_key(arm.base), 'key': step_key(arm.run),
          'label': label, 'config': arm.run.config,
          'ratio': round(median, 4), 'low': round(low, 4), 'high': round(high, 4),
          'flops_ratio': round(arm.run.step_flops / arm.base.step_flops, 4),
          'rounds': len(ratios), 'settings': run_config.changes(timed_config(arm.run)),
          'versions': workdir.versions()}


def _identity(line: Line) -> tuple[str, str, str]:
  return line['devices'], line['base'], line['key']


def page(lines: Iterable[Line]) -> str:
  """Markdown of measured lines, sorted by label."""
  headers = ['step', 'time / base', 'quartiles', 'FLOPs / base', 'time / FLOPs', 'rounds',
             'devices']
  rows = [[line['label'], f'{line["ratio"]:.2f}', f'{line["low"]:.2f} to {line["high"]:.2f}',
           f'{line["flops_ratio"]:.2f}', f'{line["ratio"] / line["flops_ratio"]:.2f}',
           line['rounds'], line['devices']]
          for line in sorted(lines, key=lambda line: (line['label'], _identity(line)))]
  return '\n'.join(common.table(headers, rows, left=(0, 6))) + '\n'


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
  parser.add_argument('--results', metavar='FILE', type=pathlib.Path, default=FILE,
                      help='file of the measurements, which new ones join (default: %(default)s)')
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  args = parser.parse(argv)
  if not args.show:
    check(args.suite is not None, '--suite', args.suite, 'names of suites, or all',
          'Or print what is measured with --show.')
    cli.check_at_least(2, '--rounds', args.rounds, 'Quartiles need a few.')
    cli.check_at_least(0, '--cores', args.cores, 'Leave it out for one core.')
    common.use_cores(args.cores)
    cli.use_compilation_cache()
    names = suite_lib.names() if args.suite == 'all' else args.suite.split(',')
    measure([suite_lib.load(name, args.scale) for name in names], args.rounds, args.results)
  print(page(metrics.read_lines(args.results)), end='')
  return 0


if __name__ == '__main__':
  cli.start(main)
