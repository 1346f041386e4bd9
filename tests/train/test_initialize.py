"""First states: the parent's function survives upcycling, its slots go where they belong."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.surgery.config import InitConfig
from moejax.train import config as settings
from moejax.train import initialize, optimizer, parallel
from tests.train import small

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


ONLY_VIT, ONLY_T5 = (pytest.mark.parametrize('parent', [family], indirect=True)
                     for family in DENSE)


def with_writer(workdir, step, tree, keep=1):
  writer = orbax.Writer(workdir, keep)
  writer.save(step, tree)
  writer.close()


def batch(config):
  if config.family == 'vit':
    return small.images(8)
  tokens = np.random.default_rng(1).integers(1, 60, (8, 12)).astype(np.int32)
  tokens[2, 5:] = 0
  return {'encoder_input': tokens, 'decoder_input': tokens[:, :6], 'target': tokens[:, 1:7],
          'weight': (tokens[:, 1:7] > 0).astype(np.float32),
          'index': np.arange(8, dtype=np.int32)}


def child_state(parent, model=None, where=None, mode='upcycle', **init):
  family, workdir, _ = parent
  config = run_config(model or SPARSE[family], mode=mode, parent=workdir, **init)
  model = models.build(config.model)
  state, receipt = initialize.first_state(config, model, where or one_device(),
                                          initialize.open_parent(config.init))
  return model, jax.device_get(state), receipt


@pytest.fixture(scope='module')
def child(parent):
  """(model, state, receipt) of the parent, upcycled with its optimizer state."""
  return child_state(parent, optimizer='carry')


def with_moe(family, **changes):
  """The sparse model of a family with other MoE settings."""
  model = SPARSE[family]
  names = ('moe',) if family == 'vit' else ('encoder_moe', 'decoder_moe')
  return dataclasses.replace(model, **{
      name: dataclasses.replace(getattr(model, name), **changes) for name in names})


def flat(state):
  return trees.flatten({'params': state.params, 'opt_state': state.opt_state})


def check_same_function(family, dense, model, state):
  """The child's logits are the parent's."""
  x = batch(DENSE[family])
  expected, _ = jax.jit(models.build(DENSE[family]).apply)(dense.params, x)
  logits, aux = jax.jit(model.apply)(state.params, x)
  assert len(aux) == (2 if family == 't5' else 1)
  assert all(layer['unchosen'] == 0 and layer['dropped'] == 0 for layer in aux.values())
  real = x['weight'] > 0
  expected, logits = np.asarray(expected)[real], np.asarray(logits)[real]
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_an_upcycled_model_is_its_parent(parent, child):
  family, _, dense = parent
  sparse, state, _ = child
  check_same_function(family, dense, sparse, state)


def test_virtual_groups_are_their_parent(parent):
  """Eight experts of half the width in groups of two, wo scaled: the layer's own k and weights."""
  family, _, dense = parent
  model = with_moe(family, router='top_k', k=4, granularity=2, num_experts=8,
                   capacity_factor=8.0, eval_capacity_factor=8.0)
  sparse, state, receipt = child_state(parent, model, scaling='output')
  check_same_function(family, dense, sparse, state)
  fates = {e.target: e.fate for e in receipt.entries}
  for path, leaf in flat(state).items():
    if path.endswith('router/kernel'):
      np.testing.assert_array_equal(leaf[:, ::2], leaf[:, 1::2])   # the two of a group tie
      assert len(np.unique(leaf[0])) == 4
    if path.endswith('experts/wo'):
      assert fates[path] == 'sharded, scaled'
  with pytest.raises(ConfigError, match="init.scaling: got 'all', allowed: 'none' in encoder"):
    child_state(parent, dataclasses.replace(
        model, **{n: dataclasses.replace(getattr(model, n), router='top_p')
                  for n in ('moe', 'encoder_moe') if hasattr(model, n)}), scaling='all')


