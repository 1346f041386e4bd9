"""A run's directory: what stands in it and who may write there.

  config.json     every key of the resolved config; a workdir belongs to one config
  run.json        command, package versions, data fingerprint, parameters, FLOPs, memory, steps
  status.json     phase and step right now, for whoever waits; CPU seconds so far
  metrics.jsonl   one line per log and per evaluation; the same bit for bit on a rerun
  timing.jsonl    seconds of train steps and of evaluations
  receipt.json/.txt   what surgery did to every leaf, and the step-0 gap
  checkpoints/    Orbax, by step          tensorboard/
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from typing import Any

import jax

from moejax.config import ConfigError, check, fail, renamed
from moejax.train import config as run_config
from moejax.train import files

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'ml_collections',
            'numpy', 'tensorflow-datasets', 'moejax')


class Workdir:
  """Paths and small files of one run; only process 0 writes.

  Raises ConfigError on what is no path of a file system.
  """

  def __init__(self, path: str | os.PathLike):
    check('://' not in str(path), 'workdir', str(path), 'a folder',
          'Mount the bucket (gcsfuse; see docs/scale.md) and name the folder there.')
    self.path = pathlib.Path(path)
    self.writes = jax.process_index() == 0
    self._began, self._before = time.process_time(), None

  def check(self, config: run_config.RunConfig) -> None:
    """Raises ConfigError, with the differing keys, if a run of another config is here; or if
    config.json is damaged."""
    if not (self.path / 'config.json').exists():
      return
    there = renamed(self.read(
        'config.json', 'If the run here is of this very config, delete that file and start again: '
        'it is written anew. If not, give a new --workdir.'))
    if differing := run_config.differing_keys(there, json.loads(run_config.to_json(config))):
      lines = '\n  '.join(differing)
      raise ConfigError(f'workdir: {self.path} holds a run of another config; give a new --workdir '
                        f'or undo these changes (there -> now):\n  {lines}')

  def claim(self, config: run_config.RunConfig) -> None:
    """Makes the directory and writes config.json. Raises ConfigError if it cannot be written."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self.write('config.json', run_config.to_json(config))
    except OSError as error:
      fail('workdir', str(self.path), 'a directory that can be written',
           f'{type(error).__name__}: {error.strerror}. Choose another --workdir.')

  def seen(self, seconds: float = 60) -> bool:
    """Whether what process 0 claimed is seen from here; network file systems may take a while."""
    end = time.monotonic() + seconds
    while not (found := (self.path / 'config.json').exists()) and time.monotonic() < end:
      time.sleep(1)
    return found

  def write(self, name: str, content: str | dict) -> None:
    """Writes a file atomically; a dict as JSON."""
    if not self.writes:
      return
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + '\n'
    temporary = self.path / (name + '.tmp')
    temporary.write_text(text)
    temporary.replace(self.path / name)

  def status(self, phase: str, step: int) -> None:
    """Says what the run is doing: initializing, evaluating, training, saving, stopped, finished."""
    self.write('status.json', {'phase': phase, 'step': step, 'pid': os.getpid(),
                               'cpu_seconds': self._cpu_seconds()})

  def _cpu_seconds(self) -> float:
    """CPU time of this process since it has this workdir, and of those that were here before."""
    if self._before is None:
      there = (self.path / 'status.json').exists()
      self._before = self.read('status.json').get('cpu_seconds', 0.0) if there else 0.0
    return round(self._before + time.process_time() - self._began, 1)

  def read(self, name: str, fix: str = files.AGAIN) -> dict:
    """A JSON file of this directory. Raises ConfigError if it is missing or damaged; fix: what to
    do then."""
    return files.read_json(self.path / name, fix=fix)

  @property
  def whole(self) -> bool:
    """Whether all files are here that a finished run has and a further start would write anew."""
    return all((self.path / name).exists() for name in ('config.json', 'run.json', 'status.json'))


def versions() -> dict[str, str]:
  """Versions of Python and of the packages a result depends on."""
  found = {'python': platform.python_version(), 'platform': platform.platform()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = '(not installed)'
  return found


def command() -> str:
  """The command line of this process."""
  spec = getattr(sys.modules['__main__'], '__spec__', None)
  start = ['python', '-m', spec.name] if spec else ['python', sys.argv[0]]
  return ' '.join(start + sys.argv[1:])


def provenance(**facts: Any) -> dict:
  """Content of run.json: how this run came about, and `facts` about it."""
  devices = jax.devices()
  return {'command': command(), 'versions': versions(),
          'devices': f'{len(devices)} x {devices[0].device_kind}', **facts}
