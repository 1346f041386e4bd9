"""The programs of a run: train step, evaluation, decoding, teacher; compiled on first use.

Shapes are known before anything is allocated. So memory.py can forecast memory, and moejax/aot can
compile programs for devices that are not there.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax import flops, models, trees
from moejax.evaluation import evaluate
from moejax.train import config as run_config
from moejax.train import initialize
from moejax.train.parallel import Jitted, MeshParallel
from moejax.train.plan import Plan
from moejax.train.schedule import schedule
from moejax.train.step import StepSettings, TrainState, make_train_step, scan_steps
from moejax.train.validate import ValidatedRun, of_size
from moejax.trees import stacking

# On one H200 a step of a mini ViT takes 3 to 5 ms with one step per call, in which the GPU could do
# about a TFLOP; 0.6 to 0.7 with 25 steps per call, and no less with 50 (experiments/results/gpu).
SMALL, MOST = 1e12, 25


class Program:
  """A function on devices, compiled for the shapes of its arguments when it is first called.

  Args:
    jitted: the function, as of MeshParallel.jit.
    shapes: of its arguments, with shardings.
  """

  def __init__(self, jitted: Jitted, *shapes):
    self._jitted, self._shapes, self._lowered = jitted, shapes, None

  def lower(self) -> jax.stages.Lowered:
    """Returns the traced function, for the compiler; traced once."""
    self._lowered = self._lowered or self._jitted.lower(*self._shapes)
    return self._lowered

  @functools.cached_property
  def compiled(self) -> jax.stages.Compiled:
    """The compiled function."""
    compiled, self._lowered = self.lower().compile(), None
    return compiled

  def __call__(self, *args):
    return self.compiled(*args)


class Layout:
  """Stacks blocks that run in one scan, and unstacks them again for checkpoints and surgery.

  Args:
    model: models.Model, whose `param_paths` name what is stacked.
    devices: where the arrays are.
  """

  def __init__(self, model, devices: MeshParallel):
    self.param_paths, self.devices = model.param_paths, devices

  def shapes(self, tree: dict) -> dict:
    """Tree of shapes with single blocks -> that with stacked ones, with their shardings."""
    def join(path, leaves):
      return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    stacked = stacking.stack(jax.tree.map(lambda x: x, tree), self.param_paths, join)
    return self.devices.with_shardings(stacked)

  def stack(self, tree: dict) -> dict:
    """Arrays of single blocks -> stacked ones.

    The tree is emptied, so that at most one leaf is in memory twice.
    """
    shardings = trees.flatten(jax.tree.map(lambda s: s.sharding, self.shapes(tree)))
    return stacking.stack(tree, self.param_paths,
                          lambda path, leaves: _join(shardings[path])(leaves))

  def unstack(self, tree: dict) -> dict:
    """Stacked arrays -> copies of single blocks, beside the ones given."""
    single = stacking.unstack(tree, lambda path, leaf: [
        jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * leaf.shape[0])
    shardings = trees.flatten(self.devices.shardings(single))
    return stacking.unstack(tree, lambda path, leaf: _split(
        tuple(shardings[member] for member in stacking.members(path)))(leaf))


@functools.cache
def _join(sharding):
  return jax.jit(jnp.stack, out_shardings=sharding)


@functools.cache
def _split(shardings):
  return jax.jit(list, out_shardings=list(shardings))


class Teacher:
  """The teacher of a distillation, which adds its logits to batches.

  Nothing is allocated before `restore`.

  Args:
    run: its student; `run.teacher` is the finished run that teaches. It is placed as the student.
    batch: shapes of what the train step takes at once, from all processes, without the logits.

  Attributes:
    shapes: its parameters, with shardings.
    outputs: {'teacher_logits': shape of the logits of the whole batch}.
    logits: program of (parameters, batch), its results on the devices of their examples.
    params: its parameters, once restored.
  """

  def __init__(self, run: ValidatedRun, batch: Mapping[str, jax.ShapeDtypeStruct]):
    self._parent, self._devices, self.params = run.teacher, run.devices, None
    self._model = model = models.build(run_config.model_of(run.teacher.config, run.config))
    self.shapes = run.devices.with_shardings(model.shapes)
    self.outputs = {'teacher_logits': jax.eval_shape(model.apply, model.shapes, batch)[0]}

    def teacher_logits(params, batch):
      return model.apply(params, batch)[0]
    self.logits = Program(run.devices.jit_by_example(teacher_logits), self.shapes,
                          run.devices.placed(batch))

  def restore(self) -> None:
    """Reads its parameters. Raises ConfigError: they are not those of the run's model."""
    self.params = initialize.parent_params(self._parent, self._model, self._devices)

  def __call__(self, batch: dict) -> dict:
    """Returns the batch, on its devices, with 'teacher_logits'."""
    return batch | {'teacher_logits': self.logits(self.params, batch)}


