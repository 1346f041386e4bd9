"""What a run is going to do, known before anything is allocated: its steps, its fit, its cost."""

import dataclasses
import math
import pathlib
from typing import Any

from jax.sharding import Mesh

from moejax import flops, trees
from moejax.config import check, check_choice, fail
from moejax.train import files, initialize
from moejax.train.config import RunConfig
from moejax.train.parameter_groups import check_groups, check_stacked
from moejax.train.schedule import check_run


@dataclasses.dataclass(frozen=True)
class Plan:
  """When what is due, in global steps.

  Attributes:
    first: steps that parents trained before this run.
    trunk: where the cooldown begins; what other runs branch from, unless init.step says otherwise.
    end: the run's last step.
    done: the step that a run is resumed at, else 0.
    branches: more steps that other runs may branch from, each with a cooldown of its own: one long
      trunk gives a cooled model for every budget.
  """
  first: int
  trunk: int
  end: int
  branches: tuple[int, ...]
  log_every: int
  eval_every: int
  checkpoint_every: int
  done: int = 0

  @classmethod
  def make(cls, config: RunConfig, first: int, done: int = 0) -> 'Plan':
    """Raises ConfigError: a schedule that this run cannot follow, or something that would be due in
    the middle of a dispatch."""
    end = first + config.steps
    check_run(config.schedule, start_step=first, end_step=end)
    plan = cls(first, end - config.schedule.cooldown_steps, end,
               tuple(first + step for step in config.branch_steps), config.log_every,
               config.eval_every, config.checkpoint_every, done)
    check(plan.whole % (config.steps_per_call or 1) == 0, 'config.steps_per_call',
          config.steps_per_call, f'a divisor of {plan.whole}',
          'Everything falls due at a multiple of that: log_every and the first and last step; the '
          'cooldown and branch_steps, if any.')
    return plan

  @property
  def kept(self) -> set[int]:
    """Steps whose checkpoints stay, whatever config.keep_checkpoints says."""
    return {self.trunk, self.end, *self.branches}

  @property
  def whole(self) -> int:
    """The largest number of steps such that nothing falls due, begins or ends between its
    multiples; evaluations are logged too."""
    return math.gcd(self.first, self.done, self.log_every, *self.kept)

  def eval_due(self, step: int) -> bool:
    return step % self.eval_every == 0 or step == self.end

  def log_due(self, step: int) -> bool:
    """At every multiple of log_every and wherever an evaluation needs the window's numbers."""
    return step % self.log_every == 0 or step == self.end

  def save_due(self, step: int) -> bool:
    return step % self.checkpoint_every == 0 or step in self.kept


def first_step(config: RunConfig, workdir: pathlib.Path) -> int:
  """Global step at which the run of this workdir starts; needs the parent only the first time.

  Raises ConfigError: the parent is not what this run needs, or run.json is damaged.
  """
  if (workdir / 'run.json').exists():
    return files.read_json(workdir / 'run.json', needs=('first_step',))['first_step']
  parent = initialize.open_parent(config.init)
  if parent:
    initialize.check_model(config, parent)
  return parent.reader.step if parent else 0


def check_fit(config: RunConfig, dataset, model, shards: int) -> int:
  """Checks that data, model, optimizer groups and devices fit together.

  Args:
    config: the run.
    dataset: data.Dataset.
    model: models.Model.
    shards: devices over which the examples of a batch are split.

  Returns:
    Examples per routing group.

  Raises:
    ConfigError: names the key that does not fit.
  """
  for split in config.eval_splits:
    check_choice('config.eval_splits', split, dataset.examples)
  if dataset.kind != config.model.data_kind:
    fail('config.data.source', config.data.source, f'a source for {config.model.family!r}',
         'ViT learns from images (glyphs, digits), T5 from text (stdlib_text).')
  check(config.model.image_shape == tuple(dataset.image_shape),
        'config.model.image_size and channels', config.model.image_shape,
        f'the images of {config.data.source}, {tuple(dataset.image_shape)}',
        'Change the model or data.image.')
  key, outputs = config.model.outputs
  needed = dataset.num_classes or dataset.vocab_size
  check(outputs >= needed, f'config.model.{key}', outputs, f'at least {needed}, the data\'s',
        f'Set config.model.{key}={needed}.')
  check_groups(config.optimizer, trees.flatten(model.shapes).keys())
  check_stacked(config.optimizer, model.param_paths)
  rows = model.examples_per_group(dataset.encoder_length, dataset.decoder_length)
  check_batches(config, rows, shards)
  return rows


def check_probe(config: RunConfig, probe_data) -> None:
  """Checks that the model can take the images of the probe. Raises ConfigError.

  probe_data: data.Dataset of config.probe.source.
  """
  source, split = config.probe.source, 'test'
  check(probe_data.kind == 'classification', 'config.probe.source', source,
        'images with a class each', "Try 'digits'.")
  check(split in probe_data.examples, 'config.probe.source', source, f'data with a {split!r} split',
        f'It has {", ".join(probe_data.examples)}.')
  wanted = config.model.image_shape
  check(wanted == tuple(probe_data.image_shape), 'config.probe.source', source,
        f"images of the model's size and channels, {wanted}",
        f'Those are {tuple(probe_data.image_shape)}; change the model or data.image.')


def check_batches(config: RunConfig, rows: int, shards: int) -> None:
  """Checks that batches are whole routing groups on every device.

  Args:
    config: the run.
    rows: examples per routing group.
    shards: devices over which the examples of a batch are split.

  Raises:
    ConfigError: names the key that does not fit.
  """
  for key, size, parts in (('batch_size', config.data.batch_size, config.microbatches),
                           ('eval_batch_size', config.data.eval_batch_size, 1)):
    whole = rows * shards * parts
    check(size % whole == 0, f'config.data.{key}', size,
          f'a multiple of {whole} = {rows} examples per routing group x {shards} devices'
          + (f' x {parts} microbatches' if parts > 1 else ''),
          f'Nearest: {max(1, round(size / whole)) * whole}.')


def check_heads(config: RunConfig, mesh: Mesh) -> None:
  """Checks that each device of the axis `model` has whole heads. Raises ConfigError."""
  parts, heads = mesh.shape.get('model', 1), config.model.num_heads
  check(heads % parts == 0, 'config.mesh.model', parts, f'a divisor of the {heads} heads',
        'Change config.mesh.model or num_heads.')


def facts(config: RunConfig, plan: Plan, model, dataset, probe_data=None) -> dict[str, Any]:
  """What run.json says about the run's size: steps, data, parameters, FLOPs."""
  total, active = flops.parameters(model.shapes, config.model)
  lengths = {'encoder_length': dataset.encoder_length, 'decoder_length': dataset.decoder_length}
  return {
      'first_step': plan.first, 'trunk_step': plan.trunk, 'end_step': plan.end,
      'branch_steps': list(plan.branches),
      'data_fingerprint': dataset.fingerprint,
      **({'probe_fingerprint': probe_data.fingerprint} if probe_data else {}),
      'parameters': total, 'parameters_active_per_token': active,
      'train_flops_per_step': flops.train_step_flops(
          config.model, config.data.batch_size, **lengths),
      'leaves': len(trees.flatten(model.shapes)),
  }
