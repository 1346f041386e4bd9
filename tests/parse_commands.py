"""Parses commands without running them: python -m tests.parse_commands

Reads [[MODULE, [FLAG, ...]], ...] as JSON from standard input. Prints a line of JSON for each:
{'error': message}, or {} and, of a training run, how it starts.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
from unittest import mock

from experiments import cli, suite


class _Parsed(Exception):
  """Ends a command as soon as its flags are parsed."""


def _then_end(parse):
  def wrapper(*args, **keywords):
    parse(*args, **keywords)
    raise _Parsed
  return wrapper


def parse(name: str, flags: list[str]) -> dict:
  """What the parser of a module makes of the flags."""
  module = importlib.import_module(name)
  if name == 'moejax.main':
    sys.argv = [name, *flags]   # read by config_flags
    module.parse_flags(sys.argv)
    from moejax.train import config
    run = config.resolve(module.CONFIG.value)
    return {'mode': run.init.mode, 'parent': run.init.parent}
  if hasattr(module, 'parse'):   # it checks more than its parser does
    module.parse(flags)
  else:
    with (mock.patch.object(cli.Parser, 'parse', _then_end(cli.Parser.parse)),
          mock.patch.object(argparse.ArgumentParser, 'parse_args',
                            _then_end(argparse.ArgumentParser.parse_args)),
          contextlib.suppress(_Parsed)):
      module.main(flags)
  given = dict(flag.split('=', 1) for flag in flags if '=' in flag)
  for one in filter(None, given.get('--suite', '').split(',')):
    if one != 'all':
      suite.load(one, given.get('--scale', suite.scales(one)[0]))
  return {}


def answer(name: str, flags: list[str]) -> dict:
  """`parse`, in a process forked for it: absl's flags can be parsed once."""
  read, write = os.pipe()
  if os.fork() == 0:
    said = io.StringIO()
    try:
      with contextlib.redirect_stderr(said):
        result = parse(name, flags)
    except BaseException as error:   # SystemExit among them
      result = {'error': f'{error} {said.getvalue()}'}
    os.write(write, json.dumps(result).encode())
    os._exit(0)
  os.close(write)
  os.wait()
  with open(read) as file:
    return json.load(file)


if __name__ == '__main__':
  commands = json.load(sys.stdin)
  for name in {name for name, _ in commands} - {'moejax.main'}:
    importlib.import_module(name)   # once, for all forks
  for command in commands:
    print(json.dumps(answer(*command)))
