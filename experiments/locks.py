"""Locks that keep two processes, on one machine or on several, from doing the same work at once.

They are flock's, on a file that stays: the kernel lets go of one when the last process that holds
it ends, however it ends. The file system must support flock between the machines: local disks,
NFSv4 and Lustre mounted with flock do; object stores, mounted or not, do not.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator

from moejax.config import ConfigError

FILE = 'lock'


def take(folder: pathlib.Path) -> int | None:
  """A descriptor that holds the lock of a folder, made if missing; None if another has it.

  A process that inherits the descriptor holds the lock too. Raises ConfigError if the folder cannot
  be written, or cannot be locked.
  """
  descriptor = _open(folder)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(descriptor)
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      return None
    raise _unsupported(folder, error) from error
  return descriptor


@contextlib.contextmanager
def waited_for(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder for the length of a with block. Raises ConfigError like `take`."""
  descriptor = _open(folder)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
      raise _unsupported(folder, error) from error
    yield
  finally:
    os.close(descriptor)


def _open(folder: pathlib.Path) -> int:
  # NFS gives exclusive locks only on what is open for writing, so a directory will not do.
  try:
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    raise ConfigError(f'--runs: cannot make {folder} ({error.strerror}). Choose a folder that can '
                      'be written.') from error


def _unsupported(folder: pathlib.Path, error: OSError) -> ConfigError:
  return ConfigError(f'--runs: cannot lock {folder / FILE} ({error.strerror}). Choose a folder on '
                     'a file system that supports flock.')
