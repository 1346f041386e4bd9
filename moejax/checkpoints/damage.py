"""Finds what is wrong with the files of a checkpoint: missing, cut short, or overwritten."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import tensorstore as ts
from etils import epath

# tensorstore's errors about files, all plain ValueErrors. (Out of memory is RESOURCE_EXHAUSTED.)
_OF_FILES = re.compile(
    r'((?:NOT_FOUND|OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION): .*?)(?: \[tensorstore_spec=|$)',
    re.DOTALL)
_WHERE = re.compile(r' in OCDBT database at local file "[^"]*"')   # repeats the step's directory
_LOCATION = re.compile(r'\w+:(.*):(.*):(\d+):(\d+)')   # kind:folder:file:offset:length


def of_files(state: epath.Path) -> str | None:
  """Returns why the files under a step's `state` cannot be all that was saved, or None.

  Reads the metadata and the index, and compares the size of every file in the index; it reads no
  arrays. So all processes get the same answer, whatever arrays they will read. They get it before
  Orbax reads, whose other reads continue when one fails. None where there is no file system.
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
    if (given := os.path.getsize(state / name)) < size:
      return f'{name} has {given} bytes of {size}'
  return None


def _sizes(state: epath.Path) -> dict[str, int]:
  """{file: bytes that it has at least} of the files with arrays, from tensorstore's OCDBT B-tree.

  {} for an index of an unknown version, whose damage only the read itself can find. Raises
  tensorstore's ValueErrors.
  """
  base = ts.KvStore.open({'driver': 'file', 'path': f'{state}/'}).result()
  sizes: dict[str, int] = {}
  try:
    nodes = [ts.ocdbt.dump(base).result()['versions'][-1]['root']['location']]
    while nodes:
      for entry in ts.ocdbt.dump(base, nodes.pop()).result()['entries']:
        if 'location' in entry:
          nodes.append(entry['location'])
        if 'indirect_value' in entry:   # other values are in the node itself
          folder, file, offset, length = _LOCATION.fullmatch(entry['indirect_value']).groups()
          sizes[folder + file] = max(sizes.get(folder + file, 0), int(offset) + int(length))
  except (AttributeError, KeyError, IndexError, TypeError):
    return {}
  return sizes


def of_error(error: BaseException) -> str | None:
  """What is wrong with the files, from an error of Orbax or tensorstore; None: it is another error.

  Orbax wraps every error in an array's read, even an interrupt, in a plain Exception.
  """
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, FileNotFoundError | json.JSONDecodeError | UnicodeDecodeError):
    return str(error).rstrip('.')
  match = _OF_FILES.match(str(error)) if isinstance(error, ValueError) else None
  return _WHERE.sub('', match[1]) if match else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Suppresses, around a read by Orbax, all tracebacks but that of its first error.

  When one array cannot be read, Orbax closes its event loop. At any later time, reads of others
  find it closed, or Python collects them unfinished, and each prints a traceback.
  """
  before = sys.unraisablehook

  def other_errors(raised: Any) -> None:
    error = raised.exc_value
    abandoned = isinstance(getattr(error, '__cause__', None), GeneratorExit)
    if not abandoned and str(error) != 'Event loop is closed':
      before(raised)

  sys.unraisablehook = other_errors
  yield
  sys.unraisablehook = before   # not after an error, since those reads still go on