class Programs:
  """What a run computes on its devices; nothing is compiled or allocated until it is needed.

  Args:
    run: the run.

  Attributes:
    run: as given.
    layout: between single and stacked blocks.
    shapes: the state as `train` takes it, with shardings.
    single: the state as checkpoints hold it.
    steps: train steps in one call of `train`.
    examples_per_device: of a batch of one step.
    batch: shapes of what `train` takes; batches of several steps are put together by
      step.join_batches.
    train: (state, batch) -> (state, objective).
    teacher: of a distillation, else None.
  """

  def __init__(self, run: ValidatedRun):
    config, plan, devices, model = run.config, run.plan, run.devices, run.model
    self.run, self.layout = run, Layout(model, devices)
    self.steps = steps_per_call(config, plan, devices)
    self.examples_per_device = config.data.batch_size // devices.shards
    batch = of_size(run.batch, self.steps * config.data.batch_size)
    self.teacher = Teacher(run, batch) if run.teacher else None
    batch |= self.teacher.outputs if self.teacher else {}
    learning_rate = schedule(config.schedule, config.optimizer.learning_rate,
                             start_step=plan.first, end_step=plan.end)
    settings = StepSettings(config.optimizer, learning_rate, config.task, config.microbatches,
                            run.examples_per_group)
    shapes = run.state.relaid(self.layout.shapes)
    outline = make_train_step(model, settings, outline=True)
    window = jax.eval_shape(outline, shapes, of_size(batch, config.data.batch_size))[0].window
    window = jax.tree.map(lambda s: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=devices.replicated()), window)
    self.single, self.shapes = (dataclasses.replace(s, window=window) for s in (run.state, shapes))
    self.batch = devices.placed(batch)
    train_step = make_train_step(model, settings, devices.reduce)
    self.train = Program(
        devices.jit_step(scan_steps(train_step, self.steps, self.examples_per_device), self.shapes),
        self.shapes, self.batch)

  @functools.cached_property
  def evaluate(self) -> Program:
    """evaluate.make_eval_step's function of parameters and data.eval_batch_size examples."""
    return self._of_eval_batch(
        evaluate.make_eval_step(self.run.model.apply, self.run.devices.reduce), self.shapes.params)

  @functools.cached_property
  def decode(self) -> Program:
    """evaluate.make_decode_step's function of the parameters of single blocks and as many."""
    return self._of_eval_batch(evaluate.make_decode_step(
        self.run.model, self.run.config.decode, self.run.devices.gather), self.single.params)

  def _of_eval_batch(self, fn, params: dict) -> Program:
    devices = self.run.devices
    batch = devices.placed(of_size(self.run.batch, self.run.config.data.eval_batch_size))
    return Program(devices.jit(fn), params, batch)

  @functools.cached_property
  def features(self) -> Jitted:
    """(parameters, batch) -> features of all examples, for a probe's batches of any size."""
    devices, model = self.run.devices, self.run.model
    return devices.jit(lambda params, batch: devices.gather(model.features(params, batch)))

  def first_state(self) -> tuple[TrainState, initialize.Receipt | None]:
    """Returns initialize.first_state with a window of zeros, as `train` takes it."""
    run = self.run
    state, receipt = initialize.first_state(run.config, run.model, run.devices, run.parent,
                                            run.surgery)
    window = jax.tree.map(
        lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), self.shapes.window)
    return dataclasses.replace(state.relaid(self.layout.stack), window=window), receipt


def steps_per_call(config: run_config.RunConfig, plan: Plan, devices: MeshParallel) -> int:
  """Returns config.steps_per_call, or the number that is chosen where that is 0.

  More than 1 where a step is short for the device: on a GPU or TPU, and of at most SMALL FLOPs per
  device; not with a teacher, whose logits would be in memory for all of them at once. Then it is
  the largest number up to MOST that divides plan.whole.
  """
  if config.steps_per_call:
    return config.steps_per_call
  if config.task.teacher:
    return 1
  text = config.data.text
  work = flops.train_step_flops(config.model, config.data.batch_size, text.encoder_length,
                                text.decoder_length)
  if devices.mesh.devices.flat[0].platform == 'cpu' or work / devices.shards > SMALL:
    return 1
  return max(steps for steps in range(1, MOST + 1) if plan.whole % steps == 0)
