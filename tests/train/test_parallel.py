"""One device, pmap and every mesh axis take the same step: routing, loss, gradients, parameters."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import optimizer, parallel
from moejax.train.step import StepSettings, TrainState, make_train_step

B, ROWS = 16, 2
SGD = optimizer.OptimizerConfig(name='sgd', momentum=0.5, learning_rate=0.1)
EXPERT_CHOICE = MoEConfig(layers='last_1', num_experts=4, capacity_factor=1.5, group_size=8,
                          z_weight=1e-3)
WAYS = {   # config.parallel, config.mesh, devices
    'one': ('mesh', MeshConfig(), 1),
    'pmap': ('pmap', MeshConfig(), 4),
    'fsdp x expert x model': ('mesh', MeshConfig(data=1, fsdp=2, expert=2, model=2), 8),
}


def t5_config():
  """Expert choice in the encoder, top-2 in the decoder: both routers and both losses at once."""
  return t5.config(
      'tiny', dropout_rate=0.1,
      encoder_moe=dataclasses.replace(EXPERT_CHOICE, layers='1', group_size=2 * 12),
      decoder_moe=MoEConfig(layers='1', router='top_k', num_experts=4, capacity_factor=1.25,
                            group_size=2 * 6, balance_weight=0.02))


CONFIGS = {'vit': vit.config('tiny', dropout_rate=0.1, moe=EXPERT_CHOICE), 't5': t5_config()}


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


@functools.cache
def initial_params(config):
  return jax.device_get(jax.jit(models.build(config).init)(jax.random.key(0)))


@functools.lru_cache
def train(config, way, steps=3):
  """(first step's gradient, params after the last, sums of each step) of a few SGD steps."""
  name, mesh, devices = WAYS[way]
  where = parallel.make(name, mesh, jax.devices()[:devices])
  model = models.build(config)
  make = functools.partial(make_train_step, model, StepSettings(
      SGD, lambda step: jnp.float32(0.1), examples_per_group=ROWS))
  put = lambda tree: jax.tree.map(jax.device_put, tree, where.shardings(tree))
  params = initial_params(config)
  state = TrainState(jnp.int32(0), put(params), put(optimizer.init(SGD, params)),
                     jax.random.key_data(jax.random.key(1)), {})
  window = jax.eval_shape(make(), state, batch(config, 0))[0].window
  whole = lambda tree: jax.tree.map(
      lambda x: jax.device_put(np.asarray(x), where.replicated()), tree)
  zeros = lambda: whole(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), window))
  state = dataclasses.replace(state, step=whole(state.step), key=whole(state.key), window=zeros())
  step = where.jit_step(make(reduce=where.reduce), state)
  seen, gradient = [], None
  for n in range(steps):
    state, _ = step(state, where.put(batch(config, n)))
    seen.append(jax.device_get(state.window))
    if gradient is None:   # the momentum of the first step is its gradient
      gradient = jax.device_get(state.opt_state)
    state = dataclasses.replace(state, window=zeros())
  return gradient, jax.device_get(state.params), seen


def assert_same_leaves(a, b):
  """Within 1e-5 of each leaf's largest value."""
  a, b = trees.flatten(a), trees.flatten(b)
  for path in a:
    if re.search('attention/k/bias(/trace)?$', path):
      # The true gradient is 0, as softmax ignores a common shift; what is left is rounding.
      assert np.abs(b[path]).max() < 1e-8
      continue
    np.testing.assert_allclose(b[path], a[path], rtol=0, atol=1e-5 * np.abs(a[path]).max(),
                               err_msg=path)


@pytest.mark.parametrize('name, way', [('t5', 'pmap'), ('vit', 'fsdp x expert x model')])
def test_agrees_with_one_device(name, way):
  config = CONFIGS[name]
  gradient, last, seen = train(config, 'one')
  gradient_n, last_n, seen_n = train(config, way)
  for window, window_n in zip(seen, seen_n):
    flat, flat_n = trees.flatten(window), trees.flatten(window_n)
    assert flat.keys() == flat_n.keys()
    for path, value in flat.items():
      counts = path.endswith(('load', 'dropped', 'unchosen', 'single', 'assigned', 'tokens'))
      if counts:   # identical routing
        np.testing.assert_array_equal(flat_n[path], value, err_msg=path)
      else:
        np.testing.assert_allclose(flat_n[path], value, rtol=1e-5, atol=1e-7, err_msg=path)
  assert_same_leaves(gradient, gradient_n)
  assert_same_leaves(last, last_n)


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
    where.init(models.build(CONFIGS['vit']).init, jax.random.key(0))
