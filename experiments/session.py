"""One call of experiments.main: trains suites, and reports each as soon as it is finished."""

import argparse
import pathlib
import shlex
import sys
import time

from tqdm import tqdm

from experiments import cli, locks, report, results, scheduler, tables, verdict
from experiments.benchmarks import train_step
from experiments.jobs import Job
from experiments.results import Results
from experiments.suite import Suite
from moejax.config import ConfigError


class Session:
  """Trains suites and reports them.

  Args:
    chosen: {name: suite}, in order; of all pairs.
    args: flags, as main.parse gives them.
  """

  def __init__(self, chosen: dict[str, Suite], args: argparse.Namespace):
    self.suites, self.args = chosen, args
    self.found: dict[str, Results] = {}   # of the suites reported so far
    self.unreported: list[str] = []       # suites whose report failed, and why

  def run(self, jobs: dict[str, list[Job]]) -> int:
    """Does the jobs of each suite and reports it.

    Returns:
      The exit code: 0; 1 if a job or a report failed; 130 after SIGINT or SIGTERM, all saved.

    Raises:
      ConfigError: what cannot work, a report among it unless it is to keep going.
    """
    started, args = time.monotonic(), self.args
    train = scheduler.Runner(jobs, args.runs, args.jobs, shard=args.shard,
                             keep_going=args.keep_going,
                             report=self._report)
    print(f'{", ".join(self.suites)} ({args.scale}): {train.found} jobs finished, '
          f'{len(train.pending)} to do in {args.runs}', file=sys.stderr)
    code = 0
    try:
      train.run()
    except scheduler.Failed as error:
      print(f'experiments: {error}', file=sys.stderr)
      code = 1
    except KeyboardInterrupt:
      print(f'\nstopped; what was running is saved. To go on: {self._same_command()}',
            file=sys.stderr)
      return 130
    for message in self.unreported:
      print(f'experiments: {message}', file=sys.stderr)
    if len(self.suites) == 1 and self.found:
      print(tables.to_markdown(*self.found.values()))
    for name, found in self.found.items():
      print(f'{name}: {len(jobs[name])} jobs; {_verdicts(found)}. '
            f'Written to {cli.results_folder(args, name)}')
    print(f'{time.monotonic() - started:.0f} s', file=sys.stderr)
    return 1 if self.unreported else code

  def _report(self, name: str) -> None:
    directory = cli.results_folder(self.args, name)
    try:
      # Shards that find the suite finished write the same bytes, but not at the same time.
      with locks.waited_for(self.args.runs):
        suite = self.suites[name]
        found = self._collect(suite, directory)
        results.write(train_step.fill(found, suite), directory)
        found = results.read(directory)
        report.write(found, directory)
    except ConfigError as error:
      if not self.args.keep_going:
        raise
      self.unreported.append(f'{name}: {error}')
    else:
      self.found[name] = found
      tqdm.write(f'{name}: results written to {directory}', file=sys.stderr)

  def _collect(self, suite: Suite, directory: pathlib.Path) -> Results:
    """What a suite's runs measured; with --pairs, beside what is known of its other pairs."""
    pairs, runs = self.args.pairs, self.args.runs
    if pairs is None:
      return results.collect(suite, runs)
    found = results.collect(suite.of_pairs(pairs), runs)
    there = (directory / results.FILE).exists()
    return results.merge(suite, found, results.read(directory) if there else found)

  def _same_command(self) -> str:
    args = self.args
    given = {'suite': args.suite, 'scale': args.scale, 'runs': args.runs, 'results': args.results,
             'pairs': args.pairs and ','.join(map(str, args.pairs)), 'shard': args.shard}
    flags = [f'--{name}={value}' for name, value in given.items()
             if value not in (None, pathlib.Path('runs'))]
    return shlex.join(['python', '-m', 'experiments.main', *flags,
                       *(['--keep_going'] if args.keep_going else []), f'--jobs={args.jobs}'])


def _verdicts(found: Results) -> str:
  """'2 reproduced, 1 undecided', or that there is no claim."""
  outcomes = [v.outcome for v in verdict.of(found)]
  return ', '.join(f'{outcomes.count(outcome)} {outcome}' for outcome in verdict.OUTCOMES
                   if outcome in outcomes) or 'no claims'
