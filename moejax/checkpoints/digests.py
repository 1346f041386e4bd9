"""Digests of a checkpoint's files: saved with a step, and compared before anything of it is read.

A damaged file could otherwise be read without an error, into wrong parameters.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

FILE = 'digests.json'         # in the directory of a step
PARTS = ('state', 'extra')    # its directories; the commit file beside them changes after the save
_CHUNK = 2**20


def write(directory: epath.Path, step: int) -> None:
  """Writes FILE: the SHA-256 of every file of a step, and the step's number."""
  files = {name: file for part in PARTS for name, file in _files(directory / part, part)}
  content = {'step': step, 'sha256': _sha256(files)}
  (directory / FILE).write_text(json.dumps(content, indent=1) + '\n')


def damage(directory: epath.Path, step: int) -> str | None:
  """Returns how the files of a step differ from those that were saved as that step, or None.

  Reads every file once. All processes get the same answer, whatever arrays they will read.
  """
  try:
    content = json.loads((directory / FILE).read_text())
    saved_as, expected = content['step'], dict(content['sha256'])
  except (ValueError, TypeError, KeyError) as error:
    return f'{FILE}: {type(error).__name__}: {error}'
  if saved_as != step:
    return f'it was saved as step {saved_as}'
  files = {name: directory / name for name in sorted(expected)}
  if missing := [name for name, file in files.items() if not file.exists()]:
    return f'{missing[0]} is missing'
  found = _sha256(files)
  changed = [name for name in files if found[name] != expected[name]]
  return f'{changed[0]} is not as it was saved' if changed else None


def _files(directory: epath.Path, name: str) -> Iterator[tuple[str, epath.Path]]:
  """Yields (name, path) of the files below a directory, which itself is called `name`."""
  for entry in directory.iterdir():
    if entry.is_dir():
      yield from _files(entry, f'{name}/{entry.name}')
    else:
      yield f'{name}/{entry.name}', entry


def _sha256(files: dict[str, epath.Path]) -> dict[str, str]:
  """{name: hexadecimal SHA-256}; several files at a time, since hashlib lets other threads run."""
  def digest(file):
    total = hashlib.sha256()
    with file.open('rb') as stream:
      while chunk := stream.read(_CHUNK):
        total.update(chunk)
    return total.hexdigest()
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    return dict(zip(files, pool.map(digest, files.values())))
