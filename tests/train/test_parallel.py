"""One device, pmap and every mesh axis take the same step, whatever else changes how it runs.

Several options meet here, with what they might upset together: noise, dropout and random second
choices, whose keys are those of examples; a bias that the step moves; optimizer state that is
factored and stacked; and a teacher, whose logits are cut with the batch. Runs with and without an
option are compared in test_scan and test_steps_per_call, remat alone in models/test_scan.
"""

import dataclasses
import functools
import json
import types

import jax
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.losses import TaskConfig
from moejax.models import t5, vit
from moejax.models.scan import Execution
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import initialize, parallel
from moejax.train.compiled import Programs
from moejax.train.optimizer import AdafactorConfig, OptimizerConfig
from moejax.train.plan import Plan
from moejax.train.step import join_batches
from moejax.train.validate import without_data
from tests.models.helpers import random_params

B, GROUP, STEPS = 16, 2, 2   # examples, examples of a routing group, steps
SPARSE = MoEConfig(layers='every_1', num_experts=4, router='top_k')
TEXT = run_config.RunConfig(
    model=t5.config(
        'tiny', dropout_rate=0.1, decoder_layers=1,
        encoder_moe=dataclasses.replace(SPARSE, router='expert_choice', renormalize=True,
                                        jitter=0.05, group_size=GROUP * 12),
        decoder_moe=dataclasses.replace(SPARSE, learned_noise=True, second_threshold=0.5,
                                        bias_rate=0.01, balance_weight=0.02, group_size=GROUP * 6,
                                        capacity_factor=1.25)),
    optimizer=OptimizerConfig(name='adafactor', adafactor=AdafactorConfig(
        min_dim_size_to_factor=8)))
IMAGES = run_config.RunConfig(
    model=vit.config('tiny', dropout_rate=0.1, moe=dataclasses.replace(
        SPARSE, dispatch='grouped', noise_std=1.0, shared_experts=1,
        balance_weight=0.02, group_size=GROUP * 4)),
    optimizer=OptimizerConfig(eps=1e-4, weight_decay=0.1),
    task=TaskConfig(teacher='runs/x', distill_weight=0.5))
RUNS = {name: dataclasses.replace(
    run, steps=STEPS, log_every=STEPS, eval_every=STEPS, checkpoint_every=STEPS,
    data=DataConfig(batch_size=B, eval_batch_size=B)) for name, run in (
        ('text', TEXT), ('images', IMAGES))}
SPLIT = MeshConfig(data=1, fsdp=2, expert=2, model=2)
OPTIONS = {   # run, devices, and the settings that change nothing
    # A scan in a scan over microbatches in one over steps, all inside pmap.
    'text, pmap': ('text', 4, {'parallel': 'pmap', 'execution': Execution(True, 'full'),
                               'microbatches': 2, 'steps_per_call': 2}),
    # Of stacked blocks the results of all-to-alls are kept, of one-hot dispatch.
    'text, all axes': ('text', 8, {'mesh': SPLIT, 'execution': Execution(True, 'sent'),
                                   'microbatches': 2, 'dispatch': 'einsum'}),
    # Dropless experts and a teacher under pmap.
    'images, pmap': ('images', 4, {'parallel': 'pmap', 'execution': Execution(False, 'sent'),
                                   'microbatches': 2}),
    # As well where the devices of `model` share a group, and logits for two steps at once.
    'images, fsdp x model': ('images', 4, {
        'mesh': MeshConfig(data=1, fsdp=2, model=2), 'execution': Execution(True, 'dots'),
        'steps_per_call': 2}),
}



def batch(config, seed):
  """Examples with unequal numbers of real tokens, and fillers, on each device."""
  rng = np.random.default_rng(seed)
  index = np.arange(B, dtype=np.int32)
  real = (index < B - 3).astype(np.float32)
  if config.family == 'vit':
    return {'image': rng.normal(size=(B, 8, 8, 1)).astype(np.float32),
            'label': rng.integers(0, 10, B).astype(np.int32), 'weight': real, 'index': index}
  source = rng.integers(1, 60, (B, 12)) * (np.arange(12) < rng.integers(4, 13, (B, 1)))
  target = rng.integers(1, 60, (B, 6)) * (np.arange(6) < rng.integers(1, 7, (B, 1)))
  source, target = (x * real[:, None].astype(int) for x in (source, target))
  shifted = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
  return {'encoder_input': source.astype(np.int32), 'decoder_input': shifted.astype(np.int32),
          'target': target.astype(np.int32), 'weight': (target > 0).astype(np.float32),
          'index': index}


