"""Command lines of experiments: a mistake ends the process with one line and exit code 1."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from experiments import suite as suite_lib
from moejax import main as main_lib
from moejax.config import ConfigError, check, nearest


class Parser(argparse.ArgumentParser):
  """argparse that suggests the nearest flag for a mistyped one, and raises ConfigError."""

  def __init__(self, prog: str, doc: str):
    super().__init__(prog=prog, description=doc, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)

  def add_suite(self) -> None:
    """Adds --suite, --scale, --runs and --results."""
    self.add_argument('--suite', metavar='NAME', help='which: ' + ', '.join(suite_lib.names()))
    self.add_argument('--scale', metavar='SCALE', default='mini',
                      help='how large; see --list (default: %(default)s)')
    self.add_argument('--runs', metavar='DIR', type=pathlib.Path, default=pathlib.Path('runs'),
                      help='folder of the workdirs; runs that are finished there are not trained '
                           'again (default: %(default)s)')
    self.add_argument('--results', metavar='DIR', type=pathlib.Path,
                      help='folder of results.jsonl, table and plot (default: RUNS/SUITE, and '
                           'RUNS/SUITE-SCALE for a scale other than mini); of several suites, that '
                           'of their folders')

  def parse(self, argv: list[str] | None) -> argparse.Namespace:
    """Returns the flags. Raises ConfigError on a wrong one."""
    args, unknown = self.parse_known_args(argv)
    flags = [flag for action in self._actions for flag in action.option_strings]
    for word in unknown:
      near = nearest(word.split('=')[0], flags)
      raise ConfigError(f'command line: {word!r} is no flag of {self.prog}'
                        + (f'; did you mean {near!r}?' if near else '.') + ' --help lists them')
    return args

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'command line: {message}. --help lists the flags')


def check_at_least(least: int, flag: str, given: int, fix: str) -> None:
  """Raises ConfigError if a number on the command line is too small."""
  check(given >= least, flag, given, f'{least} or more', fix)


def results_folder(args: argparse.Namespace, suite: str) -> pathlib.Path:
  """Returns the folder of a suite's table and plot; `suite` is one of those in args.suite."""
  if args.results and suite == args.suite:
    return args.results
  name = suite if args.scale == 'mini' else f'{suite}-{args.scale}'
  return (args.results or args.runs) / name


def use_compilation_cache() -> None:
  """Keeps compiled programs where moejax.main does, unless the environment names another place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir',
                      os.path.expanduser(main_lib.COMPILATION_CACHE.default))


def start(main: Callable[[], int]) -> NoReturn:
  """Ends the process with main()'s exit code; a ConfigError is one line and exit code 1.

  A reader that closes its end of the output early, such as `head`, causes no traceback.
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
