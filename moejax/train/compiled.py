"""The steps of a run and the shapes of what they take, known before anything is allocated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moejax import flops, models, trees
from moejax.evaluation import evaluate
from moejax.train import initialize
from moejax.train.config import RunConfig
from moejax.train.layout import Layout
from moejax.train.parameter_groups import check_groups, check_stacked
from moejax.train.plan import Plan, check_batches, check_heads
from moejax.train.schedule import schedule
from moejax.train.step import TrainState, dispatch, make_train_step
from moejax.train.teacher import Teacher

# On one H200 a step of a mini ViT takes 3 to 5 ms if it is handed over by itself, in which the GPU
# could do about a TFLOP; of 25 at once 0.6 to 0.7, and 50 gain no more (experiments/results/gpu).
SMALL, MOST = 1e12, 25


class Step:
  """A train step, not compiled yet, and the evaluation, decoding and teacher that go with it.

  Args:
    config, plan: the run.
    model: models.Model.
    devices: of train.parallel.
    rows: examples per routing group.
    batch: shapes of a global train batch, as data has it: without what a teacher says.
    decodes: whether outputs are decoded and scored at the end.

  Attributes:
    config, plan, model, devices, rows, decodes: as given.
    examples: the shapes of a global batch.
    layout: between single and stacked blocks.
    shapes: the state, as the step takes it, with shardings.
    single: the state as checkpoints have it.
    steps: how many fn takes.
    teacher: of a distillation, else None; nothing of it is allocated yet.
    shard: examples of a batch on each device.
    batch: as fn takes it.
    fn: (state, batch) -> (state, objective); the batches of several steps are put together by
      step.join.

  Raises:
    ConfigError: model and devices do not fit together, or the teacher cannot teach it.
  """

  def __init__(self, config: RunConfig, plan: Plan, model, devices, rows: int,
               batch: Mapping[str, jax.ShapeDtypeStruct], decodes: bool = False):
    self.config, self.plan, self.model, self.devices = config, plan, model, devices
    self.rows, self.examples, self.decodes = rows, batch, decodes
    check_heads(config, devices.mesh)
    learning_rate = schedule(config.schedule, config.optimizer.learning_rate,
                             start_step=plan.first, end_step=plan.end)
    make = functools.partial(
        make_train_step, model, config.optimizer, learning_rate, task=config.task,
        microbatches=config.microbatches, examples_per_group=rows)
    self.layout = Layout(model, devices)
    single = initialize.state_shapes(config, model, devices)
    shapes = self.relaid(single, self.layout.shapes)
    self.steps = steps_per_call(config, plan, devices, batch)
    batch = of_size(batch, self.steps * config.data.batch_size)
    self.teacher = Teacher(config, devices, batch) if config.task.teacher else None
    batch |= self.teacher.outputs if self.teacher else {}
    window = jax.eval_shape(make(outline=True), shapes, of_size(
        batch, config.data.batch_size))[0].window
    small = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=devices.replicated())
    window = jax.tree.map(small, window)
    self.single, self.shapes = (dataclasses.replace(s, window=window) for s in (single, shapes))
    self.shard = config.data.batch_size // devices.shards
    self.batch = devices.placed(batch)
    self.fn = dispatch(make(reduce=devices.reduce), self.steps, self.shard)

  @classmethod
  def of(cls, config: RunConfig, plan: Plan, devices,
         batch: Mapping[str, jax.ShapeDtypeStruct], decodes: bool = False) -> 'Step':
    """The step of a run of which no data is at hand.

    batch: its examples are config.data.batch_size, however many are given.

    Raises:
      ConfigError: model, batch and devices do not fit together.
    """
    model = models.build(config.model, config.execution)
    lengths = [batch[name].shape[1] for name in ('encoder_input', 'decoder_input') if name in batch]
    rows = model.examples_per_group(*lengths)
    check_stacked(config.optimizer, model.param_paths)
    check_groups(config.optimizer, trees.flatten(model.shapes))
    check_batches(config, rows, devices.shards)
    return cls(config, plan, model, devices, rows, of_size(batch, config.data.batch_size), decodes)

  def lower(self) -> jax.stages.Lowered:
    """To be compiled for the devices, which need not be there."""
    return self.devices.lower(self.fn, self.shapes, self.batch)

  @functools.cached_property
  def evaluate(self) -> Callable:
    """evaluate.make_eval_step's function of params and data.eval_batch_size examples, compiled
    before its arguments are there if the devices can do that."""
    return self._compiled(evaluate.make_eval_step(self.model.apply, self.devices.reduce),
                          self.shapes.params)

  @functools.cached_property
  def decode(self) -> Callable:
    """evaluate.make_decode_step's function of the parameters of single blocks and as many examples,
    compiled likewise."""
    return self._compiled(
        evaluate.make_decode_step(self.model, self.config.decode, self.devices.gather),
        self.single.params)

  def _compiled(self, fn: Callable, params: dict) -> Callable:
    if not self.devices.ahead:
      return self.devices.compile(fn)
    batch = self.devices.placed(of_size(self.examples, self.config.data.eval_batch_size))
    return self.devices.lower_eval(fn, params, batch).compile()

  def first_state(self, parent: initialize.Parent | None
                  ) -> tuple[TrainState, initialize.Receipt | None]:
    """`initialize.first_state` with a window of zeros, as the step takes it."""
    state, receipt = initialize.first_state(self.config, self.model, self.devices, parent)
    window = jax.tree.map(
        lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), self.shapes.window)
    return dataclasses.replace(self.relaid(state, self.layout.stack), window=window), receipt

  @staticmethod
  def relaid(state: TrainState, change: Callable[[dict], dict]) -> TrainState:
    """A state whose parameters and slots are put into another layout: a method of Layout."""
    return dataclasses.replace(state, **change(
        {'params': state.params, 'opt_state': state.opt_state}))


def steps_per_call(config: RunConfig, plan: Plan, devices, batch: Mapping) -> int:
  """config.steps_per_call, or what it is if that is 0.

  More than 1 where a step is short for the device: on a GPU or TPU, and of at most SMALL FLOPs per
  device; not with a teacher, whose logits would be there for all of them at once. Then it is the
  largest number up to MOST that fits the plan.
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


def of_size(batch: Mapping, size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of a batch of so many examples, from arrays or shapes of one."""
  return {k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype) for k, v in batch.items()}
