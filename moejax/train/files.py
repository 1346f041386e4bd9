"""JSON files that runs leave, read back."""

import json
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from moejax.config import fail

AGAIN = 'Delete that file and start that run again: it is written anew.'


def read_json(path: pathlib.Path, key: str = 'workdir', fix: str = AGAIN,
              needs: Sequence[str] = ()) -> dict:
  """The JSON object in a file of a run's directory.

  Args:
    path: the file.
    key: what named the directory, for messages.
    fix: what to do if the file is damaged.
    needs: keys of the object without which it is.

  Raises:
    ConfigError: there is no such file, or it does not hold one JSON object with these keys.
  """
  try:
    found = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    fail(key, str(path.parent), f'the directory of a run, with {path.name} in it',
         'Train that run first, or correct the path.')
  except ValueError as error:   # no JSON, or not even text
    _damaged(path, key, str(error), fix)
  if not isinstance(found, dict):
    _damaged(path, key, f'it holds a {type(found).__name__}, not an object', fix)
  if missing := [name for name in needs if name not in found]:
    _damaged(path, key, f'it has no {", ".join(missing)}', fix)
  return found


def _damaged(path: pathlib.Path, key: str, why: str, fix: str) -> NoReturn:
  fail(key, str(path.parent), f'a run whose {path.name} can be read',
       f'It is damaged: {why}. {fix}')