def test_gates_are_the_configs():
  """What surgery is told of the routers, T being what their weights sum to."""
  for moe, total in ((MoEConfig(router='top_k', k=2, num_experts=8), 2 / 8),
                     (MoEConfig(router='top_k', k=2, renormalize=True, weight_scale=2.5), 2.5),
                     (MoEConfig(router='top_k', k=2, score='sigmoid'), 1.0),
                     (MoEConfig(router='top_k', k=2, score='softmax_of_chosen'), 1.0),
                     (MoEConfig(capacity_factor=3.0), 3 / 8), (MoEConfig(renormalize=True), 1.0)):
    model = vit.config('tiny', activation='squared_relu', moe=moe)
    init = initialize.expert_settings(run_config(model))
    assert init.gates['encoder'].total(8) == pytest.approx(total)
    assert init.gates['encoder'].multiple == (moe.router == 'top_k')
    assert moe.router != 'top_k' or init.gates['encoder'].key == 'config.model.moe.k'
    assert init.squared
  model = t5.config('tiny', decoder_moe=MoEConfig(router='top_p'))
  run = dataclasses.replace(run_config(model), seed=5)
  init = initialize.expert_settings(run)
  assert set(init.gates) == {'encoder'} and not init.squared and init.seed == 5


def test_fresh_experts_are_the_models_own_on_any_mesh(parent):
  """One key each, and that of the expert wherever it lives; their slots start from nothing."""
  init = {'vit': dict(experts='random'), 't5': dict(experts='subset', copied_experts=2)}[parent[0]]
  copies = init.get('copied_experts', 0)
  where = parallel.make('mesh', MeshConfig(data=1, expert=4, model=2))
  _, state, receipt = child_state(parent, **init)
  one, eight = flat(state), flat(child_state(parent, where=where, **init)[1])
  for path, leaf in one.items():
    # What truncated normal draws go through is rounded differently in pieces of another size.
    np.testing.assert_allclose(leaf, eight[path], rtol=0, atol=2e-7 if '/experts/' in path else 0)
    if not path.startswith('params') or '/experts/' not in path or path.endswith('_bias'):
      continue
    old = trees.flatten({'params': parent[2].params})[path.replace('/moe/experts/', '/mlp/')]
    same = [np.array_equal(leaf[e], old) for e in range(E)]
    assert same == [e < copies for e in range(E)]
    assert not any(np.isclose(leaf[-1], leaf[e]).all() for e in range(E - 1))
    fan = leaf.shape[1] if parent[0] == 't5' else sum(leaf.shape[1:]) / 2
    np.testing.assert_allclose(leaf[-1].std(), fan ** -0.5, rtol=0.15)
    slot = path.replace('params/', 'opt_state/')
    np.testing.assert_array_equal(one[f'{slot}/count'], [3] * copies + [0] * (E - copies))
    assert not one[f'{slot}/mu'][copies:].any() and not one[f'{slot}/nu'][copies:].any()
  assert receipt.about['experts'] == init['experts']


@ONLY_T5
def test_depth_tiling(parent):
  family, _, dense = parent
  depth = ('num_layers',) if family == 'vit' else ('encoder_layers', 'decoder_layers')
  deeper = dataclasses.replace(DENSE[family], **{name: 4 for name in depth})
  _, state, receipt = child_state(parent, deeper, mode='depth_tile', tiling='layer')
  old = flat(dense)
  for path, leaf in flat(state).items():
    for new in range(4):
      path = path.replace(f'/layers/{new:02d}/', f'/layers/=0{new // 2}/')
    np.testing.assert_array_equal(leaf, old[path.replace('=', '')], err_msg=path)
  assert set(receipt.counts) == {'copied', 'repeated'}
  assert receipt.about['tiling'] == 'layer' and 'experts' not in receipt.about
  with pytest.raises(ConfigError, match="allowed: a model with more blocks than the parent"):
    child_state(parent, DENSE[family], mode='depth_tile')


