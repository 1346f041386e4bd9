"""Trains the runs of a suite that are not finished, and makes its table and plot.

  python -m experiments.main --suite=NAME [--scale=mini]

Runs that are finished are found, one that was stopped resumes, and suites share the runs they have
in common. Ctrl-C saves what is running; the same command goes on. The table and the plot come from
results.jsonl; `python -m experiments.report` makes them again from it.
"""

import pathlib
import sys
import time

from experiments import cli, report, results, runner
from experiments import suite as suite_lib
from moejax.config import ConfigError, check


def _list() -> None:
  """One line per suite: its scales, and the first line of what its file says."""
  for name in suite_lib.names():
    module = suite_lib.module(name)
    print(f'{name} ({", ".join(module.SCALES)})  {module.__doc__.splitlines()[0]}')


def main(argv: list[str] | None = None) -> int:
  """Runs; returns the exit code. Raises ConfigError on what cannot work."""
  parser = cli.Parser('python -m experiments.main', __doc__)
  parser.add_suite()
  parser.add_argument('--jobs', type=int, default=0, metavar='N',
                      help='runs at a time, each on its share of the cores (default: as many as '
                           'there are cores; give 1 where there is a GPU or TPU)')
  parser.add_argument('--list', action='store_true', help='list the suites and their scales')
  args = parser.parse(argv)
  if args.list:
    _list()
    return 0
  check(args.jobs >= 0, '--jobs', args.jobs, '1 or more', 'Leave it out for the default.')
  check(pathlib.Path('configs').is_dir(), 'working directory', str(pathlib.Path.cwd()),
        'the root of the repository, where configs/ is', 'cd there.')
  suite = suite_lib.load(args.suite, args.scale)
  return _train_and_report(suite, args)


def _train_and_report(suite: suite_lib.Suite, args) -> int:
  started = time.monotonic()
  train = runner.Runner(suite.runs(), args.runs, args.jobs or len(runner.cores()))
  print(f'{suite.name} ({suite.scale}): {train.found} runs finished, {len(train.pending)} to train '
        f'in {args.runs}', file=sys.stderr)
  try:
    train.train()
  except runner.Failed as error:
    print(f'experiments: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f'\nstopped; what was running is saved. To go on: {_same_command(suite, args)}',
          file=sys.stderr)
    return 130
  directory = cli.results_folder(args)
  results.write(results.collect(suite, args.runs), directory)
  print(report.write(results.read(directory), directory))
  print(f'Written to {directory} in {time.monotonic() - started:.0f} s')
  return 0


def _same_command(suite: suite_lib.Suite, args) -> str:
  flags = [f'--{name}={getattr(args, name)}' for name in ('runs', 'results')
           if getattr(args, name) not in (None, pathlib.Path('runs'))]
  return ' '.join([suite.command(), *flags])


if __name__ == '__main__':
  try:
    sys.exit(main())
  except ConfigError as error:
    sys.exit(f'experiments: {error}')
