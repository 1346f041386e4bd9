"""What a suite is: runs, which of them start from which, and the arms its table reports.

A run is a config file with changes, exactly what `python -m moejax.main` takes, so every line of a
table can be trained alone. Its workdir is named by a key: a hash of the resolved config in which
the parent stands by its own key and not by its path. Suites that ask for the same run share it.
"""

import dataclasses
import functools
import hashlib
import importlib
import pathlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import suites
from moejax import flops
from moejax.checkpoints import native
from moejax.config import ConfigError, check_choice, unknown_key
from moejax.train import settings
from moejax.train.workdir import Workdir

KEY_LENGTH = 10   # hex digits of a key


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    label: what people call it while it runs; not part of the key.
    config: name of a file in configs/.
    changes: dotted config keys -> values, what --config.KEY=VALUE would set.
    parent: the run it starts from, if config.init.mode is not 'scratch'.
    arg: the config file's argument, as in configs/NAME.py:arg.
  """
  label: str
  config: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  parent: 'Run | None' = None
  arg: str = ''

  def resolved(self, parent: str) -> settings.RunConfig:
    """The validated config, with `parent` as config.init.parent. Raises ConfigError."""
    config = importlib.import_module(f'configs.{self.config}').get_config(self.arg or None)
    for key, value in {**self.changes, 'init.parent': parent}.items():
      _change(config, key, value)
    return settings.resolve(config)

  @functools.cached_property
  def settings(self) -> settings.RunConfig:
    """The resolved config; its parent is the parent's key."""
    return self.resolved(self.parent.key if self.parent else '')

  @functools.cached_property
  def key(self) -> str:
    """Two runs of one key are the same run."""
    return hashlib.sha256(settings.to_json(self.settings).encode()).hexdigest()[:KEY_LENGTH]

  @property
  def name(self) -> str:
    """Name of its workdir."""
    return f'{self.config}-{self.key}'

  @property
  def step_flops(self) -> int:
    """FLOPs of one train step."""
    data = self.settings.data
    lengths = {} if self.settings.model.family == 'vit' else {
        'encoder_length': data.text.encoder_length, 'decoder_length': data.text.decoder_length}
    return flops.train_step_flops(self.settings.model, data.batch_size, **lengths)

  def parent_path(self, folder: pathlib.Path) -> str:
    """config.init.parent when the workdirs stand in `folder`."""
    return str(folder / self.parent.name) if self.parent else ''

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that trains it with workdirs in `folder`."""
    file = f'configs/{self.config}.py' + (f':{self.arg}' if self.arg else '')
    changes = {**self.changes, 'init.parent': self.parent_path(folder)}
    return ['-m', 'moejax.main', f'--config={file}',
            *(f'--config.{key}={value}' for key, value in changes.items()),
            f'--workdir={folder / self.name}']

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether its workdir holds this run, trained to the end."""
    workdir = Workdir(folder / self.name)
    if not all((workdir.path / name).exists() for name in
               ('config.json', 'run.json', 'status.json')):
      return False
    there = workdir.read('config.json')
    there['init']['parent'] = self.settings.init.parent   # its path may have changed, not its key
    saved = native.finished_steps(workdir.path / native.SUBDIR)
    return (settings.from_dict(there) == self.settings
            and workdir.read('status.json')['phase'] == 'finished'
            and workdir.read('run.json')['end_step'] in saved)


def _change(config: ConfigDict, key: str, value: Any) -> None:
  """Sets a dotted key that exists. Raises ConfigError if it does not."""
  node, (*groups, name) = config, key.split('.')
  for group in groups:
    if group not in node:
      raise unknown_key(f'config.{key}', node)
    node = node[group]
  if name not in node:
    raise unknown_key(f'config.{key}', node)
  node[name] = value


@dataclasses.dataclass(frozen=True)
class Arm:
  """One line of the table.

  Attributes:
    domain: the part of the table it stands in; lines are compared within it.
    name: what the line says.
    run: what was trained.
    base: the dense run from whose trunk the domain's arms branch; extra FLOPs are a percentage of
      its pretraining up to there. Where run is base, the line is its own cooldown.
    reference: the others' validation loss is also given relative to this arm's.
  """
  domain: str
  name: str
  run: Run
  base: Run
  reference: bool = False


@dataclasses.dataclass(frozen=True)
class Suite:
  """Arms in the order of the table."""
  name: str
  scale: str
  arms: tuple[Arm, ...]

  def runs(self) -> list[Run]:
    """Every run once, parents before children."""
    found: dict[str, Run] = {}

    def add(run: Run) -> None:
      if run.parent:
        add(run.parent)
      found.setdefault(run.key, run)

    for arm in self.arms:
      add(arm.base)
      add(arm.run)
    return list(found.values())

  def command(self) -> str:
    """The command that trains and reports it."""
    return f'python -m experiments.main --suite={self.name} --scale={self.scale}'


def names() -> list[str]:
  """The suites there are."""
  return sorted(m.name for m in pkgutil.iter_modules(suites.__path__))


def module(name: str):
  """The file of a suite. Raises ConfigError, with the nearest name, if there is none."""
  check_choice('--suite', name, names())
  return importlib.import_module(f'experiments.suites.{name}')


def load(name: str, scale: str) -> Suite:
  """A suite at a scale. Raises ConfigError on unknown names and on runs that cannot work."""
  file = module(name)
  check_choice('--scale', scale, file.SCALES)
  suite = file.get_suite(scale)
  for run in suite.runs():
    try:
      _ = run.key
    except ConfigError as error:
      raise ConfigError(f'suite {name}, run {run.label!r}: {error}') from error
  return suite
