"""Plans a run before anything is allocated: its steps, when something is due, its FLOPs."""

import dataclasses
import math
from typing import Any

from moejax import flops, trees
from moejax.config import check
from moejax.train.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Plan:
  """When logs, evaluations and checkpoints are due, in global steps.

  Attributes:
    first: steps that parents trained before this run.
    trunk: where the cooldown begins, and where other runs branch off unless their init.step names
      another step.
    end: the run's last step.
    branches: more steps that other runs may branch from, each with a cooldown of its own: one long
      trunk gives a cooled model for every budget.
    log_every, eval_every, checkpoint_every: as in RunConfig.
    done: the step that a run is resumed at, else 0.
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
    """Returns the plan of a run that starts at step `first` and is resumed at step `done`.

    Raises:
      ConfigError: something would be due in the middle of a call of several steps.
    """
    end = first + config.steps
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
    """Steps whose checkpoints are kept beside the latest config.keep_checkpoints."""
    return {self.trunk, self.end, *self.branches}

  @property
  def whole(self) -> int:
    """The largest number of steps between whose multiples nothing is due, begins or ends.

    Evaluations are logged, so log_every covers them.
    """
    return math.gcd(self.first, self.done, self.log_every, *self.kept)

  def eval_due(self, step: int) -> bool:
    return step % self.eval_every == 0 or step == self.end

  def log_due(self, step: int) -> bool:
    """At every multiple of log_every, and at the end, where an evaluation needs the window."""
    return step % self.log_every == 0 or step == self.end

  def save_due(self, step: int) -> bool:
    return step % self.checkpoint_every == 0 or step in self.kept


def facts(config: RunConfig, plan: Plan, model, dataset, probe_data=None) -> dict[str, Any]:
  """Returns what run.json holds about the run's size: steps, data, parameters, FLOPs."""
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
