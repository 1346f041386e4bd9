"""When something is due, and what run.json holds about a run's size."""

import dataclasses
import types

import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.models import vit
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import plan
from moejax.train.schedule import ScheduleConfig


def due(method):
  return [step for step in range(8, 18) if method(step)]


def test_due_dates_are_in_global_steps():
  """A run of 10 steps after a parent's 7, cooling down over the last 4."""
  config = run_config.RunConfig(steps=10, log_every=3, eval_every=6, checkpoint_every=6,
                              schedule=ScheduleConfig(cooldown_steps=4))
  made = plan.Plan.make(config, first=7)
  assert (made.first, made.trunk, made.end) == (7, 13, 17)
  assert due(made.log_due) == [9, 12, 15, 17]
  assert due(made.eval_due) == [12, 17]
  assert due(made.save_due) == [12, 13, 17]    # 13 is the trunk


def test_branch_points_are_kept_beside_trunk_and_end():
  """Steps 3 and 5 of a run of 10 after a parent's 7 whose last 4 cool down."""
  config = run_config.RunConfig(steps=10, branch_steps=(3, 5), log_every=4, eval_every=8,
                              checkpoint_every=8, schedule=ScheduleConfig(cooldown_steps=4))
  made = plan.Plan.make(config, first=7)
  assert made.branches == (10, 12)
  assert made.kept == {10, 12, 13, 17}
  assert due(made.save_due) == [8, 10, 12, 13, 16, 17]
  assert due(made.log_due) == [8, 12, 16, 17]   # a window is not cut off for a branch
  assert plan.Plan.make(dataclasses.replace(config, branch_steps=(6,)), 7).kept == {13, 17}


@pytest.mark.parametrize('step', [0, -1, 7, 10, 2.5])
def test_branches_leave_the_trunk_before_its_cooldown(step):
  with pytest.raises(ConfigError, match=r'branch_steps: got \(3, .*, allowed: .* from 1 to 6,'):
    run_config.RunConfig(steps=10, branch_steps=(3, step),
                       schedule=ScheduleConfig(cooldown_steps=4))


def test_a_call_of_several_steps_begins_where_the_run_is_resumed():
  config = run_config.RunConfig(steps=200, log_every=50, eval_every=50, checkpoint_every=50)
  assert plan.Plan.make(config, 0).whole == plan.Plan.make(config, 0, 150).whole == 50
  assert plan.Plan.make(config, 0, 25).whole == 25
  assert plan.Plan.make(config, 0, 7).whole == 1


def test_facts():
  config = run_config.RunConfig(
      model=vit.config('tiny', moe=MoEConfig(layers='1', num_experts=4)), steps=10,
      schedule=ScheduleConfig(cooldown_steps=4))
  images = types.SimpleNamespace(fingerprint='f', encoder_length=0, decoder_length=0)
  model = models.build(config.model)
  found = plan.facts(config, plan.Plan.make(config, 7), model, images)
  assert (found['first_step'], found['trunk_step'], found['end_step']) == (7, 13, 17)
  assert found['data_fingerprint'] == 'f'
  # An expert has 16*32 + 32 + 32*16 + 16 = 1072 parameters. Expert choice with capacity factor 2
  # gives a token 2 of the 4 experts on average: the other 2 are not active.
  assert found['parameters'] - found['parameters_active_per_token'] == 2 * 1072
  assert found['train_flops_per_step'] > 0
  # Embeddings 3, last norm 2, head 2; a block 4 (norms) + 8 (attention), its MLP 4, its MoE 5.
  assert found['leaves'] == 7 + 2 * 12 + 4 + 5