@pytest.fixture(autouse=True, scope='module')
def teacher():
  """The run 'runs/x', of which there is nothing but a config."""
  with pytest.MonkeyPatch.context() as patch:
    its = json.loads(run_config.to_json(run_config.RunConfig(model=vit.config('tiny'))))
    patch.setattr(initialize, 'open_run', lambda *args: types.SimpleNamespace(config=its))
    yield


def with_options(run, changes):
  """The run with some options changed; 'dispatch' is that of all its sparse blocks."""
  changes = dict(changes)
  if way := changes.pop('dispatch', None):
    moe = {name: dataclasses.replace(getattr(run.model, name), dispatch=way)
           for name in ('encoder_moe', 'decoder_moe')}
    changes['model'] = dataclasses.replace(run.model, **moe)
  return dataclasses.replace(run, **changes)


def train(config, devices):
  """Trains STEPS steps from the same parameters, whatever the run.

  Returns:
    [sums of all steps so far] after each call; parameters and optimizer state at the end, of
    single blocks.
  """
  where = parallel.make(config.parallel, config.mesh, jax.devices()[:devices])
  batches = [batch(config.model, n) for n in range(STEPS)]
  programs, seen = Programs(without_data(config, Plan.make(config, 0), where, batches[0])), []
  # Drawn here: `programs.first_state` takes as long to compile as the step. Moments begin as zeros.
  zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), programs.single)
  first = dataclasses.replace(zeros, params=random_params(programs.run.model.shapes))
  first = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), first, programs.single)
  state, teacher = first.relaid(programs.layout.stack), programs.teacher
  if teacher:
    teacher.params = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding),
                                  random_params(teacher.shapes, seed=1), teacher.shapes)
  for n in range(0, STEPS, programs.steps):
    given = where.put(join_batches(batches[n:n + programs.steps], programs.examples_per_device))
    state, _ = programs.train(state, teacher(given) if teacher else given)
    seen.append(trees.flatten(jax.device_get(state.window)))
  single = programs.layout.unstack({'params': state.params, 'opt_state': state.opt_state})
  return seen, trees.flatten(jax.device_get(single))


@functools.cache
def plain(name):
  return train(RUNS[name], 1)


@pytest.mark.parametrize('options', OPTIONS)
def test_agrees_with_one_device(options):
  name, devices, changes = OPTIONS[options]
  seen, last = plain(name)
  found, again = train(with_options(RUNS[name], changes), devices)
  assert len(found) == STEPS // changes.get('steps_per_call', 1)
  for expected, sums in zip(reversed(seen), reversed(found)):
    assert sums.keys() == expected.keys()
    for path, value in expected.items():
      exact = path.endswith(('load', 'dropped', 'unchosen', 'single', 'assigned', 'tokens'))
      np.testing.assert_allclose(sums[path], value, rtol=0 if exact else 1e-5,
                                 atol=0 if exact else 1e-6, err_msg=path)   # the same routing
  assert again.keys() == last.keys()
  for path, leaf in last.items():
    if 'attention/k/bias' not in path:   # its true gradient is 0: what there is of it is rounding
      np.testing.assert_allclose(again[path], leaf, rtol=0, atol=1e-4 * np.abs(leaf).max() + 1e-9,
                                 err_msg=path)


def test_refusals():
  with pytest.raises(ConfigError, match='config.mesh.expert: got 2.*parallel=.mesh'):
    parallel.make('pmap', MeshConfig(expert=2))
  with pytest.raises(ConfigError, match='config.mesh: .*data=3.*8 devices'):
    parallel.make('mesh', MeshConfig(data=3))
  with pytest.raises(ConfigError, match="config.parallel: got 'pmp'.*pmap"):
    parallel.make('pmp', MeshConfig())
  too_few = MeshConfig(data=1, expert=8)
  where = parallel.make('mesh', too_few)
  with pytest.raises(ConfigError, match='config.mesh.expert: got 8.*divisor of the 4 experts'):
    where.init(models.build(IMAGES.model).init, jax.random.key(0))
