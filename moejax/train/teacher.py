"""The teacher of a distillation: a finished run whose logits go into every train batch."""

from moejax import models
from moejax.config import check
from moejax.train import initialize, settings


class Teacher:
  """Puts the teacher's logits into batches.

  Args:
    config: RunConfig of the student; task.teacher names the teacher's workdir.
    devices: of train.parallel; the teacher is placed as the student is.

  Raises:
    ConfigError: no such run, or its outputs are of another kind or number than the student's.
  """

  def __init__(self, config: settings.RunConfig, devices):
    run = initialize.open_run(config.task.teacher, 'config.task.teacher', initialize.END)
    model = models.build(settings.model_of(run.config, config))
    outputs = lambda c: ('num_classes', c.num_classes) if c.family == 'vit' else (
        'vocab_size', c.vocab_size)
    check(outputs(model.config) == outputs(config.model), 'config.task.teacher',
          config.task.teacher, f'a run with {" ".join(map(str, outputs(config.model)))}',
          f'That one has {" ".join(map(str, outputs(model.config)))}.')
    inputs = lambda c: (c.image_size, c.channels) if c.family == 'vit' else ()
    check(inputs(model.config) == inputs(config.model), 'config.task.teacher', config.task.teacher,
          f"a run with the student's image_size and channels, {inputs(config.model)}",
          f'That one has {inputs(model.config)}.')
    self.params = initialize.parent_params(run, model, devices)
    self.logits = devices.compile_rows(lambda params, batch: model.apply(params, batch)[0])

  def __call__(self, batch: dict) -> dict:
    """The batch, on its devices, with 'teacher_logits'."""
    return batch | {'teacher_logits': self.logits(self.params, batch)}
