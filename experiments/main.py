"""Trains the runs of suites that are not finished, and makes each suite's table and plot.

  python -m experiments.main --suite=NAME[,NAME...] [--scale=mini]
  python -m experiments.main --suite=all --shard=1/4 --runs=COMMON_FOLDER

A finished run is not trained again, a stopped run resumes, and suites share the runs that they have
in common. Ctrl-C saves the running jobs; the same command resumes them. A suite's table and plot
are written as soon as its last run is finished. They are made from results.jsonl;
`python -m experiments.report` makes them again. Several machines share the work if each is started
with its own --shard over a common folder; see experiments/launch/. Machines that share no folder
can train different --pairs: all arms of a pair start from the pair's own dense parent, and the
results of a pair join those of earlier pairs in --results.
"""

import argparse
import pathlib
import shlex
import sys
import time

import jax
from tqdm import tqdm

from experiments import cli, dry_run, report, scheduler, suites, untrained, verdict
from experiments import results as results_lib
from experiments import suite as suite_lib
from experiments.benchmarks import train_step
from experiments.results import Results
from experiments.suite import Suite
from moejax.config import ConfigError, check, check_choice

ALL = 'all'


class Session:
  """Trains suites, and reports each as soon as it is finished: one call of this command.

  Args:
    suites: {name: suite}, in order; of all pairs.
    args: the flags, from `parse`.
  """

  def __init__(self, suites: dict[str, Suite], args: argparse.Namespace):
    self.suites, self.args = suites, args
    self.reported: dict[str, tuple[Results, str]] = {}   # {name: (results, Markdown)} so far
    self.errors: list[str] = []                          # of the suites whose report failed

  def train(self, jobs: dict[str, list[scheduler.Job]]) -> int:
    """Does the jobs of each suite and reports it.

    Returns:
      The exit code: 0; 1 if a job or a report failed; 130 after SIGINT or SIGTERM, all saved.

    Raises:
      ConfigError: what cannot work; a report that fails, unless --keep_going.
    """
    started, args = time.monotonic(), self.args
    work = scheduler.Scheduler(jobs, args.runs, args.jobs, shard=args.shard,
                               keep_going=args.keep_going, report=self.report)
    print(f'{", ".join(self.suites)} ({args.scale}): {work.finished_before} jobs finished, '
          f'{len(work.pending)} to do in {args.runs}', file=sys.stderr)
    code = 0
    try:
      work.do_all()
    except scheduler.JobFailed as error:
      print(f'experiments: {error}', file=sys.stderr)
      code = 1
    except KeyboardInterrupt:
      print(f'\nstopped; what was running is saved. To go on: {self._same_command()}',
            file=sys.stderr)
      return 130
    for message in self.errors:
      print(f'experiments: {message}', file=sys.stderr)
    for name, (results, markdown) in self.reported.items():
      if len(self.suites) == 1:
        print(markdown)
      print(f'{name}: {len(jobs[name])} jobs; {_outcomes(results)}. '
            f'Written to {cli.results_folder(args, name)}')
    print(f'{time.monotonic() - started:.0f} s', file=sys.stderr)
    return 1 if self.errors else code

  def report(self, name: str) -> None:
    """Collects a suite's results and writes its report."""
    folder = cli.results_folder(self.args, name)
    try:
      # Shards that see the suite finished write equal bytes, but not at the same time.
      with scheduler.locked(self.args.runs):
        suite = self.suites[name]
        results = self._collect(suite, folder)
        results_lib.write(train_step.fill(results, suite), folder)
        results = results_lib.read(folder)
        self.reported[name] = results, report.write(results, folder)
    except ConfigError as error:
      if not self.args.keep_going:
        raise
      self.errors.append(f'{name}: {error}')
    else:
      tqdm.write(f'{name}: results written to {folder}', file=sys.stderr)

  def _collect(self, suite: Suite, folder: pathlib.Path) -> Results:
    """Results of a suite's runs; with --pairs, joined with those of its other pairs in `folder`."""
    pairs, runs = self.args.pairs, self.args.runs
    if pairs is None:
      return results_lib.collect(suite, runs)
    new = results_lib.collect(suite.only_pairs(pairs), runs)
    known = (folder / results_lib.FILE).exists()
    return results_lib.merge(suite, new, results_lib.read(folder) if known else new)

  def _same_command(self) -> str:
    args = self.args
    given = {'suite': args.suite, 'scale': args.scale, 'runs': args.runs, 'results': args.results,
             'pairs': args.pairs and ','.join(map(str, args.pairs)), 'shard': args.shard}
    flags = [f'--{name}={value}' for name, value in given.items()
             if value not in (None, pathlib.Path('runs'))]
    return shlex.join(['python', '-m', 'experiments.main', *flags,
                       *(['--keep_going'] if args.keep_going else []), f'--jobs={args.jobs}'])


