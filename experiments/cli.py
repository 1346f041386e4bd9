"""Command lines of experiments: every mistake is one line and exit code 1."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from experiments import results
from experiments import suite as suite_lib
from moejax.config import ConfigError, check, nearest
from moejax.train import metrics


class Parser(argparse.ArgumentParser):
  """argparse that names the nearest flag of a mistyped one, and raises ConfigError."""

  def __init__(self, prog: str, doc: str):
    super().__init__(prog=prog, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)

  def add_suite(self) -> None:
    """--suite, --scale, --runs and --results."""
    self.add_argument('--suite', metavar='NAME', help='which: ' + ', '.join(suite_lib.names()))
    self.add_argument('--scale', metavar='SCALE', default='mini',
                      help='how large; see --list (default: %(default)s)')
    self.add_argument('--runs', metavar='DIR', type=pathlib.Path, default=pathlib.Path('runs'),
                      help='folder of the workdirs; runs found finished there are not trained '
                           'again (default: %(default)s)')
    self.add_argument('--results', metavar='DIR', type=pathlib.Path,
                      help='folder of results.jsonl, table and plot (default: RUNS/SUITE, and '
                           'RUNS/SUITE-SCALE for a scale other than mini); of several suites, that '
                           'of their folders')

  def parse(self, argv: list[str] | None, *, suite_required: bool = True) -> argparse.Namespace:
    """The flags. Raises ConfigError on what they cannot be."""
    args, unknown = self.parse_known_args(argv)
    flags = [flag for action in self._actions for flag in action.option_strings]
    for word in unknown:
      near = nearest(word.split('=')[0], flags)
      raise ConfigError(f'command line: {word!r} is no flag of {self.prog}'
                        + (f'; did you mean {near!r}?' if near else '.') + ' --help lists them')
    if suite_required and not getattr(args, 'list', False):
      check(args.suite is not None, '--suite', args.suite, ', '.join(suite_lib.names()),
            f'Usage: {self.prog} --suite=NAME')
    return args

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'command line: {message}. --help lists the flags')


def results_folder(args: argparse.Namespace, suite: str = '') -> pathlib.Path:
  """Where table and plot of a suite go; `suite` is one of those that args.suite stands for."""
  suite = suite or args.suite
  if args.results and suite == args.suite:
    return args.results
  name = suite if args.scale == 'mini' else f'{suite}-{args.scale}'
  return (args.results or args.runs) / name


def run(main: Callable[[], int]) -> NoReturn:
  """Ends the process with main()'s exit code; a ConfigError is one line and exit code 1.

  A reader of its output that has seen enough, as `head` has, is no error.
  """
  try:
    code = main()
    sys.stdout.flush()
    sys.exit(code)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # for the flush at exit
    sys.exit(1)
  except ConfigError as error:
    sys.exit(f'experiments: {error}')


def smoke_folder(name: str) -> pathlib.Path:
  """Where a tiny scale writes by default, so that it replaces nothing that was measured."""
  return pathlib.Path('runs') / f'smoke_{name}'


def measure(run: Callable[[], int], page: Callable[[list[dict]], str], file: pathlib.Path,
            written: pathlib.Path | None) -> int:
  """Measures what is not there yet, and shows all of it; the exit code.

  Args:
    run: adds lines to `file`, one as soon as it is measured; returns how many could not be.
    page: lines -> Markdown.
    file: of JSON lines.
    written: where the page goes; None: only shown.
  """
  try:
    failed = run()
  except KeyboardInterrupt:
    print('stopped; what is measured is kept, and the same command goes on', file=sys.stderr)
    return 130
  if lines := metrics.read_lines(file):
    text = page(lines)
    print(text)
    if written:
      results.write_text(written, text)
  return 1 if failed else 0
