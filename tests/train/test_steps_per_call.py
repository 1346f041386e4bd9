"""Several train steps in one call: runs, their logs and checkpoints stay what they were."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from moejax import flops
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.moe.config import MoEConfig
from moejax.train import compiled, loop, metrics, parallel
from moejax.train.plan import Plan
from moejax.train.step import join_batches, split
from tests.train import small

MOE = MoEConfig(layers='0', num_experts=4, router='top_k', balance_weight=0.02, bias_rate=0.01)
STEPS = 20


def config(**changes):
  return small.digits(MOE, **{
      'steps': STEPS, 'schedule.cooldown_steps': 10, 'log_every': 10, 'eval_every': 20,
      'checkpoint_every': 10, 'model.dropout_rate': 0.1, **changes})


@pytest.fixture
def four_devices(monkeypatch):
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:4]))


@pytest.mark.parametrize('devices, steps', [(1, 1), (1, 5), (4, 3)])
def test_batches_are_cut_again_as_they_were_joined_on_each_device(devices, steps):
  batches = [{'x': np.arange(8 * 3).reshape(8, 3) + 100 * n, 'y': np.arange(8) + 100 * n}
             for n in range(steps)]
  again = split(join_batches(batches, 8 // devices), steps, 8 // devices)
  for n in range(steps):
    jax.tree.map(np.testing.assert_array_equal, {k: x[n] for k, x in again.items()}, batches[n])
  ones = join_batches(batches, 8 // devices)['y'].reshape(devices, -1)[-1]   # of the last device
  own = np.arange(8 - 8 // devices, 8)
  np.testing.assert_array_equal(ones, np.concatenate([own + 100 * n for n in range(steps)]))


def test_a_run_is_the_same_however_its_steps_are_called(tmp_path, four_devices):
  one, five = tmp_path / '1', tmp_path / '5'
  for path in (one, five):
    run = config(steps_per_call=int(path.name),
                 **{'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 2})
    assert loop.run(run, str(path)) == 0
  lines = [metrics.read_lines(path / 'metrics.jsonl') for path in (one, five)]
  assert len(lines[0]) == len(lines[1]) and len(lines[0]) > 3
  for a, b in zip(*lines):
    assert a.keys() == b.keys() and a['step'] == b['step']
    for name, value in a.items():
      assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (a['step'], name)
  first = [next(x['train/loss'] for x in found if 'train/loss' in x) for found in lines]
  assert first[1] == pytest.approx(first[0], rel=1e-5)
  a, b = (orbax.Reader(path, STEPS) for path in (one, five))
  assert a.shapes.keys() == b.shapes.keys()
  assert b.read('step') == STEPS
  timed = metrics.read_lines(five / 'timing.jsonl')
  assert sum(x['steps'] for x in timed) == STEPS - 5   # all but the first call


@pytest.mark.parametrize('changes, whole', [
    ({}, 10), ({'schedule.cooldown_steps': 8}, 2), ({'branch_steps': (5,)}, 5)])
def test_what_falls_due_in_the_middle_is_refused(changes, whole):
  run = config(steps_per_call=whole, **changes)
  assert Plan.make(run, 0).end == STEPS
  run = config(steps_per_call=3, **changes)
  with pytest.raises(ConfigError, match=rf'steps_per_call: got 3, .*a divisor of {whole}\b'):
    Plan.make(run, 0)


class On:
  """Devices by their platform alone."""

  def __init__(self, platform, shards):
    device = types.SimpleNamespace(platform=platform)
    self.mesh = types.SimpleNamespace(devices=np.array([device] * shards))
    self.shards = shards


@pytest.mark.parametrize('platform, shards, small, wanted', [
    ('gpu', 1, 1e12, 10), ('tpu', 1, 1e12, 10), ('cpu', 1, 1e12, 1),
    ('gpu', 1, 0.9, 1), ('gpu', 2, 0.6, 10)])
def test_short_steps_go_together_unless_the_config_says_how_many(
    platform, shards, small, wanted, monkeypatch):
  run = config()
  assert run.steps_per_call == 0
  plan = Plan.make(run, 0)
  if small < 1:   # as a part of what the step has
    small *= flops.train_step_flops(run.model, run.data.batch_size)
  monkeypatch.setattr(compiled, 'SMALL', small)
  chosen = lambda run: compiled.steps_per_call(run, plan, On(platform, shards))
  assert chosen(run) == wanted
  monkeypatch.setattr(compiled, 'MOST', 9)
  assert chosen(run) == min(wanted, 5)
  assert chosen(dataclasses.replace(run, steps_per_call=2)) == 2
  task = dataclasses.replace(run.task, teacher='x', distill_weight=0.5)
  taught = dataclasses.replace(run, task=task)
  assert chosen(taught) == 1   # or its logits would be there for all steps at once
