"""Defines suites: runs and their parents, the arms that a suite compares, and its claims.

A run is a config file with changes, exactly what `python -m moejax.main` takes, so every arm of a
table can be trained alone. Its workdir is named by a key (a hash of the resolved config, with the
parent's key in place of its path) and by the fingerprint of its data. Suites that have a run in
common share its workdir, and nothing is trained twice.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pathlib
import pkgutil
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import common
from experiments import suites
from moejax import config as config_lib
from moejax import data, flops
from moejax.checkpoints import orbax
from moejax.config import ConfigError, check_choice, unknown_key
from moejax.train import config as settings
from moejax.train import metrics
from moejax.train.workdir import Workdir

KEY_LENGTH, FINGERPRINT_LENGTH = 10, 6   # hex digits of each in a workdir's name
SCALES = ('smoke', 'mini', 'colab', 'paper')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run.

  Attributes:
    label: its name in progress bars and messages; not part of the key.
    config: name of a file below configs/, such as 't5_stdlib' or 'paper/t5_base'.
    changes: dotted config keys -> values, what --config.KEY=VALUE would set.
    parent: the run it starts from, if config.init.mode is not 'scratch'.
    arg: the config file's argument, as in NAME.py:arg.
  """
  label: str
  config: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  parent: 'Run | None' = None
  arg: str = ''

  def resolved(self, parent: str) -> settings.RunConfig:
    """The validated config, with `parent` as config.init.parent. Raises ConfigError."""
    config = common.load(self.config, self.arg or None)
    for key, value in {**self.changes, 'init.parent': parent}.items():
      _change(config, key, value)
    return settings.resolve(config)

  @functools.cached_property
  def settings(self) -> settings.RunConfig:
    """The resolved config; its parent is the parent's key."""
    return self.resolved(self.parent.key if self.parent else '')

  @functools.cached_property
  def key(self) -> str:
    """Hash of the settings that differ from the defaults: it identifies the run, data aside.

    A new setting changes no key. A changed default does not either, so `finished` compares every
    setting, lest a result be taken for that of another run.
    """
    changed = json.dumps(settings.changes(self.settings), sort_keys=True)
    return hashlib.sha256(changed.encode()).hexdigest()[:KEY_LENGTH]

  @functools.cached_property
  def name(self) -> str:
    """Name of its workdir; reads the data, whose fingerprint is part of it."""
    fingerprint = _fingerprint(self.settings.data)[:FINGERPRINT_LENGTH]
    return f'{self.config.replace("/", "-")}-{self.key}-{fingerprint}'

  @property
  def step_flops(self) -> int:
    """FLOPs of one train step."""
    data = self.settings.data
    return flops.train_step_flops(self.settings.model, data.batch_size, data.text.encoder_length,
                                  data.text.decoder_length)

  @property
  def work(self) -> int:
    """Number of its train steps."""
    return self.settings.steps

  @property
  def cost(self) -> float:
    """FLOPs of all its steps."""
    return self.work * self.step_flops

  def parent_path(self, folder: pathlib.Path) -> str:
    """config.init.parent, if the workdirs are in `folder`; '' without a parent."""
    return str(folder / self.parent.name) if self.parent else ''

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that trains it with workdirs in `folder`."""
    file = f'configs/{common.path(self.config)}.py' + (f':{self.arg}' if self.arg else '')
    changes = {**self.changes, 'init.parent': self.parent_path(folder)}
    return ['-m', 'moejax.main', f'--config={file}',
            *(f'--config.{key}={value}' for key, value in changes.items()),
            f'--workdir={folder / self.name}']

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether its workdir holds this run, trained to the end."""
    workdir = Workdir(folder / self.name)
    if not workdir.whole:
      return False
    config = workdir.read('config.json')
    config['init']['parent'] = self.settings.init.parent   # its path may have changed, not its key
    saved = orbax.finished_steps(workdir.path / orbax.SUBDIR)
    return (settings.from_dict(config) == self.settings
            and workdir.read('status.json')['phase'] == 'finished'
            and workdir.read('run.json')['end_step'] in saved)

  def done(self, folder: pathlib.Path) -> int:
    """Number of steps taken so far, according to its files in `folder`."""
    workdir = Workdir(folder / self.name)
    try:
      first, status = workdir.read('run.json')['first_step'], workdir.read('status.json')['step']
    except ConfigError:   # not written yet
      return 0
    timed = metrics.read_lines(workdir.path / 'timing.jsonl')
    return max(status, timed[-1]['step'] if timed else 0) - first


@functools.cache
def _fingerprint(config: data.DataConfig) -> str:
  return data.build(config, seed=0).fingerprint


def _change(config: ConfigDict, key: str, value: Any) -> None:
  """Sets a dotted key that exists. Raises ConfigError if it does not."""
  *path, last = key.split('.')
  for name in path:
    if name not in config:
      raise unknown_key(f'config.{key}', config)
    config = config[name]
  if last not in config:
    raise unknown_key(f'config.{key}', config)
  config[last] = value


@dataclasses.dataclass(frozen=True)
class Arm:
  """One treatment in one pair. A line of the table shows the arms of one name, of all pairs.

  Attributes:
    domain: its part of the table; arms are compared within a domain.
    name: of its line in the table.
    run: what is trained.
    base: the dense run from whose trunk the domain's arms branch; extra FLOPs are a percentage of
      its pretraining up to there. If run is base, the arm is the cooldown of base.
    pair: number of the (dense parent, seed) pair; differences are taken within a pair.
    reference: whether the metrics of the others are also given relative to this arm's.
    series: the curve of the plot it belongs to; '': a curve of its own.
    x: its place on a sweep's axis, such as the number of experts.
    start_step: where its extra steps begin, if not at the first step of its run: a run that starts
      from another continuation counts the steps of that one too.
    base_step: the step of base that counts as 100 % of pretraining, if not its trunk.
  """
  domain: str
  name: str
  run: Run
  base: Run
  pair: int = 0
  reference: bool = False
  series: str = ''
  x: float | None = None
  start_step: int | None = None
  base_step: int | None = None


