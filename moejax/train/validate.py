"""Validates a run's data, model, devices and parent together, once, before any allocation.

`start` returns the run's plan and its parent. `validate` opens all that the run reads, and returns
one value for the rest of moejax/train.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from moejax import data, models, trees
from moejax.config import ConfigError, check, check_choice, fail
from moejax.train import config as run_config
from moejax.train import initialize, parallel
from moejax.train.config import RunConfig
from moejax.train.optimizer import check_groups, check_stacked
from moejax.train.parallel import MeshParallel
from moejax.train.plan import Plan
from moejax.train.step import TrainState
from moejax.train.workdir import Workdir
from moejax.trees import rules


@dataclasses.dataclass(frozen=True, eq=False)
class ValidatedRun:
  """A run whose parts fit together.

  Attributes:
    config: the run.
    plan: its steps.
    devices: where it runs.
    model: models.Model of config.model.
    examples_per_group: examples that are routed together.
    batch: shapes of a global train batch as the data has it, without a teacher's logits.
    state: shapes and shardings of its state in single blocks, with an empty window.
    decodes: whether outputs are decoded and scored at the end.
    dataset: data.Dataset; None where a step is compiled without data.
    probe_data: data.Dataset of config.probe.source, or None.
    teacher: the finished run that teaches it, or None.
    parent: the run it begins from, or None; also None where it is resumed.
    surgery: on the parent, planned.
  """
  config: RunConfig
  plan: Plan
  devices: MeshParallel
  model: models.Model
  examples_per_group: int
  batch: Mapping[str, jax.ShapeDtypeStruct]
  state: TrainState
  decodes: bool = False
  dataset: data.Dataset | None = None
  probe_data: data.Dataset | None = None
  teacher: initialize.Parent | None = None
  parent: initialize.Parent | None = None
  surgery: rules.Plan | None = None

  @property
  def fingerprint(self) -> str:
    """The fingerprint of all data that the run reads."""
    return ' '.join(d.fingerprint for d in (self.dataset, self.probe_data) if d)


def start(config: RunConfig, workdir: Workdir, saved: Sequence[int]
          ) -> tuple[Plan, initialize.Parent | None]:
  """Returns the steps of the run of a workdir, and its parent unless the run is resumed.

  A run that has begun, so that run.json exists, keeps its first step.

  Args:
    config: the run.
    workdir: where it was begun, or will be.
    saved: steps of its finished checkpoints.

  Raises:
    ConfigError: the parent is not what this run needs, run.json is damaged, or the run's schedule
      cannot be followed.
  """
  begun = (workdir.path / 'run.json').exists()
  first = workdir.read('run.json', needs=('first_step',))['first_step'] if begun else 0
  parent = None if begun and saved else initialize.open_parent(config.init)
  if parent:
    initialize.check_model(config, parent)
    first = first if begun else parent.reader.step
  return Plan.make(config, first, max(saved, default=0)), parent


def validate(config: RunConfig, plan: Plan, parent: initialize.Parent | None = None
             ) -> ValidatedRun:
  """Opens a run's data and checks it with model, devices, teacher and parent.

  Raises:
    ConfigError: names the key that does not fit.
  """
  devices = parallel.make(config.parallel, config.mesh)
  dataset = open_data(config, config.data, devices)
  model = models.build(config.model, config.execution)
  examples_per_group = check_fit(config, dataset, model, devices)
  probe_data = open_probe(config, devices) if config.probe.source else None
  batch = of_size(dataset.train_batch(0), config.data.batch_size)
  state = initialize.state_shapes(config, model, devices)
  return ValidatedRun(
      config, plan, devices, model, examples_per_group, batch, state, bool(dataset.metric),
      dataset, probe_data, open_teacher(config), parent,
      initialize.plan_surgery(config, state, parent) if parent else None)


def without_data(config: RunConfig, plan: Plan, devices: MeshParallel,
                 batch: Mapping[str, jax.ShapeDtypeStruct], decodes: bool = False,
                 teacher: initialize.Parent | None = None) -> ValidatedRun:
  """Returns a run whose programs can be compiled from shapes alone.

  Args:
    config, plan, devices: the run; its devices need not be there.
    batch: shapes or arrays of a train batch; its examples are config.data.batch_size, however many
      are given.
    decodes: whether outputs are decoded and scored at the end.
    teacher: as `open_teacher` returns, where it is open.

  Raises:
    ConfigError: model, batch, teacher and devices do not fit together.
  """
  model = models.build(config.model, config.execution)
  lengths = [batch[name].shape[1] for name in ('encoder_input', 'decoder_input') if name in batch]
  return ValidatedRun(
      config, plan, devices, model, check_step(config, model, devices, *lengths),
      of_size(batch, config.data.batch_size), initialize.state_shapes(config, model, devices),
      decodes, teacher=teacher or open_teacher(config))


def of_size(batch: Mapping, size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes of a batch of `size` examples, from arrays or shapes of one."""
  return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}


