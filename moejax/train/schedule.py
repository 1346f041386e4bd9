"""Learning rates: a curve over global steps, and how a run with a parent enters it.

t is the global step (updates made so far), s the step at which this run starts (0 from scratch),
T the one at which it ends.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config import check, check_choice

STARTS = ('continue', 'rewarm', 'restart')


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Shape of the learning rate; the rate is peak * rate(t) * cooldown(t).

  With peak = optimizer.learning_rate, w(x) = min(1, x / warmup_steps), f = final_fraction and
  p = (x - warmup_steps) / (T - s - warmup_steps), clipped to 0..1, the curves are

    'rsqrt'     curve(x) = min(w(x), sqrt(timescale / x)): flat from warm-up until x = timescale,
                then falling as 1/sqrt(x). peak 0.01, timescale 10000 is T5's
                1/sqrt(max(x, 10000)), and timescale = warmup_steps is big_vision's form.
    'constant'  curve(x) = w(x).
    'cosine'    curve(x) = w(x) * (f + (1 - f) * (1 + cos(pi * p)) / 2).

  and a run with a parent (s > 0: surgery or continuation) takes up its curve by

    'continue'  rate(t) = curve(t): the parent's own, without a jump (Komatsuzaki et al. 2023).
    'rewarm'    rate(t) = curve(t) * w(t - s): the parent's curve, approached from 0 again.
    'restart'   rate(t) = curve(t - s): as if from scratch.

  From scratch all three are curve(t). A cosine is as long as its run and cannot go on with a
  parent's, so it needs 'restart' there. For every start,
  cooldown(t) = cooldown_to + (1 - cooldown_to) * min(1, (T - t) / cooldown_steps).

  Attributes:
    name: curve, see above.
    start: at the first step of a run with a parent, see above.
    warmup_steps: length of the linear warm-up from 0; 0 is none.
    timescale: rsqrt only, see above.
    cooldown_steps: the last steps of the run, over which the rate falls linearly from the
      schedule's value to cooldown_to times it. rsqrt and constant only.
    cooldown_to: fraction left at the run's end.
    final_fraction: cosine only, see above.
  """
  name: str = 'rsqrt'
  start: str = 'continue'
  warmup_steps: int = 200
  timescale: int = 1000
  cooldown_steps: int = 0
  cooldown_to: float = 0.0
  final_fraction: float = 0.0

  def __post_init__(self):
    check_choice('schedule.name', self.name, ('rsqrt', 'cosine', 'constant'))
    check_choice('schedule.start', self.start, STARTS)
    for key in ('warmup_steps', 'cooldown_steps'):
      value = getattr(self, key)
      check(value >= 0, f'schedule.{key}', value, '0 or more', 'It is a number of steps.')
    check(self.start != 'rewarm' or self.warmup_steps > 0, 'schedule.warmup_steps',
          self.warmup_steps, "1 or more with schedule.start='rewarm'",
          "A warm-up of 0 steps is schedule.start='continue'.")
    check(self.timescale > 0, 'schedule.timescale', self.timescale, 'above 0',
          'Set a positive number.')
    for key in ('cooldown_to', 'final_fraction'):
      value = getattr(self, key)
      check(0 <= value <= 1, f'schedule.{key}', value, '0 <= x <= 1',
            'It is a fraction of the rate.')
    check(self.name != 'cosine' or self.cooldown_steps == 0, 'schedule.cooldown_steps',
          self.cooldown_steps, '0 with cosine',
          'A cosine cools down without it; set schedule.final_fraction instead.')


def check_run(config: ScheduleConfig, *, start_step: int, end_step: int) -> None:
  """Raises ConfigError unless the schedule can be followed from start_step to end_step.

  Refused are a run of no steps, a cooldown longer than the run, and a cosine that starts at a
  parent's step without schedule.start='restart'.
  """
  check(end_step > start_step, 'config.steps', end_step - start_step, 'at least 1',
        f'The run would go from step {start_step} to {end_step}.')
  check(config.cooldown_steps <= end_step - start_step, 'schedule.cooldown_steps',
        config.cooldown_steps, f'at most the {end_step - start_step} steps of this run',
        'A longer cooldown would start this run below the rate its parent was trained at.')
  check(config.name != 'cosine' or start_step == 0 or config.start == 'restart', 'schedule.start',
        config.start, f"'restart' for a cosine that starts at its parent's step {start_step}",
        "A cosine is as long as its run and cannot go on with a parent's; restart it, or take "
        'rsqrt or constant.')


def schedule(config: ScheduleConfig, learning_rate: float, *, start_step: int,
             end_step: int) -> Callable[[jax.Array], jax.Array]:
  """Returns the learning rate as a function of the global step.

  Args:
    config: the curve and its start.
    learning_rate: its peak.
    start_step: global step s at which this run starts (its parent's, or 0).
    end_step: global step T at which this run ends; the cooldown is measured back from here.

  Returns:
    fn(step) -> () float32. `step` counts the updates made so far (TrainState.step), so the first
    update of a warm-up has rate 0 and the value at end_step is never used by an update.

  Raises:
    ConfigError: see check_run.
  """
  check_run(config, start_step=start_step, end_step=end_step)

  def warmup(x):
    return jnp.minimum(1.0, x / config.warmup_steps) if config.warmup_steps else 1.0

  def curve(x):
    if config.name == 'rsqrt':
      return jnp.minimum(warmup(x), jnp.sqrt(config.timescale / jnp.maximum(x, 1.0)))
    if config.name == 'constant':
      return warmup(x)
    length = max(end_step - start_step - config.warmup_steps, 1)
    progress = jnp.clip((x - config.warmup_steps) / length, 0.0, 1.0)
    low = config.final_fraction
    return warmup(x) * (low + (1.0 - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))

  def fn(step):
    t = jnp.asarray(step, jnp.float32)
    since_start = t - start_step
    factor = curve(since_start if config.start == 'restart' else t)
    if config.start == 'rewarm' and start_step > 0:  # from scratch the curve itself warms up
      factor = factor * warmup(since_start)
    if config.cooldown_steps:
      left = jnp.clip((end_step - t) / config.cooldown_steps, 0.0, 1.0)
      factor = factor * (config.cooldown_to + (1.0 - config.cooldown_to) * left)
    return jnp.asarray(learning_rate * factor, jnp.float32)

  return fn