@pytest.mark.parametrize('mode', ['continue', 'upcycle'])
def test_a_new_head(parent, mode):
  family, _, dense = parent
  base = {'continue': DENSE, 'upcycle': SPARSE}[mode][family]
  other = dataclasses.replace(base, **({'num_classes': 3} if family == 'vit' else {}))
  _, state, receipt = child_state(parent, other, mode=mode, new_head=True)
  old = flat(dense)
  heads = 0
  for path, leaf in flat(state).items():
    if path.startswith('params/head/kernel'):
      heads += 1
      assert family == 't5' or leaf.shape == (16, 3)
      np.testing.assert_allclose(leaf.std(), 16 ** -0.5, rtol=0.15)
    elif path.startswith('opt_state/head/'):
      assert not np.any(leaf)
    elif '/moe/' not in path and '/head/' not in path:
      np.testing.assert_array_equal(leaf, old[path])
  assert heads == 1 and receipt.about['new_head'] is True
  if family == 'vit':
    with pytest.raises(ConfigError, match=r'copy params/head/kernel \(16, 10\)'):
      child_state(parent, other, mode=mode)


@pytest.mark.parametrize('init, message', [
    (dict(mode='continue', experts='random'), "init.experts: got 'random', allowed: 'copy' with"),
    (dict(mode='depth_tile', new_head=True), "init.new_head: got True, allowed: False with"),
    (dict(mode='upcycle', tiling='layer'), "init.tiling: got 'layer', allowed: 'stack' with"),
    (dict(mode='upcycled'), "init.mode: got 'upcycled'.*Did you mean 'upcycle'"),
    (dict(mode='scratch'), "init.parent: got 'somewhere', allowed: empty for scratch"),
])
def test_settings_that_do_not_go_together(init, message):
  with pytest.raises(ConfigError, match=message):
    InitConfig(parent='somewhere', **init)


@ONLY_VIT
def test_the_receipt_says_how(parent):
  about = child_state(parent, experts='drop', reinit_fraction=0.25)[2].about
  assert about == dict(mode='upcycle', parent=parent[1], step=STEP, optimizer='carry',
                       experts='drop', copied_experts=0, noise_std=0.0, reinit_fraction=0.25,
                       scaling='none', new_head=False, seed=0)


def test_every_leaf_has_its_fate(parent, child):
  family, _, dense = parent
  _, state, receipt = child
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


@ONLY_VIT
def test_a_reset_optimizer_starts_from_zero(parent):
  _, state, receipt = child_state(parent, optimizer='reset')
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
  assert receipt.counts['dropped']['leaves'] > 0


@ONLY_T5
def test_the_router_moves_at_most_lr_in_its_first_update(child):
  _, state, _ = child
  config = optimizer.OptimizerConfig(weight_decay=0.0)
  grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), state.params)
  update = jax.jit(functools.partial(optimizer.update, config))
  params, _ = update(grads, state.opt_state, state.params, 0.01)
  before, after = trees.flatten(state.params), trees.flatten(params)
  for path in before:
    if path.endswith('router/kernel'):
      moved = np.abs(after[path] - before[path]).max()
      assert 0.009 < moved <= 0.01 * (1 + 1e-4)


@ONLY_T5
def test_surgery_lands_in_the_shardings_of_a_mesh(parent, child):
  family, workdir, _ = parent
  config = run_config(SPARSE[family], mode='upcycle', parent=workdir)
  model = models.build(config.model)
  where = parallel.make('mesh', MeshConfig(data=1, expert=4, model=2))
  state, _ = initialize.first_state(config, model, where, initialize.open_parent(config.init))
  expected = child[1]
  wanted = initialize.state_shapes(config, model, where)
  for path, leaf in trees.flatten(state.params).items():
    assert leaf.sharding == trees.flatten(wanted.params)[path].sharding, path
    if '/experts/' in path:
      assert leaf.addressable_shards[0].data.shape[0] == 1   # one of the four experts
    np.testing.assert_array_equal(leaf, trees.flatten(expected.params)[path])


