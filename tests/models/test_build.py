"""What holds of all models: published sizes, paths, random draws, dtypes, routing groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as config_lib
from moejax import models, trees
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from tests.models.helpers import batch, made

# transformers' google/t5-v1_1-* and timm's vit_*_patch*_224, counted.
T5_PARAMETERS = {'small': 76_961_152, 'base': 247_577_856, 'large': 783_150_080,
                 'xl': 2_849_757_184, 'xxl': 11_135_332_352}
VIT_PARAMETERS = {'S/32': 22_878_952, 'S/16': 22_050_664, 'B/32': 88_224_232, 'B/16': 86_567_656,
                  'L/32': 306_535_400, 'L/16': 304_326_632, 'H/14': 632_045_800}
MOE = MoEConfig(layers='1', num_experts=4, router='top_k')

DENSE, GAP = t5.config('tiny'), vit.config('tiny')
MODELS = {
    't5': DENSE, 'vit': GAP, 'cls': vit.config('tiny', head='cls'),
    'sparse t5': dataclasses.replace(
        DENSE, encoder_moe=MoEConfig(layers='1', num_experts=4),
        decoder_moe=MoEConfig(layers='0', num_experts=3, router='top_k', capacity_factor=9.0)),
    'sparse vit': dataclasses.replace(
        GAP, moe=MoEConfig(layers='last_1', num_experts=4, group_size=8))}


@pytest.mark.parametrize('size', t5.SIZES)
def test_t5_sizes(size):
  count = trees.count(models.build(t5.config(size)).shapes)
  assert count == T5_PARAMETERS.get(size, count) and (size in T5_PARAMETERS or count < 1e6)


@pytest.mark.parametrize('size', vit.SIZES)
def test_vit_sizes(size):
  count = trees.count(models.build(vit.config(size, head='cls')).shapes)
  assert count == VIT_PARAMETERS.get(size, count) and (size in VIT_PARAMETERS or count < 1e5)


def test_paths_of_a_sparse_t5():
  shapes = models.build(t5.config('tiny', encoder_moe=MOE, decoder_moe=MOE)).shapes
  flat = {p: s.shape for p, s in trees.flatten(shapes).items()}
  assert {p: s for p, s in flat.items() if not p.startswith('decoder/layers')} == {
      'token_embed/embedding': (64, 16), 'head/kernel': (16, 64),
      'encoder/relative_bias/embedding': (32, 2), 'decoder/relative_bias/embedding': (32, 2),
      'encoder/final_norm/scale': (16,), 'decoder/final_norm/scale': (16,),
      **{f'encoder/layers/{i}/attention/{n}/kernel': (16, 16)
         for i in ('00', '01') for n in 'qkvo'},
      **{f'encoder/layers/{i}/{n}/scale': (16,)
         for i in ('00', '01') for n in ('attention_norm', 'mlp_norm')},
      'encoder/layers/00/mlp/wi_gate': (16, 32), 'encoder/layers/00/mlp/wi_up': (16, 32),
      'encoder/layers/00/mlp/wo': (32, 16),
      'encoder/layers/01/moe/router/kernel': (16, 4),
      'encoder/layers/01/moe/experts/wi_gate': (4, 16, 32),
      'encoder/layers/01/moe/experts/wi_up': (4, 16, 32),
      'encoder/layers/01/moe/experts/wo': (4, 32, 16)}
  assert flat['decoder/layers/01/cross_attention/k/kernel'] == (16, 16)
  assert flat['decoder/layers/00/cross_attention_norm/scale'] == (16,)


@pytest.mark.parametrize('config', [
    t5.config('tiny', encoder_moe=MOE), vit.config('tiny', head='cls', moe=MOE)], ids=['t5', 'vit'])
def test_init_is_a_plain_float32_tree_of_the_promised_shapes(config):
  model = models.build(config)
  init = jax.jit(model.init)
  params = init(jax.random.key(0))
  assert trees.diff(params, model.shapes) == []
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
  nodes = [params]
  for node in nodes:
    assert type(node) is dict
    nodes += [child for child in node.values() if not isinstance(child, jax.Array)]
  other = trees.flatten(init(jax.random.key(1)))
  drawn = {}
  for path, leaf in trees.flatten(params).items():
    if np.std(leaf) > 0:
      assert np.abs(leaf - other[path]).max() > 1e-3
      drawn.setdefault(leaf.shape, []).append(np.asarray(leaf))
  for leaves in drawn.values():                                     # no two leaves share a key
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(leaves) for b in leaves[:i])


def test_rows_per_group():
  group = lambda size: dataclasses.replace(MOE, group_size=size)
  dense = t5.config('tiny')
  assert models.examples_per_group(dense, 12, 5) == 1
  assert models.examples_per_group(dataclasses.replace(dense, encoder_moe=MOE), 12, 5) == 1
  both = dataclasses.replace(dense, encoder_moe=group(48), decoder_moe=group(30))
  assert models.examples_per_group(both, 12, 5) == 12                   # lcm of 4 and 6
  assert models.build(both).examples_per_group(24, 10) == 6             # of 2 and 3
  assert models.examples_per_group(dataclasses.replace(both, decoder_moe=dataclasses.replace(
      group(30), layers='none')), 12, 5) == 4
  with pytest.raises(config_lib.ConfigError, match=r'model\.decoder_moe\.group_size: got 30'):
    models.examples_per_group(both, 12, 7)
  assert models.examples_per_group(vit.config('tiny', moe=group(8))) == 2
  with pytest.raises(config_lib.ConfigError, match=r'model\.moe\.group_size: got 8.*5 tokens'):
    models.examples_per_group(vit.config('tiny', head='cls', moe=group(8)))


@pytest.mark.parametrize('name', MODELS)
def test_every_parameter_is_used(name):
  model, params, _ = made(MODELS[name])
  loss = lambda p: jnp.square(model.apply(p, batch(MODELS[name]), train=True)[0]).mean()
  grads = trees.flatten(jax.jit(jax.grad(loss))(params))
  largest = max(np.abs(g).max() for g in grads.values())
  dead = [p for p, g in grads.items() if not np.abs(g).max() > 1e-7 * largest]
  assert [p for p in dead if not p.endswith('attention/k/bias')] == []   # softmax cancels these


@pytest.mark.parametrize('name', ['t5', 'sparse t5', 'sparse vit'])
def test_dropout_follows_the_key_and_the_example(name):
  _, params, apply = made(dataclasses.replace(MODELS[name], dropout_rate=0.3))
  run = lambda given, seed=5: apply(params, given, train=True, key=jax.random.key(seed))[0]
  given, order = batch(MODELS[name]), np.array([2, 3, 0, 1])         # whole groups change places
  a = run(given)
  np.testing.assert_array_equal(a, run(given))
  np.testing.assert_allclose(
      a[order], run({k: v[order] for k, v in given.items()}), rtol=1e-4, atol=1e-4)
  examples = tuple(range(1, a.ndim))
  for other in (run(given, seed=6), made(MODELS[name])[2](params, given)[0]):
    assert (np.abs(a - other).max(examples) > (1e-3 if 'vit' in name else 1e-2)).all()
  same = {k: np.stack([v[0]] * 4) for k, v in given.items()} | {'index': np.array([7, 7, 8, 9])}
  if 'vit' not in name:   # where an example is a group
    a = run(same)
    np.testing.assert_allclose(a[0], a[1], rtol=1e-4, atol=1e-4)
    assert np.abs(a[0] - a[2]).max() > 1e-2


@pytest.mark.parametrize('name', ['t5', 'cls'])
def test_bfloat16_is_near_float32_and_gives_float32(name):
  config = MODELS[name]
  _, params, apply = made(config)
  a = apply(params, batch(config))[0]
  b = made(dataclasses.replace(config, dtype='bfloat16'))[2](params, batch(config))[0]
  assert b.dtype == jnp.float32
  assert 1e-5 < float(jnp.abs(a - b).max() / jnp.abs(a).max()) < 0.05