def _outcomes(results: Results) -> str:
  """'2 reproduced, 1 undecided', or 'no claims'."""
  outcomes = [v.outcome for v in verdict.decide_all(results)]
  return ', '.join(f'{outcomes.count(outcome)} {outcome}' for outcome in verdict.OUTCOMES
                   if outcome in outcomes) or 'no claims'


def _list() -> None:
  """Prints each suite with its scales and the first line of its docstring."""
  for name in suite_lib.names():
    print(f'{name} ({", ".join(suite_lib.scales(name))})  '
          + suite_lib.module(name).__doc__.splitlines()[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Returns the flags. Raises ConfigError on a wrong one."""
  parser = cli.Parser('python -m experiments.main', __doc__)
  parser.add_suite()
  parser.add_argument('--pairs', metavar='N[,N...]',
                      help='only these (dense parent, seed) pairs; their results join those of '
                           'other pairs in --results (default: all)')
  parser.add_argument('--jobs', type=int, default=0, metavar='N',
                      help='runs at a time, each on its share of the cores (default: one per core; '
                           'give 1 where there is a GPU or TPU)')
  parser.add_argument('--shard', metavar='I/N',
                      help='this machine is number I of N that share the work; all of them see '
                           '--runs')
  parser.add_argument('--keep_going', action='store_true',
                      help='when a run fails, go on with those that do not start from it')
  parser.add_argument('--dry_run', action='store_true',
                      help='print what would be trained, and how long that may take')
  parser.add_argument('--list', action='store_true', help='list the suites and their scales')
  args = parser.parse(argv)
  if args.list:
    return args
  check(args.suite is not None, '--suite', args.suite, ', '.join(suite_lib.names()),
        f'Usage: {parser.prog} --suite=NAME')
  cli.check_at_least(0, '--jobs', args.jobs, 'Leave it out for the default.')
  args.jobs = args.jobs or len(scheduler.cores())
  args.shard = scheduler.Shard.parse(args.shard) if args.shard is not None else None
  args.pairs = _pairs(args.pairs)
  args.suites = _names(args)
  return args


def _pairs(text: str | None) -> tuple[int, ...] | None:
  """'0,3' -> (0, 3); None: all. Raises ConfigError."""
  if text is None:
    return None
  words = text.split(',')
  check(all(word.isdecimal() for word in words), '--pairs', text,
        'numbers of pairs, the first is 0', 'Two of them are --pairs=0,1.')
  return tuple(dict.fromkeys(map(int, words)))


def _names(args: argparse.Namespace) -> list[str]:
  """Names of the suites, each once; of 'all', those that have the scale. Raises ConfigError."""
  if args.suite != ALL:
    return list(dict.fromkeys(args.suite.split(',')))
  scales = {name: suite_lib.scales(name) for name in suites.ORDER}
  check_choice('--scale', args.scale, dict.fromkeys(s for known in scales.values() for s in known))
  for name, known in scales.items():
    if args.scale not in known:
      print(f'{name}: left out, it has no scale {args.scale}', file=sys.stderr)
  return [name for name, known in scales.items() if args.scale in known]


def _with_pairs(suites: dict[str, Suite], pairs: tuple[int, ...] | None) -> dict[str, Suite]:
  """The suites that have any of the pairs. Raises ConfigError if none has."""
  if pairs is None:
    return suites
  numbers = {name: {arm.pair for arm in suite.arms} for name, suite in suites.items()}
  chosen = {name: suite for name, suite in suites.items() if numbers[name] & set(pairs)}
  check(bool(chosen), '--pairs', ','.join(map(str, pairs)),
        f'pairs 0 to {max(map(max, numbers.values()))}', 'Choose others.')
  for name in suites:
    if name not in chosen:
      print(f'{name}: left out, it has none of these pairs', file=sys.stderr)
  return chosen


def main(argv: list[str] | None = None) -> int:
  """Trains and reports; returns the exit code. Raises ConfigError on what cannot work."""
  args = parse(argv)
  if args.list:
    _list()
    return 0
  check(pathlib.Path('configs').is_dir(), 'working directory', str(pathlib.Path.cwd()),
        'the root of the repository, where configs/ is', 'cd there.')
  jax.config.update('jax_platforms', 'cpu')   # the workers need the TPU, or the GPU's memory
  chosen = _with_pairs({name: suite_lib.load(name, args.scale) for name in args.suites}, args.pairs)
  jobs = {name: untrained.jobs(
      (suite if args.pairs is None else suite.only_pairs(args.pairs)).runs())
          for name, suite in chosen.items()}
  if args.dry_run:
    print(dry_run.table(jobs, args.runs, args.jobs, args.shard))
    return 0
  return Session(chosen, args).train(jobs)


if __name__ == '__main__':
  cli.start(main)
