"""Trains the runs of suites that are not finished, and makes each suite's table and plot.

  python -m experiments.main --suite=NAME[,NAME...] [--scale=mini]
  python -m experiments.main --suite=all --shard=1/4 --runs=COMMON_FOLDER

Runs that are finished are found, one that was stopped resumes, and suites share the runs they have
in common. Ctrl-C saves what is running; the same command goes on. Table and plot are written as
soon as the last run of their suite is finished; they come from results.jsonl, and
`python -m experiments.report` makes them again from it. Several machines share the work if each is
started with its own --shard over a common folder; see experiments/launch/.
"""

import argparse
import pathlib
import shlex
import sys
import time

from experiments import cli, dry_run, locks, report, results, runner, suites
from experiments import suite as suite_lib
from experiments.shards import Shard
from moejax.config import ConfigError, check, check_choice

ALL = 'all'


def _list() -> None:
  """One line per suite: its scales, and the first line of what its file says."""
  for name in suite_lib.names():
    print(f'{name} ({", ".join(suite_lib.scales(name))})  '
          + suite_lib.module(name).__doc__.splitlines()[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The flags. Raises ConfigError on what they cannot be."""
  parser = cli.Parser('python -m experiments.main', __doc__)
  parser.add_suite()
  parser.add_argument('--jobs', type=int, default=0, metavar='N',
                      help='runs at a time, each on its share of the cores (default: as many as '
                           'there are cores; give 1 where there is a GPU or TPU)')
  parser.add_argument('--shard', metavar='I/N',
                      help='this machine is number I of N that share the work; --runs is a folder '
                           'that they all see')
  parser.add_argument('--keep_going', action='store_true',
                      help='when a run fails, go on with those that do not start from it')
  parser.add_argument('--dry_run', action='store_true',
                      help='say what would be trained, and how long that may take')
  parser.add_argument('--list', action='store_true', help='list the suites and their scales')
  args = parser.parse(argv)
  if args.list:
    return args
  check(args.jobs >= 0, '--jobs', args.jobs, '1 or more', 'Leave it out for the default.')
  args.jobs = args.jobs or len(runner.cores())
  args.shard = Shard.parse(args.shard) if args.shard is not None else None
  args.suites = _names(args)
  check(not args.results or len(args.suites) == 1, '--results', str(args.results),
        'a folder for one suite', 'Leave it out: each suite has its own folder in --runs.')
  return args


def _names(args: argparse.Namespace) -> list[str]:
  """Names of the suites, each once. Raises ConfigError if there is none of a name."""
  if args.suite != ALL:
    return list(dict.fromkeys(args.suite.split(',')))
  names = list(getattr(suites, 'ORDER', suite_lib.names()))
  scales = dict.fromkeys(scale for name in names for scale in suite_lib.scales(name))
  check_choice('--scale', args.scale, scales)
  have = [name for name in names if args.scale in suite_lib.scales(name)]
  for name in names:
    if name not in have:
      print(f'{name}: left out, it has no scale {args.scale}', file=sys.stderr)
  return have


def main(argv: list[str] | None = None) -> int:
  """Runs; returns the exit code. Raises ConfigError on what cannot work."""
  args = parse(argv)
  if args.list:
    _list()
    return 0
  check(pathlib.Path('configs').is_dir(), 'working directory', str(pathlib.Path.cwd()),
        'the root of the repository, where configs/ is', 'cd there.')
  chosen = {name: suite_lib.load(name, args.scale) for name in args.suites}
  jobs = {name: _jobs(suite) for name, suite in chosen.items()}
  if args.dry_run:
    print(dry_run.table(jobs, args.runs, args.jobs, args.shard))
    return 0
  return _Session(chosen, args).run(jobs)


def _jobs(suite: suite_lib.Suite) -> list:
  return suite.jobs() if hasattr(suite, 'jobs') else suite.runs()


class _Session:
  """Trains suites and reports each when it is done."""

  def __init__(self, chosen: dict[str, suite_lib.Suite], args: argparse.Namespace):
    self.suites, self.args = chosen, args
    self.tables: dict[str, str] = {}   # of the suites reported so far
    self.unreported: list[str] = []    # suites whose report failed, and why

  def run(self, jobs: dict[str, list]) -> int:
    started, args = time.monotonic(), self.args
    train = runner.Runner(jobs, args.runs, args.jobs, shard=args.shard, keep_going=args.keep_going,
                          report=self._report)
    print(f'{", ".join(self.suites)} ({args.scale}): {train.found} runs finished, '
          f'{len(train.pending)} to train in {args.runs}', file=sys.stderr)
    code = 0
    try:
      train.run()
    except runner.Failed as error:
      print(f'experiments: {error}', file=sys.stderr)
      code = 1
    except KeyboardInterrupt:
      print(f'\nstopped; what was running is saved. To go on: {self._same_command()}',
            file=sys.stderr)
      return 130
    for message in self.unreported:
      print(f'experiments: {message}', file=sys.stderr)
    if len(self.suites) == 1:
      print(*self.tables.values(), sep='')
    for name in self.tables:
      print(f'{name}: {len(jobs[name])} runs. Written to {cli.results_folder(args, name)}')
    print(f'{time.monotonic() - started:.0f} s', file=sys.stderr)
    return 1 if self.unreported else code

  def _report(self, name: str) -> None:
    directory = cli.results_folder(self.args, name)
    try:
      # Shards that find the suite finished write the same bytes, but not at the same time.
      with locks.waited_for(self.args.runs):
        results.write(results.collect(self.suites[name], self.args.runs), directory)
        self.tables[name] = report.write(results.read(directory), directory)
    except ConfigError as error:
      if not self.args.keep_going:
        raise
      self.unreported.append(f'{name}: {error}')
    else:
      print(f'{name}: results written to {directory}', file=sys.stderr)

  def _same_command(self) -> str:
    args = self.args
    given = {'suite': args.suite, 'scale': args.scale, 'runs': args.runs, 'results': args.results,
             'shard': args.shard}
    flags = [f'--{name}={value}' for name, value in given.items()
             if value not in (None, pathlib.Path('runs'))]
    return shlex.join(['python', '-m', 'experiments.main', *flags,
                       *(['--keep_going'] if args.keep_going else []), f'--jobs={args.jobs}'])


if __name__ == '__main__':
  try:
    sys.exit(main())
  except ConfigError as error:
    sys.exit(f'experiments: {error}')
