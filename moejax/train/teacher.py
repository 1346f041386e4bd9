"""The teacher of a distillation: a finished run whose logits go into every train batch."""

import functools
from collections.abc import Callable, Mapping

import jax

from moejax import models
from moejax.config import check
from moejax.train import config as run_config
from moejax.train import initialize


class Teacher:
  """Puts the teacher's logits into batches. Nothing is allocated before `restore`.

  Args:
    config: RunConfig of the student; task.teacher names the teacher's workdir.
    devices: of train.parallel; the teacher is placed as the student is.
    batch: shapes of what train_step takes at once, from all processes, without the logits.

  Attributes:
    shapes: its parameters, with shardings.
    batch: as the teacher takes it.
    outputs: {'teacher_logits': the shape of what it says of the whole batch}.
    params: its parameters, once restored.

  Raises:
    ConfigError: no such run, or its outputs are of another kind or number than the student's.
  """

  def __init__(self, config: run_config.RunConfig, devices,
               batch: Mapping[str, jax.ShapeDtypeStruct]):
    self._run = initialize.open_run(config.task.teacher, 'config.task.teacher', initialize.END)
    self._model = model = models.build(run_config.model_of(self._run.config, config))
    self._devices, self.params = devices, None
    theirs, ours = model.config, config.model
    check(theirs.outputs == ours.outputs, 'config.task.teacher', config.task.teacher,
          f'a run with {" ".join(map(str, ours.outputs))}',
          f'That one has {" ".join(map(str, theirs.outputs))}.')
    check(theirs.image_shape == ours.image_shape, 'config.task.teacher', config.task.teacher,
          f"a run with the student's images, {ours.image_shape}",
          f'That one has {theirs.image_shape}.')
    self.shapes = initialize.param_shapes(model, devices)
    self.batch = devices.placed(batch)
    self.outputs = {'teacher_logits': jax.eval_shape(model.apply, model.shapes, batch)[0]}

  @functools.cached_property
  def logits(self) -> Callable:
    """(parameters, batch) -> logits, in place; compiled before its arguments are there if the
    devices can do that."""
    def teacher_logits(params, batch):
      return self._model.apply(params, batch)[0]
    if not self._devices.ahead:
      return self._devices.compile_rows(teacher_logits)
    return self._devices.lower_rows(teacher_logits, self.shapes, self.batch).compile()

  def restore(self) -> None:
    """Reads its parameters. Raises ConfigError: they are not those of the run's model."""
    self.params = initialize.parent_params(self._run, self._model, self._devices)

  def __call__(self, batch: dict) -> dict:
    """The batch, on its devices, with 'teacher_logits'."""
    return batch | {'teacher_logits': self.logits(self.params, batch)}