def open_data(config: RunConfig, source: data.DataConfig, devices: MeshParallel) -> data.Dataset:
  """Opens data for a run: the part of this process of its batches. Raises ConfigError."""
  return data.build(source, seed=config.seed, host=devices.host, hosts=devices.hosts)


def open_probe(config: RunConfig, devices: MeshParallel) -> data.Dataset:
  """Opens the probe's data. Raises ConfigError: there is none that the model can take."""
  probe = config.probe
  image = dataclasses.replace(config.data.image, classes=0, augment='none',
                              skip_classes=probe.skip_classes)
  try:
    source = dataclasses.replace(config.data, source=probe.source, image=image, eval_examples=0,
                                 eval_repeats=1)
    probe_data = open_data(config, source, devices)
  except ConfigError as error:
    raise ConfigError(f'config.probe.source={probe.source}: {error}') from error
  check_probe(config, probe_data)
  return probe_data


def open_teacher(config: RunConfig) -> initialize.Parent | None:
  """Opens the run that teaches this one, if any.

  Raises:
    ConfigError: no such run, or its outputs are of another kind or number than the student's.
  """
  path = config.task.teacher
  if not path:
    return None
  teacher = initialize.open_run(path, 'config.task.teacher', initialize.END)
  theirs, ours = run_config.model_of(teacher.config, config), config.model
  check(theirs.outputs == ours.outputs, 'config.task.teacher', path,
        f'a run with {" ".join(map(str, ours.outputs))}',
        f'That one has {" ".join(map(str, theirs.outputs))}.')
  check(theirs.image_shape == ours.image_shape, 'config.task.teacher', path,
        f"a run with the student's images, {ours.image_shape}",
        f'That one has {theirs.image_shape}.')
  return teacher


def check_fit(config: RunConfig, dataset: data.Dataset, model: models.Model,
              devices: MeshParallel) -> int:
  """Checks that data, model, optimizer groups and devices fit together, as `check_step` does."""
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
  return check_step(config, model, devices, dataset.encoder_length, dataset.decoder_length)


def check_step(config: RunConfig, model: models.Model, devices: MeshParallel,
               encoder_length: int = 0, decoder_length: int = 0) -> int:
  """Checks a train step as far as no data is needed: optimizer groups, heads, sizes of batches.

  Args:
    config, model, devices: of the run.
    encoder_length, decoder_length: tokens of an example, of a T5.

  Returns:
    Examples per routing group.

  Raises:
    ConfigError: names the key that does not fit.
  """
  check_groups(config.optimizer, trees.flatten(model.shapes))
  check_stacked(config.optimizer, model.param_paths)
  examples_per_group = model.examples_per_group(encoder_length, decoder_length)
  check_batches(config, examples_per_group, devices.shards)
  parts, heads = devices.mesh.shape.get('model', 1), config.model.num_heads
  check(heads % parts == 0, 'config.mesh.model', parts, f'a divisor of the {heads} heads',
        'Change config.mesh.model or num_heads.')   # each device has whole heads
  return examples_per_group


def check_batches(config: RunConfig, examples_per_group: int, shards: int) -> None:
  """Raises ConfigError unless batches are whole routing groups on each of `shards` devices."""
  for key, size, parts in (('batch_size', config.data.batch_size, config.microbatches),
                           ('eval_batch_size', config.data.eval_batch_size, 1)):
    whole = examples_per_group * shards * parts
    check(size % whole == 0, f'config.data.{key}', size,
          f'a multiple of {whole} = {examples_per_group} examples per routing group x {shards} '
          'devices' + (f' x {parts} microbatches' if parts > 1 else ''),
          f'Nearest: {max(1, round(size / whole)) * whole}.')


def check_probe(config: RunConfig, probe_data: data.Dataset) -> None:
  """Checks that the model can take the images of the probe. Raises ConfigError."""
  source, split = config.probe.source, 'test'
  check(probe_data.kind == 'classification', 'config.probe.source', source,
        'images with a class each', "Try 'digits'.")
  check(split in probe_data.examples, 'config.probe.source', source, f'data with a {split!r} split',
        f'It has {", ".join(probe_data.examples)}.')
  shape = config.model.image_shape
  check(shape == tuple(probe_data.image_shape), 'config.probe.source', source,
        f"images of the model's size and channels, {shape}",
        f'Those are {tuple(probe_data.image_shape)}; change the model or data.image.')
