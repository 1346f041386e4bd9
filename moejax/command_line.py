"""Command lines with a config file, parsed strictly: a mistake is one line, with exit code 1.

absl and config_flags answer some mistakes with a traceback, and --help with exit code 1. Nothing
here imports JAX, so that a wrong flag is answered at once.
"""

import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable

from absl import app, flags
from ml_collections import ConfigDict

from moejax.config import ConfigError, unknown_key


def parse(argv: list[str], usage: str, required: Callable[[], Iterable[str]]) -> list[str]:
  """Parses the flags of a command that has --config; --help and mistakes end the process.

  Args:
    argv: the command line.
    usage: an example of the command, for messages.
    required: returns names of flags that must be given; called when the flags are parsed.

  Returns:
    argv[:1], since all else must be flags.
  """
  try:
    return _parse(argv, usage, required)
  except ConfigError as error:
    sys.exit(f'moejax: {error}')


def _parse(argv: list[str], usage: str, required: Callable[[], Iterable[str]]) -> list[str]:
  if {'--help', '-help', '-h', '-?'} & set(argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
  for path in _config_files(argv):
    if not os.path.exists(path):
      same_name = pathlib.Path(os.path.dirname(path) or '.').rglob(os.path.basename(path))
      near = next((f' Did you mean {file}?' for file in same_name), '')
      raise ConfigError(f'--config: no such file: {path}.{near} Usage: {usage}')
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    message = _last_line(error)
    stop = '' if message.endswith('?') else '.'
    raise ConfigError(f'command line: {message}{stop} --help lists the flags') from error
  except (AttributeError, KeyError) as error:   # an override of a key the config does not have
    raise _misspelt(argv) or ConfigError(f'command line: {error}') from error
  for name in required():
    if not flags.FLAGS[name].value:
      raise ConfigError(f'--{name}: missing. Usage: {usage}')
  if len(rest) > 1:
    raise ConfigError(f'command line: {rest[1]!r} is no flag; flags begin with --. Usage: {usage}')
  return rest


def config() -> ConfigDict:
  """Returns the config that the parsed command line names, with its overrides.

  A config file that raises ends the process with one line.
  """
  try:
    return flags.FLAGS['config'].value.copy_and_resolve_references()
  except Exception as error:   # whatever the file raised when it was loaded
    sys.exit(f'moejax: --config: {_last_line(error)}')


def _config_files(argv: list[str]) -> list[str]:
  """FILE of each --config=FILE[:arg] or --config FILE[:arg]."""
  given = [arg.partition('=')[2] for arg in argv if re.match('--?config=', arg)]
  given += [after for arg, after in itertools.pairwise(argv) if re.fullmatch('--?config', arg)]
  return [value.partition(':')[0] for value in given]


def _last_line(error: Exception) -> str:
  """The message of the error itself, without the traceback that config_flags puts before it."""
  line = str(error).strip().splitlines()[-1]
  return line.removeprefix('moejax.config.ConfigError: ').rstrip('.')


def _misspelt(argv: list[str]) -> ConfigError | None:
  """The error for the first --config.a.b=value whose key is not in the config."""
  sys.argv = [arg for arg in argv if not re.match(r'--?config\.', arg)]   # read by config_flags
  flags.FLAGS(sys.argv)
  for arg in argv:
    node, *path = arg.lstrip('-').split('=')[0].split('.')
    if node != 'config' or not path:
      continue
    node = flags.FLAGS['config'].value
    for depth, name in enumerate(path):
      if not isinstance(node, ConfigDict) or name not in node:
        return unknown_key('.'.join(['config', *path[:depth + 1]]), node)
      node = node[name]
  return None
