"""The schema of a run: every key a config file may set, with its default and its range.

    edited = config.default(vit.config('mini'))   # ConfigDict of every key, for a file to edit
    run = config.resolve(edited)                  # frozen RunConfig, or a ConfigError
"""

import dataclasses
import functools
import json
import re
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from moejax import config as config_lib
from moejax.config import check
from moejax.data import DataConfig
from moejax.evaluation.evaluate import DecodeConfig
from moejax.evaluation.few_shot import ProbeConfig
from moejax.losses import TaskConfig
from moejax.models.scan import Execution
from moejax.models.t5 import T5Config
from moejax.models.vit import ViTConfig
from moejax.sharding import MeshConfig
from moejax.surgery.config import InitConfig
from moejax.train import parallel
from moejax.train.optimizer import OptimizerConfig
from moejax.train.schedule import ScheduleConfig

flatten_dict = functools.partial(traverse_util.flatten_dict, sep='.')   # -> {'a.b.c': value}


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One run.

  Attributes:
    seed: of parameters, data order and noise.
    steps: train steps of this run; the global step counts those of its parents too.
    model, data, optimizer, schedule, init, mesh: see their own classes.
    parallel: 'mesh' (jit over mesh axes) or 'pmap' (data-parallel).
    execution: how stacks of blocks run: unrolled or scanned, what the backward pass computes again.
    microbatches: gradient accumulation, parts per batch.
    steps_per_call: train steps that one call of the compiled program takes; results are the same
      but for rounding. It saves time where a step is so short that the host cannot keep up, as for
      a small model on a GPU. 0: chosen by the step (see compiled.steps_per_call).
    task: the training objective: label smoothing, z-loss, distillation.
    decode: how outputs are decoded at the last step, for data that is scored by them.
    probe: few-shot linear probe of a ViT's features at the last step.
    log_every: steps between lines of train metrics.
    eval_every: steps between evaluations on the validation split; a multiple of log_every.
    eval_splits: evaluated at the last step besides 'validation'.
    checkpoint_every: steps between checkpoints; a multiple of log_every.
    keep_checkpoints: how many of the latest are kept; those of trunk and end always are.
    branch_steps: steps of this run, counted as `steps`, whose checkpoints are kept too, so that
      runs with other budgets can branch there (init.mode='continue', init.step, a cooldown).
  """
  seed: int = 0
  steps: int = 1000
  model: T5Config | ViTConfig = dataclasses.field(default_factory=ViTConfig)
  data: DataConfig = DataConfig()
  init: InitConfig = InitConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: ScheduleConfig = ScheduleConfig()
  task: TaskConfig = TaskConfig()
  decode: DecodeConfig = DecodeConfig()
  probe: ProbeConfig = ProbeConfig()
  mesh: MeshConfig = MeshConfig()
  parallel: str = 'mesh'
  execution: Execution = Execution()
  microbatches: int = 1
  steps_per_call: int = 0
  log_every: int = 50
  eval_every: int = 500
  eval_splits: tuple = ('test',)
  checkpoint_every: int = 500
  keep_checkpoints: int = 2
  branch_steps: tuple = ()

  def __post_init__(self):
    config_lib.check_choice('config.parallel', self.parallel, parallel.NAMES)
    for name in ('steps', 'microbatches', 'log_every', 'eval_every', 'checkpoint_every',
                 'keep_checkpoints'):
      value = getattr(self, name)
      check(value >= 1, f'config.{name}', value, '>= 1', 'Use 1 or more.')
    check(self.steps_per_call >= 0, 'config.steps_per_call', self.steps_per_call,
          '>= 0', 'Use 1, or 0 to have it chosen.')
    for name in ('eval_every', 'checkpoint_every'):
      value = getattr(self, name)
      check(value % self.log_every == 0, f'config.{name}', value,
            f'a multiple of log_every = {self.log_every}',
            'Metrics are averaged over log_every steps; evaluations end such a window.')
    check(self.schedule.cooldown_steps <= self.steps, 'config.schedule.cooldown_steps',
          self.schedule.cooldown_steps, f'at most steps = {self.steps}', 'Shorten the cooldown.')
    trunk = self.steps - self.schedule.cooldown_steps
    check(all(type(n) is int and 0 < n <= trunk for n in self.branch_steps), 'config.branch_steps',
          self.branch_steps, f'steps from 1 to {trunk}, before the cooldown',
          'A branch from within a cooldown would start below the rate of its parent.')
    check(not self.probe.source or self.model.data_kind == 'classification', 'config.probe.source',
          self.probe.source, "'' for T5", 'The probe reads features of images.')
    check(self.data.batch_size % self.microbatches == 0, 'config.microbatches', self.microbatches,
          f'a divisor of data.batch_size = {self.data.batch_size}', 'Change one of them.')


def default(model: T5Config | ViTConfig) -> ConfigDict:
  """Returns every key of a run that trains `model`, at its default, for a file to edit."""
  return config_lib.as_config_dict(RunConfig(model=model))


def resolve(config: ConfigDict) -> RunConfig:
  """Turns a ConfigDict into a validated RunConfig. Raises ConfigError."""
  return config_lib.build(RunConfig, config)


def to_json(config: RunConfig) -> str:
  """Returns the text of a workdir's config.json: every key of a resolved run, sorted."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + '\n'


def from_dict(values: dict) -> RunConfig:
  """Returns the run of a parsed config.json, of an earlier version too. Raises ConfigError."""
  return config_lib.build(RunConfig, config_lib.renamed(values))


def model_of(values: dict, batches_of: RunConfig) -> T5Config | ViTConfig:
  """Returns the model config of another run, to be applied to the batches of `batches_of`.

  Its routing groups become as large as those of `batches_of`, which are whole examples there.

  Args:
    values: config.json of the other run, parsed.
    batches_of: the run whose batches the model gets.
  """
  model = from_dict(values).model
  sizes = {name: stack.moe.group_size for name, stack in batches_of.model.stacks().items()}
  return dataclasses.replace(model, **{
      stack.moe_key: dataclasses.replace(stack.moe, group_size=sizes.get(name, 0))
      for name, stack in model.stacks().items()})


def moe_changes(config: RunConfig, parent: dict) -> list[str]:
  """Returns 'key: value of the parent -> value here' for settings of sparse stacks that differ.

  parent: its config.json, parsed; it may be of a version that had fewer keys.
  """
  theirs, ours = flatten_dict(parent), flatten_dict(json.loads(to_json(config)))
  moe = [k for k in ours if re.match(r'model\.(\w+_)?moe\.', k) and k in theirs]
  sparse = [k for k in moe if ours[f'{k.rpartition(".")[0]}.layers'] != 'none']
  return [f'{k}: {theirs[k]!r} -> {ours[k]!r}' for k in sparse if ours[k] != theirs[k]]


def changes(config: RunConfig) -> dict[str, Any]:
  """Returns {dotted key: value} of the settings that are not at their default, and the family.

  This identifies a run: a setting that a later version adds changes nothing in it.
  """
  default = flatten_dict(dataclasses.asdict(RunConfig(model=type(config.model)())))
  return {key: value for key, value in flatten_dict(dataclasses.asdict(config)).items()
          if key == 'model.family' or value != default[key]}


def differing_keys(a: dict, b: dict) -> list[str]:
  """Returns 'key: value in a -> value in b' for the keys in which two parsed configs differ."""
  a, b = flatten_dict(a), flatten_dict(b)
  return [f'{k}: {a.get(k, "(absent)")!r} -> {b.get(k, "(absent)")!r}'
          for k in sorted(a | b) if a.get(k) != b.get(k)]
