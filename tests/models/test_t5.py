"""What a T5 must and must not let through: padding, later tokens, other examples' dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import t5
from moejax.moe.layer import MoEConfig
from tests.models.helpers import made, random_params

DENSE = t5.config('tiny')
SPARSE = dataclasses.replace(
    DENSE, encoder_moe=MoEConfig(layers='1', num_experts=4),
    decoder_moe=MoEConfig(layers='0', num_experts=3, router='top_k', k=2, capacity_factor=9.0,
                          eval_capacity_factor=9.0))
BOTH = pytest.mark.parametrize('config', [DENSE, SPARSE], ids=['dense', 'sparse'])


def make_batch(B=4, L=12, M=9):
  rng = np.random.default_rng(0)
  target = rng.integers(1, 64, (B, M))
  return {'encoder_input': rng.integers(1, 64, (B, L)), 'target': target,
          'decoder_input': np.pad(target, ((0, 0), (1, 0)))[:, :-1],
          'weight': np.ones((B, M), np.float32), 'index': np.arange(B)}


@BOTH
def test_logits_do_not_see_later_targets(config):
  _, params, apply = made(config)
  batch = make_batch()
  other = batch | {'decoder_input': batch['decoder_input'].copy()}
  other['decoder_input'][:, 5] = 60
  a, b = (apply(params, x)[0] for x in (batch, other))
  np.testing.assert_allclose(a[:, :5], b[:, :5], rtol=1e-5, atol=1e-5)
  assert (np.abs(a - b)[:, 5:].max(-1) > 1e-3).all()


@BOTH
def test_padding_changes_nothing(config):
  """Longer input rows; in the sparse model capacity is large enough not to bind in either."""
  if config is SPARSE:
    config = dataclasses.replace(SPARSE, encoder_moe=dataclasses.replace(
        SPARSE.encoder_moe, eval_capacity_factor=9.0))
  _, params, apply = made(config)
  batch = make_batch()
  longer = batch | {'encoder_input': np.pad(batch['encoder_input'], ((0, 0), (0, 7)))}
  (a, aux), (b, longer_aux) = apply(params, batch), apply(params, longer)
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  for path, values in aux.items():
    assert float(values['tokens']) == float(longer_aux[path]['tokens']) > 0


def test_what_stands_at_a_padded_position_reaches_no_other():
  _, params, apply = made(SPARSE)
  batch = make_batch()
  batch['encoder_input'][:, 9:] = 0
  batch['weight'][:, 7:] = 0
  table = params['token_embed']['embedding'] + 3.0 * (np.arange(64) == 0)[:, None]
  other = dict(params, token_embed={'embedding': table})
  changed = batch | {'decoder_input': batch['decoder_input'].copy()}
  changed['decoder_input'][:, 7:] = 3
  batch['decoder_input'][:, 0] = changed['decoder_input'][:, 0] = 1    # 0 is also the start token
  a, b = apply(params, batch)[0], apply(other, changed)[0]
  np.testing.assert_allclose(a[:, :7], b[:, :7], rtol=1e-4, atol=1e-5)
  assert np.abs(a - b)[:, 7:].max() > 1e-3


def test_a_filler_example_is_finite():
  model, params, _ = made(SPARSE)
  batch = make_batch()
  batch['encoder_input'][0], batch['decoder_input'][0], batch['weight'][0] = 0, 0, 0
  loss = lambda p: (model.apply(p, batch)[0].sum(-1) * batch['weight']).sum()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@BOTH
def test_dropout_follows_the_key_and_the_example(config):
  _, params, apply = made(dataclasses.replace(config, dropout_rate=0.3))
  run = lambda batch, seed=5: apply(params, batch, train=True, key=jax.random.key(seed))[0]
  batch, order = make_batch(), np.array([2, 0, 3, 1])
  a = run(batch)
  np.testing.assert_array_equal(a, run(batch))
  np.testing.assert_allclose(
      a[order], run({k: v[order] for k, v in batch.items()}), rtol=1e-4, atol=1e-4)
  assert (np.abs(a - run(batch, seed=6)).max((1, 2)) > 1e-2).all()
  plain = made(config)[2](params, batch)[0]
  assert (np.abs(a - plain).max((1, 2)) > 1e-2).all()
  same = {k: np.stack([v[0]] * 4) for k, v in batch.items()} | {'index': np.array([7, 7, 8, 9])}
  a = run(same)
  np.testing.assert_allclose(a[0], a[1], rtol=1e-4, atol=1e-4)
  assert np.abs(a[0] - a[2]).max() > 1e-2


def test_a_key_draws_nothing_in_evaluation():
  """Not even a program that could: dropout rate 0.3, train left at False."""
  model, params, _ = made(dataclasses.replace(DENSE, dropout_rate=0.3))
  run = lambda key: model.apply(params, make_batch(), key=key)[0]
  assert 'random' not in str(jax.make_jaxpr(run)(jax.random.key(0)))
  train = lambda key: model.apply(params, make_batch(), train=True, key=key)[0]
  assert 'random' in str(jax.make_jaxpr(train)(jax.random.key(0)))


def test_one_expert_is_the_dense_model():
  one = MoEConfig(layers='every_1', num_experts=1, capacity_factor=1.0, router='top_k', k=1)
  sparse = models.build(dataclasses.replace(DENSE, encoder_moe=one, decoder_moe=one))
  _, params, apply = made(DENSE)
  flat = trees.flatten(random_params(sparse.shapes))
  for path, leaf in trees.flatten(params).items():
    expert = path.replace('/mlp/', '/moe/experts/')
    assert expert in flat
    flat[expert] = leaf if expert == path else leaf[None]
  a = apply(params, make_batch())[0]
  b = jax.jit(sparse.apply)(trees.unflatten(flat), make_batch())[0]
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_aux_is_keyed_by_layer():
  model, params, apply = made(SPARSE)
  aux = apply(params, make_batch())[1]
  assert sorted(aux) == ['decoder/layers/00', 'encoder/layers/01']
  flat = trees.flatten(model.shapes)
  for path, values in aux.items():
    assert values['load'].shape == flat[f'{path}/moe/router/kernel'].shape[1:]
  assert made(DENSE)[2](made(DENSE)[1], make_batch())[1] == {}


@BOTH
def test_every_parameter_is_used(config):
  model, params, _ = made(config)
  batch = make_batch()
  loss = lambda p: jnp.square(model.apply(p, batch, train=True)[0]).mean()
  grads = trees.flatten(jax.jit(jax.grad(loss))(params))
  assert [p for p, g in grads.items() if not np.abs(g).max() > 0] == []


def test_bfloat16_is_near_float32_and_gives_float32():
  _, params, apply = made(DENSE)
  _, _, half = made(dataclasses.replace(DENSE, dtype='bfloat16'))
  a, b = apply(params, make_batch())[0], half(params, make_batch())[0]
  assert b.dtype == jnp.float32
  error = float(jnp.abs(a - b).max() / jnp.abs(a).max())
  assert 1e-5 < error < 0.05


@pytest.mark.parametrize('change, message', [
    ({'decoder_moe': MoEConfig(layers='1')},
     r"model\.decoder_moe\.router: got 'expert_choice'.*top_k"),
    ({'decoder_moe': MoEConfig(layers='1', router='top_k', batch_priority=True)},
     r'model\.decoder_moe\.batch_priority: got True'),
    ({'encoder_moe': MoEConfig(layers='2')}, r'model\.encoder_moe\.layers'),
    ({'dtype': 'float23'}, r"model\.dtype: got 'float23'.*Did you mean 'float32'"),
    ({'d_kv': 0}, r'model\.d_kv: got 0'),
    ({'dropout_rate': 1.0}, r'model\.dropout_rate: got 1\.0'),
    ({'relative_buckets': 6}, r'model\.relative_buckets: got 6'),
    ({'relative_max_distance': 16}, r'model\.relative_max_distance: got 16'),
])
def test_what_cannot_work_is_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(DENSE, **change)


def test_unknown_size_names_the_nearest():
  with pytest.raises(ConfigError, match="Did you mean 'large'"):
    t5.config('larg')
