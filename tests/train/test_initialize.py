"""First states: the parent's function survives upcycling, its slots go where they belong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.checkpoints import native
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import initialize, optimizer, parallel, settings
from moejax.train.initialize import InitConfig

E = 4
EVERYONE = dict(num_experts=E, capacity_factor=float(E), eval_capacity_factor=float(E),
                renormalize=True)   # C = S: every token is chosen by every expert
DENSE = {'vit': vit.config('tiny'), 't5': t5.config('tiny')}
SPARSE = {
    'vit': vit.config('tiny', moe=MoEConfig(layers='last_1', **EVERYONE)),
    't5': t5.config('tiny', encoder_moe=MoEConfig(layers='every_2', **EVERYONE),
                    decoder_moe=MoEConfig(layers='every_2', router='top_k', **EVERYONE)),
}
STEP = 7


def run_config(model, **init):
  return settings.RunConfig(model=model, data=DataConfig(batch_size=8, eval_batch_size=8),
                            init=InitConfig(**init))


def one_device():
  return parallel.make('mesh', MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module', params=DENSE)
def parent(request, tmp_path_factory):
  """(family, workdir, state) of a dense run with optimizer slots that are not zero."""
  family = request.param
  workdir = tmp_path_factory.mktemp(family)
  config = run_config(DENSE[family])
  state, _ = initialize.first_state(config, models.build(config.model), one_device(), None)
  rng = np.random.default_rng(0)
  noisy = lambda x: jnp.asarray(x + rng.normal(size=x.shape) if x.dtype == jnp.float32 else x + 3,
                                x.dtype)
  state = dataclasses.replace(state, step=jnp.int32(STEP),
                              params=jax.tree.map(noisy, state.params),
                              opt_state=jax.tree.map(noisy, state.opt_state))
  with_writer(workdir, STEP, state.as_dict())
  (workdir / 'config.json').write_text(settings.to_json(config))
  (workdir / 'run.json').write_text(json.dumps({'trunk_step': STEP}))
  return family, str(workdir), jax.device_get(state)


def with_writer(workdir, step, tree):
  writer = native.Writer(workdir, 1)
  writer.save(step, tree, {})
  writer.close()


def batch(config):
  rng = np.random.default_rng(1)
  index = np.arange(8, dtype=np.int32)
  if config.family == 'vit':
    return {'image': rng.normal(size=(8, 8, 8, 1)).astype(np.float32), 'index': index,
            'label': np.zeros(8, np.int32), 'weight': np.ones(8, np.float32)}
  tokens = rng.integers(1, 60, (8, 12)).astype(np.int32)
  tokens[2, 5:] = 0
  return {'encoder_input': tokens, 'decoder_input': tokens[:, :6], 'target': tokens[:, 1:7],
          'weight': (tokens[:, 1:7] > 0).astype(np.float32), 'index': index}


def child_state(parent, **init):
  family, workdir, _ = parent
  config = run_config(SPARSE[family], mode='upcycle', parent=workdir, **init)
  model = models.build(config.model)
  state, receipt = initialize.first_state(config, model, one_device(),
                                          initialize.open_parent(config.init))
  return model, jax.device_get(state), receipt


def test_an_upcycled_model_is_its_parent(parent):
  family, _, dense = parent
  sparse, state, _ = child_state(parent)
  x = batch(DENSE[family])
  expected, _ = models.build(DENSE[family]).apply(dense.params, x)
  logits, aux = sparse.apply(state.params, x)
  assert len(aux) == (2 if family == 't5' else 1)
  assert all(layer['unchosen'] == 0 and layer['dropped'] == 0 for layer in aux.values())
  real = x['weight'] > 0
  expected, logits = np.asarray(expected)[real], np.asarray(logits)[real]
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_every_leaf_has_its_fate(parent):
  family, _, dense = parent
  _, state, receipt = child_state(parent, optimizer='carry')
  assert state.step == STEP
  old = trees.flatten({'params': dense.params, 'opt_state': dense.opt_state})
  fates = {e.target: e for e in receipt.entries}
  routers = 0
  for path, leaf in trees.flatten({'params': state.params, 'opt_state': state.opt_state}).items():
    if '/moe/experts/' in path:
      source = path.replace('/moe/experts/', '/mlp/')
      assert fates[path].fate == 'tiled' and fates[path].sources == (source,)
      for e in range(E):
        np.testing.assert_array_equal(leaf[e], old[source], err_msg=path)
    elif '/moe/router/' in path:
      assert fates[path].fate == 'fresh'
      if path.startswith('opt_state'):
        assert not np.any(leaf)
      else:
        routers += 1
        assert 0.01 < leaf.std() < 0.03   # N(0, 0.02)
    else:
      assert fates[path].fate == 'copied'
      np.testing.assert_array_equal(leaf, old[path], err_msg=path)
  assert routers == (2 if family == 't5' else 1)


def test_a_reset_optimizer_starts_from_zero(parent):
  _, state, receipt = child_state(parent, optimizer='reset')
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
  assert receipt.counts['dropped']['leaves'] > 0


def test_the_router_moves_at_most_lr_in_its_first_update(parent):
  model, state, _ = child_state(parent, optimizer='carry')
  config = optimizer.OptimizerConfig(weight_decay=0.0)
  grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), state.params)
  params, _ = optimizer.update(config, grads, state.opt_state, state.params, 0.01)
  before, after = trees.flatten(state.params), trees.flatten(params)
  for path in before:
    if path.endswith('router/kernel'):
      moved = np.abs(after[path] - before[path]).max()
      assert 0.009 < moved <= 0.01 * (1 + 1e-4)


def test_surgery_lands_in_the_shardings_of_a_mesh(parent):
  family, workdir, _ = parent
  config = run_config(SPARSE[family], mode='upcycle', parent=workdir)
  model = models.build(config.model)
  where = parallel.make('mesh', MeshConfig(data=1, expert=4, model=2))
  state, _ = initialize.first_state(config, model, where, initialize.open_parent(config.init))
  expected = child_state(parent)[1]
  wanted = initialize.state_shapes(config, model, where)
  for path, leaf in trees.flatten(state.params).items():
    assert leaf.sharding == trees.flatten(wanted.params)[path].sharding, path
    if '/experts/' in path:
      assert leaf.addressable_shards[0].data.shape[0] == 1   # one of the four experts
    np.testing.assert_array_equal(leaf, trees.flatten(expected.params)[path])


def test_continuing_copies_everything(parent):
  family, workdir, dense = parent
  config = run_config(DENSE[family], mode='continue', parent=workdir)
  state, receipt = initialize.first_state(config, models.build(config.model), one_device(),
                                          initialize.open_parent(config.init))
  assert set(receipt.counts) == {'copied'}
  for part in ('params', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(dense, part), getattr(state, part))


def test_a_parent_that_does_not_fit(parent):
  family, workdir, _ = parent
  wider = dataclasses.replace(SPARSE[family], d_ff=64)
  config = run_config(wider, mode='upcycle', parent=workdir)
  with pytest.raises(ConfigError, match=r'mlp/wi.*16, ?32|16x32'):
    initialize.first_state(config, models.build(wider), one_device(),
                           initialize.open_parent(config.init))


def test_missing_checkpoints(parent, tmp_path):
  _, workdir, _ = parent
  with pytest.raises(ConfigError, match='config.init.parent.*Train the parent first'):
    initialize.open_parent(InitConfig(mode='upcycle', parent=str(tmp_path / 'none')))
  with pytest.raises(ConfigError, match='got 5, allowed: 7'):
    initialize.open_parent(InitConfig(mode='upcycle', parent=workdir, step=5))