@ONLY_VIT
def test_continuing_copies_everything(parent):
  family, workdir, dense = parent
  config = run_config(DENSE[family], mode='continue', parent=workdir)
  state, receipt = initialize.first_state(config, models.build(config.model), one_device(),
                                          initialize.open_parent(config.init))
  assert set(receipt.counts) == {'copied'}
  for part in ('params', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(dense, part), getattr(state, part))


@ONLY_VIT
def test_a_parent_that_does_not_fit(parent):
  family, workdir, _ = parent
  wider = dataclasses.replace(SPARSE[family], d_ff=64)
  config = run_config(wider, mode='upcycle', parent=workdir)
  with pytest.raises(ConfigError, match=r'mlp/wi.*16, ?32|16x32'):
    initialize.first_state(config, models.build(wider), one_device(),
                           initialize.open_parent(config.init))


@ONLY_VIT
def test_missing_checkpoints(parent, tmp_path):
  _, workdir, _ = parent
  with pytest.raises(ConfigError, match='config.init.parent.*Train that run first'):
    initialize.open_parent(InitConfig(mode='upcycle', parent=str(tmp_path / 'none')))
  two = tmp_path / 'two'
  shutil.copytree(workdir, two)
  with_writer(two, 9, {'params': {'w': np.zeros(2)}}, keep=2)
  with pytest.raises(ConfigError, match=f'^config.init.step: got 5, allowed: 7, 9: the checkpoints '
                     rf'of {two}. Choose one of them, -1 \(its trunk\) or -2 \(its end\)'):
    initialize.open_parent(InitConfig(mode='upcycle', parent=str(two), step=5))


@pytest.mark.parametrize('changes, named', [
  ({'num_heads': 1}, 'config.model.num_heads: got 1, allowed: 2, as in '),
  ({'activation': 'relu'}, "config.model.activation: got 'relu', allowed: 'gelu_"),
])
def test_a_parent_that_computes_something_else(parent, changes, named):
  """Shapes do not show it."""
  family, workdir, _ = parent
  theirs = {'model': dataclasses.asdict(dataclasses.replace(DENSE[family], num_heads=2))}
  other = dataclasses.replace(SPARSE[family], **({'num_heads': 2} | changes))
  config = run_config(other, mode='upcycle', parent=workdir)
  with pytest.raises(ConfigError, match=named):
    initialize.check_model(config, initialize.Parent(None, theirs, {}))


def test_sparse_layers_depth_and_a_new_head_may_differ_from_the_parent(parent):
  family, workdir, _ = parent
  theirs = initialize.Parent(None, {'model': dataclasses.asdict(DENSE[family])}, {})
  initialize.check_model(run_config(SPARSE[family], mode='upcycle', parent=workdir), theirs)
  depth = 'num_layers' if family == 'vit' else 'encoder_layers'
  deeper = dataclasses.replace(DENSE[family], **{depth: 2 * getattr(DENSE[family], depth)})
  initialize.check_model(run_config(deeper, mode='depth_tile', parent=workdir), theirs)
  with pytest.raises(ConfigError, match=f'config.model.{depth}'):
    initialize.check_model(run_config(deeper, mode='continue', parent=workdir), theirs)
  if family == 'vit':
    other = dataclasses.replace(DENSE[family], num_classes=3)
    initialize.check_model(
        run_config(other, mode='continue', new_head=True, parent=workdir), theirs)
    with pytest.raises(ConfigError, match='config.model.num_classes'):
      initialize.check_model(run_config(other, mode='continue', parent=workdir), theirs)


@ONLY_VIT
def test_a_parent_stopped_before_its_trunk(parent, tmp_path):
  _, workdir, _ = parent
  other = tmp_path / 'other'
  shutil.copytree(workdir, other)
  run = json.loads((other / 'run.json').read_text())
  (other / 'run.json').write_text(json.dumps(run | {'trunk_step': 3996}))
  init = InitConfig(mode='upcycle', parent=str(other))
  with pytest.raises(ConfigError, match='config.init.parent.*trunk_step, 3996.*are of steps 7'):
    initialize.open_parent(init)