RELATIONS = ('<', '>', '~')


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement of a source about two arms, written down before any of them was trained.

  The verdict is about the mean over pairs of (metric of arm `a` - metric of arm `b`), or, with
  `than`, of how much that is above (metric of arm than[0] - metric of arm than[1]).

  Attributes:
    says: the claim in a sentence.
    source: where it is made, as 'Komatsuzaki et al. 2023, Fig. 2'.
    paper: the source's figures, or that none are known.
    domain: of both arms.
    a, b: names of arms.
    relation: '<' or '>': the difference has that sign; '~': it is within +- margin.
    metric: 'split/name' of the results, as 'test/loss' or 'step0/step0_gap'.
    margin: of '~', in units of the metric.
    than: names of two arms whose difference is subtracted, as where a gap is to grow.
  """
  says: str
  source: str
  paper: str
  domain: str
  a: str
  relation: str
  b: str
  metric: str = 'test/loss'
  margin: float | None = None
  than: tuple[str, ...] = ()

  def __post_init__(self):
    check_choice('claim.relation', self.relation, RELATIONS)
    config_lib.check((self.margin is not None) == (self.relation == '~'), 'claim.margin',
                     self.margin, "a number with relation '~', else None", 'Set it, or leave it.')
    config_lib.check(len(self.than) in (0, 2), 'claim.than', self.than, 'two arms, or none',
                     'Name both.')

  @property
  def terms(self) -> dict[str, int]:
    """{arm: +1 or -1}: the difference is the sum of these arms' metrics with these signs."""
    return {self.a: 1, self.b: -1, **dict(zip(self.than, (-1, 1)))}

  @property
  def difference(self) -> str:
    """'a − b', or '(a − b) − (than[0] − than[1])'."""
    text = f'{self.a} − {self.b}'
    return f'({text}) − ({" − ".join(self.than)})' if self.than else text


PLOTS = ('curves', 'points', 'sweep')


@dataclasses.dataclass(frozen=True)
class Suite:
  """Arms in the order of the table, and the claims about them.

  Attributes:
    name, scale: as on the command line.
    arms: those of one name and domain differ in their pair.
    claims: about these arms.
    metrics: 'split/name' of what the table reports; Δ and the plot are about the first of these
      that a domain has.
    plot: 'points': the first metric of each arm, all pairs; 'curves': validation loss over extra
      FLOPs, and these points below if there are several pairs; 'sweep': the first metric over
      the arms' x, a line per series.
    x_label: of a sweep.
  """
  name: str
  scale: str
  arms: tuple[Arm, ...]
  claims: tuple[Claim, ...] = ()
  metrics: tuple[str, ...] = ('test_seen/loss', 'test/loss', 'validation/loss',
                              'test_seen/accuracy', 'test/accuracy', 'validation/accuracy')
  plot: str = 'curves'
  x_label: str = ''

  def __post_init__(self):
    check_choice('suite.plot', self.plot, PLOTS)
    names = {(arm.domain, arm.name) for arm in self.arms}
    for claim in self.claims:
      for name in claim.terms:
        if (claim.domain, name) not in names:
          raise ConfigError(f'suite {self.name}: claim {claim.says!r} names the arm {name!r}, '
                            f'which {claim.domain!r} does not have')
    identities = [(arm.domain, arm.name, arm.pair) for arm in self.arms]
    for identity in identities:
      config_lib.check(identities.count(identity) == 1, 'suite.arms', identity,
                       'each arm once per pair', 'Give them different names.')

  def runs(self) -> list[Run]:
    """Every run once, parents before children."""
    by_key: dict[str, Run] = {}

    def add(run: Run) -> None:
      if run.parent:
        add(run.parent)
      by_key.setdefault(run.key, run)

    for arm in self.arms:
      add(arm.base)
      add(arm.run)
    return list(by_key.values())

  def only_pairs(self, pairs: Collection[int]) -> 'Suite':
    """Its arms of some pairs; without claims, since these may name arms that are left out."""
    arms = tuple(arm for arm in self.arms if arm.pair in pairs)
    return dataclasses.replace(self, arms=arms, claims=())

  def command(self) -> str:
    """The command that trains and reports it."""
    return f'python -m experiments.main --suite={self.name} --scale={self.scale}'


def names() -> list[str]:
  """Names of all suites, sorted."""
  return sorted(m.name for m in pkgutil.iter_modules(suites.__path__))


def module(name: str):
  """The module of a suite. Raises ConfigError, with the nearest name, if there is none."""
  check_choice('--suite', name, names())
  return importlib.import_module(f'experiments.suites.{name}')


def scales(name: str) -> tuple[str, ...]:
  """The scales of a suite: its module's SCALES, or all."""
  return getattr(module(name), 'SCALES', SCALES)


def load(name: str, scale: str) -> Suite:
  """A suite at a scale. Raises ConfigError on an unknown name or scale and on an invalid run."""
  file = module(name)
  check_choice('--scale', scale, scales(name))
  suite = file.get_suite(scale)
  for run in suite.runs():
    try:
      _ = run.key
    except ConfigError as error:
      raise ConfigError(f'suite {name}, run {run.label!r}: {error}') from error
  return suite
