"""What a T5 must and must not let through: padding and later tokens."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax import trees
from moejax.config import ConfigError
from moejax.models import t5
from moejax.moe.layer import MoEConfig
from tests.models import helpers
from tests.models.helpers import made

DENSE = t5.config('tiny')
SPARSE = dataclasses.replace(
    DENSE, encoder_moe=MoEConfig(layers='1', num_experts=4),
    decoder_moe=MoEConfig(layers='0', num_experts=3, router='top_k', k=2, capacity_factor=9.0,
                          eval_capacity_factor=9.0))
make_batch = functools.partial(helpers.batch, DENSE)
BOTH = pytest.mark.parametrize('config', [DENSE, SPARSE], ids=['dense', 'sparse'])


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


def test_a_key_draws_nothing_in_evaluation():
  """Not even a program that could: dropout rate 0.3, train left at False."""
  model, params, _ = made(dataclasses.replace(DENSE, dropout_rate=0.3))
  run = lambda key: model.apply(params, make_batch(), key=key)[0]
  assert 'random' not in str(jax.make_jaxpr(run)(jax.random.key(0)))
  train = lambda key: model.apply(params, make_batch(), train=True, key=key)[0]
  assert 'random' in str(jax.make_jaxpr(train)(jax.random.key(0)))


def test_aux_is_keyed_by_layer():
  model, params, apply = made(SPARSE)
  aux = apply(params, make_batch())[1]
  assert sorted(aux) == ['decoder/layers/00', 'encoder/layers/01']
  flat = trees.flatten(model.shapes)
  for path, values in aux.items():
    assert values['load'].shape == flat[f'{path}/moe/router/kernel'].shape[1:]
  assert made(DENSE)[2](made(DENSE)[1], make_batch())[1] == {}


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
  moe = change.get('decoder_moe')
  if moe:   # what a decoder refuses is not causal; elsewhere it may be
    assert not moe.causal
    t5.config('tiny', encoder_moe=moe, decoder_moe=dataclasses.replace(moe, layers='none'))


def test_unknown_size_names_the_nearest():
  with pytest.raises(ConfigError, match="Did you mean 'large'"):
    t5.config('larg')
