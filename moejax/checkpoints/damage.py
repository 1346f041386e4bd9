"""What is wrong with the files of a checkpoint: missing, cut short, or overwritten."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import tensorstore as ts
from etils import epath

# What tensorstore says of files, in plain ValueErrors; of memory it says RESOURCE_EXHAUSTED.
_OF_FILES = re.compile(
    r'((?:NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION): .*?)(?: \[tensorstore_spec=|$)',
    re.DOTALL)
_WHERE = re.compile(r' in OCDBT database at local file "[^"]*"')   # the step directory, once more
_LOCATION = re.compile(r'\w+:(.*):(.*):(\d+):(\d+)')   # kind:folder:file:offset:length


def of_files(state: epath.Path) -> str | None:
  """Why the files under a step's `state` cannot be all that was saved, or None.

  Looks at the metadata, the index, and the size of every file that the index names, but not into
  arrays: all processes find the same, whichever arrays they are about to read, and before Orbax
  trips over it, whose other reads go on when one fails. None where there is no file system.
  """
  if '://' in str(state):
    return None
  try:
    json.loads((state / '_METADATA').read_text())
  except ValueError as error:   # no JSON, or not even text
    return f'_METADATA: {error}'
  try:
    sizes = _sizes(state)
  except ValueError as error:
    if reason := of_error(error):
      return reason
    raise
  for name, size in sorted(sizes.items()):
    if not os.path.exists(state / name):
      return f'{name} is missing'
    if (there := os.path.getsize(state / name)) < size:
      return f'{name} has {there} bytes of {size}'
  return None


def _sizes(state: epath.Path) -> dict[str, int]:
  """{file: bytes it has at least} of the files that hold arrays, by the B-tree of tensorstore's
  OCDBT format. Raises its ValueErrors."""
  try:
    return _named(state)
  except (AttributeError, KeyError, IndexError, TypeError):   # an index of another version: the
    return {}                                                 # read itself must find out


def _named(state: epath.Path) -> dict[str, int]:
  base = ts.KvStore.open({'driver': 'file', 'path': f'{state}/'}).result()
  sizes: dict[str, int] = {}
  nodes = [ts.ocdbt.dump(base).result()['versions'][-1]['root']['location']]
  while nodes:
    for entry in ts.ocdbt.dump(base, nodes.pop()).result()['entries']:
      if 'location' in entry:
        nodes.append(entry['location'])
      if 'indirect_value' in entry:   # others stand in the node itself
        folder, file, offset, length = _LOCATION.fullmatch(entry['indirect_value']).groups()
        sizes[folder + file] = max(sizes.get(folder + file, 0), int(offset) + int(length))
  return sizes


def of_error(error: BaseException) -> str | None:
  """What an error of Orbax or tensorstore says is wrong with the files; None: it is another.

  Orbax wraps whatever an array's read raises, an interrupt too, in a plain Exception.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
    return str(error).rstrip('.')
  found = _OF_FILES.match(str(error)) if isinstance(error, ValueError) else None
  return _WHERE.sub('', found[1]) if found else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Around a read by Orbax, so that its error is all that is seen.

  When one array cannot be read Orbax closes its event loop. Reads of the others look for that at
  any later time, or are given up when Python collects them, and each prints a traceback.
  """
  before = sys.unraisablehook

  def but_those(raised: Any) -> None:
    error = raised.exc_value
    given_up = isinstance(getattr(error, '__cause__', None), GeneratorExit)
    if not given_up and str(error) != 'Event loop is closed':
      before(raised)

  sys.unraisablehook = but_those
  yield
  sys.unraisablehook = before   # after an error it stays: those reads still go on
