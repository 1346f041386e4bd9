"""A run's directory: its files, and the process that writes them.

  config.json     every key of the resolved config; a workdir belongs to one config
  run.json        command, package versions, data fingerprint, parameters, FLOPs, memory, steps
  status.json     phase and step right now, for whoever waits; CPU seconds so far
  metrics.jsonl   one line per log and per evaluation; a rerun writes equal bytes
  timing.jsonl    seconds of train steps and of evaluations
  receipt.json/.txt   what surgery did to every leaf, and the step-0 gap
  checkpoints/    Orbax, by step          tensorboard/
  run.lock        host and process that train the run, or trained it last
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

import jax

from moejax.config import ConfigError, check, fail, renamed
from moejax.config import path as path_of
from moejax.train import config as run_config

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections',
            'numpy', 'tensorflow-datasets', 'moejax')
LOCK = 'run.lock'
AGAIN = 'Delete that file and start that run again: it is written anew.'


class Workdir:
  """Paths and small files of one run; only process 0 writes, and holds the lock.

  Raises:
    ConfigError: the path is that of a bucket, not of a file system.
  """

  def __init__(self, path: str | os.PathLike):
    check('://' not in str(path), 'workdir', str(path), 'a folder',
          'Mount the bucket (gcsfuse; see docs/scale.md) and name the folder there.')
    self.path = path_of('workdir', path)
    self.writes = jax.process_index() == 0
    self._began, self._before = time.process_time(), None

  def check(self, config: run_config.RunConfig) -> None:
    """Raises ConfigError: another config's run is here, one that trains, or config.json is damaged.
    """
    if (self.path / LOCK).exists():
      with open(self.path / LOCK, encoding='utf-8') as file:
        self._lock(file, fcntl.LOCK_SH)   # released again when the file is closed
    if not (self.path / 'config.json').exists():
      return
    saved = renamed(self.read(
        'config.json', 'If the run here is of this very config, delete that file and start again: '
        'it is written anew. If not, give a new --workdir.'))
    if differing := run_config.differing_keys(saved, json.loads(run_config.to_json(config))):
      keys = '\n  '.join(differing)
      raise ConfigError(f'workdir: {self.path} holds a run of another config; give a new --workdir '
                        f'or undo these changes (there -> now):\n  {keys}')

  @contextlib.contextmanager
  def claimed(self, config: run_config.RunConfig) -> Iterator[None]:
    """Makes the directory, holds its lock in a with block, and writes config.json.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
      ConfigError: the directory cannot be written, or another process holds the lock.
    """
    with contextlib.ExitStack() as held:
      try:
        self.path.mkdir(parents=True, exist_ok=True)
        if self.writes:
          file = held.enter_context(open(self.path / LOCK, 'a+', encoding='utf-8'))
          self._lock(file, fcntl.LOCK_EX)
          file.truncate(0)
          file.write(f'{platform.node()} {os.getpid()}\n')
          file.flush()
        self.write('config.json', run_config.to_json(config))
      except OSError as error:
        fail('workdir', str(self.path), 'a directory that can be written',
             f'{type(error).__name__}: {error.strerror}. Choose another --workdir.')
      yield

  def _lock(self, file: TextIO, how: int) -> None:
    """Locks an open LOCK file, where its file system can. Raises ConfigError: it is locked."""
    try:
      fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        file.seek(0)
        host, _, process = file.read().strip().partition(' ')
        fail('workdir', str(self.path), 'a directory in which no other process trains',
             f'Process {process or "(unknown)"} on {host or "another host"} trains there. Wait for '
             'its end, or stop it; or give another --workdir.')
      if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        raise

  def seen(self, seconds: float = 60) -> bool:
    """Waits for the config.json of process 0; network file systems may take a while.

    Returns:
      Whether this process sees it.
    """
    end = time.monotonic() + seconds
    while not (exists := (self.path / 'config.json').exists()) and time.monotonic() < end:
      time.sleep(1)
    return exists

  def write(self, name: str, content: str | dict) -> None:
    """Writes a file atomically; a dict as JSON."""
    if not self.writes:
      return
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + '\n'
    temporary = self.path / (name + '.tmp')
    temporary.write_text(text)
    temporary.replace(self.path / name)

  def status(self, phase: str, step: int) -> None:
    """Writes status.json.

    phase: 'initializing', 'evaluating', 'training', 'saving', 'stopped' or 'finished'.
    """
    self.write('status.json', {'phase': phase, 'step': step, 'pid': os.getpid(),
                               'cpu_seconds': self._cpu_seconds()})

  def _cpu_seconds(self) -> float:
    """CPU time of this process since it opened this workdir, and of the processes before it."""
    if self._before is None:
      exists = (self.path / 'status.json').exists()
      self._before = self.read('status.json').get('cpu_seconds', 0.0) if exists else 0.0
    return round(self._before + time.process_time() - self._began, 1)

  def read(self, name: str, fix: str = AGAIN, needs: Sequence[str] = ()) -> dict:
    """Reads a JSON file of this directory; see `read_json`."""
    return read_json(self.path / name, fix=fix, needs=needs)

  @property
  def whole(self) -> bool:
    """Whether config.json, run.json and status.json exist."""
    return all((self.path / name).exists() for name in ('config.json', 'run.json', 'status.json'))


def read_json(path: pathlib.Path, key: str = 'workdir', fix: str = AGAIN,
              needs: Sequence[str] = ()) -> dict:
  """Reads the JSON object in a file of a run's directory.

  Args:
    path: the file.
    key: the setting that names the directory, for messages.
    fix: what to do if the file is damaged.
    needs: keys that the object must have.

  Raises:
    ConfigError: there is no such file, or it does not hold one JSON object with these keys.
  """
  try:
    value = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    fail(key, str(path.parent), f'the directory of a run, with {path.name} in it',
         'Train that run first, or correct the path.')
  except ValueError as error:   # no JSON, or not even text
    _damaged(path, key, str(error), fix)
  if not isinstance(value, dict):
    _damaged(path, key, f'it holds a {type(value).__name__}, not an object', fix)
  if missing := [name for name in needs if name not in value]:
    _damaged(path, key, f'it has no {", ".join(missing)}', fix)
  return value


def _damaged(path: pathlib.Path, key: str, why: str, fix: str) -> NoReturn:
  fail(key, str(path.parent), f'a run whose {path.name} can be read',
       f'It is damaged: {why}. {fix}')


def versions() -> dict[str, str]:
  """Returns versions of Python and of the packages a result depends on."""
  found = {'python': platform.python_version(), 'platform': platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = '(not installed)'
  return found


def command() -> str:
  """Returns the command line of this process."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  start = ['python', '-m', spec.name] if spec else ['python', sys.argv[0]]
  return ' '.join(start + sys.argv[1:])


def provenance(**facts: Any) -> dict:
  """Returns the content of run.json: how this run came about, and `facts` about it."""
  devices = jax.devices()
  return {'command': command(), 'versions': versions(),
          'devices': f'{len(devices)} x {devices[0].device_kind}', **facts}
