"""The train step of a run and the shapes of the state it takes; its data may be shapes too."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from moejax.train import initialize
from moejax.train.layout import Layout
from moejax.train.plan import Plan
from moejax.train.schedule import schedule
from moejax.train.settings import RunConfig
from moejax.train.step import TrainState, make_train_step


class Step:
  """A train step, not compiled yet.

  Args:
    config, plan: the run.
    model: models.Model.
    devices: of train.parallel.
    rows: examples per routing group.
    batch: arrays or shapes of one host's train batch.

  Attributes:
    layout: between single and stacked blocks.
    shapes: the state, as the step takes it, with shardings.
    single: the state as checkpoints have it.
    fn: (state, batch) -> (state, objective).
  """

  def __init__(self, config: RunConfig, plan: Plan, model, devices, rows: int, batch: dict):
    learning_rate = schedule(config.schedule, config.optimizer.learning_rate,
                             start_step=plan.first, end_step=plan.end)
    make = functools.partial(
        make_train_step, model, config.optimizer, learning_rate, task=config.task,
        microbatches=config.microbatches, rows_per_group=rows)
    self.layout = Layout(model, devices)
    single = initialize.state_shapes(config, model, devices)
    shapes = self.relaid(single, self.layout.shapes)
    window = jax.eval_shape(make(), shapes, batch)[0].window
    small = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=devices.replicated())
    window = jax.tree.map(small, window)
    self.single, self.shapes = (dataclasses.replace(s, window=window) for s in (single, shapes))
    self.fn = make(reduce=devices.reduce)

  @staticmethod
  def relaid(state: TrainState, change: Callable[[dict], dict]) -> TrainState:
    """A state whose parameters and slots are put into another layout: a method of Layout."""
    return dataclasses.replace(state, **change(
        {'params': state.params, 'opt_state': state.opt_state}))
