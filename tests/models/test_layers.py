"""Layers against their formulas, written out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import nn
from moejax.models import layers
from moejax.moe.experts import Experts

KEY = jax.random.key(0)
RNGS = lambda: nnx.Rngs(params=KEY)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_mlp(d_model=64, d_ff=256, gated=True, bias=False, num_experts=None):
  spec = nn.MLPSpec(d_model, d_ff, gated=gated, activation='gelu_tanh', bias=bias,
                    init=nn.fan_in_normal())
  return Experts(spec, num_experts, rngs=RNGS()) if num_experts else layers.MLP(spec, rngs=RNGS())


def test_rms_norm():
  norm, x = layers.RMSNorm(8, eps=1e-6, rngs=RNGS()), 5 + 3 * normal(4, 8)
  norm.scale[...] = scale = normal(8, seed=1)
  wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
  np.testing.assert_allclose(norm(x), wanted, rtol=1e-5)


def test_layer_norm():
  norm, x = layers.LayerNorm(8, eps=0.1, rngs=RNGS()), 5 + 3 * normal(4, 8)
  norm.scale[...], norm.bias[...] = scale, bias = normal(2, 8, seed=1)
  wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.1) * scale + bias
  np.testing.assert_allclose(norm(x), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', [layers.RMSNorm, layers.LayerNorm])
def test_norms_sum_in_float32(kind):
  """Sums of 4096 squares in bfloat16 would stop growing at 256."""
  x = jnp.asarray(normal(2, 4096), jnp.bfloat16)
  norm = kind(4096, eps=1e-6, rngs=RNGS())
  y = norm(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(y, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_dropout_of_an_example_does_not_depend_on_its_batch():
  keys = jax.random.split(KEY, 6)
  x = normal(6, 50, 20)
  whole = nn.dropout(x, 0.3, keys)
  parts = [nn.dropout(x[i:i + 2], 0.3, keys[i:i + 2]) for i in (0, 2, 4)]
  np.testing.assert_array_equal(whole, np.concatenate(parts))
  kept = whole != 0
  np.testing.assert_allclose(whole[kept], x[kept] / 0.7, rtol=1e-6)
  assert abs(kept.mean() - 0.7) < 0.02
  assert (kept[0] != kept[1]).any()


def test_no_dropout_without_keys_or_rate():
  x = normal(2, 3)
  assert nn.dropout(x, 0.3, None) is x
  assert nn.dropout(x, 0.0, jax.random.split(KEY, 2)) is x


@pytest.mark.parametrize('gated', [True, False])
@pytest.mark.parametrize('bias', [True, False])
def test_stacked_mlp_is_its_experts_one_by_one(gated, bias):
  """And each is the formula."""
  mlp = make_mlp(8, 16, gated, bias, num_experts=3)
  weights = {k: normal(*v.shape, seed=i) for i, (k, v) in enumerate(mlp.weights().items())}
  x = normal(3, 5, 8, seed=9)
  stacked = mlp.apply(weights, x)
  one = make_mlp(8, 16, gated, bias)
  for e in range(3):
    w = {k: v[e] for k, v in weights.items()}
    add = lambda name: w[f'{name}_bias'] if bias else 0  # noqa: B023
    if gated:
      h = jax.nn.gelu(x[e] @ w['wi_gate'] + add('wi_gate')) * (x[e] @ w['wi_up'] + add('wi_up'))
    else:
      h = jax.nn.gelu(x[e] @ w['wi'] + add('wi'))
    wanted = h @ w['wo'] + add('wo')
    np.testing.assert_allclose(one.apply(w, x[e]), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stacked[e], wanted, rtol=1e-4, atol=1e-4)


def test_experts_are_initialised_like_a_dense_mlp_and_apart():
  """Fan-in of one expert: over the stack of 8 it would be 8 times larger."""
  dense, experts = make_mlp().weights(), make_mlp(num_experts=8).weights()
  for name, w in dense.items():
    std = w.shape[0] ** -0.5
    assert float(w.std()) == pytest.approx(std, rel=0.03)
    for e in range(8):
      assert float(experts[name][e].std()) == pytest.approx(std, rel=0.03)
      for other in range(e):
        product = experts[name][e].ravel() @ experts[name][other].ravel() / w.size
        assert abs(float(product)) < 0.05 * std**2


def test_mlp_drops_hidden_activations():
  mlp = make_mlp(8, 16)
  seen = []
  y = mlp.apply(mlp.weights(), normal(5, 8), lambda h: seen.append(h.shape) or jnp.zeros_like(h))
  assert seen == [(5, 16)] and not y.any()


def test_initialisers_have_their_scale():
  shape = (300, 200)
  draw = lambda init: np.asarray(init(KEY, shape, jnp.float32))
  assert draw(nn.normal(0.3)).std() == pytest.approx(0.3, rel=0.02)
  cut = draw(nn.fan_in_normal(2.0))
  assert cut.std() == pytest.approx((2 / 300) ** 0.5, rel=0.02)
  assert np.abs(cut).max() <= 2 * (2 / 300) ** 0.5 / 0.8796
  even = draw(nn.xavier_uniform)
  assert even.std() == pytest.approx((2 / 500) ** 0.5, rel=0.02)
  assert np.abs(even).max() == pytest.approx((6 / 500) ** 0.5, rel=0.01)


def test_patches_are_cut_row_by_row():
  image = normal(2, 4, 6, 3)
  found = layers.patches(image, 2)
  assert found.shape == (2, 6, 12)
  for b, row, column in np.ndindex(2, 2, 3):
    cut = image[b, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
    np.testing.assert_array_equal(found[b, 3 * row + column], cut.ravel())


def test_embed_gives_nan_for_an_id_it_does_not_have():
  embed = layers.Embed(5, 3, init=nn.normal(1.0), rngs=RNGS())
  y = embed(jnp.array([4, 5]), jnp.float32)
  np.testing.assert_array_equal(y[0], embed.embedding[4])
  assert np.isnan(y[1]).all()


def test_dense_widens_its_sum_on_request():
  x, kernel = jnp.ones((1, 512), jnp.bfloat16), jnp.full((512, 1), 1.001)
  assert nn.dense(x, kernel).dtype == jnp.bfloat16
  assert nn.dense(x, kernel, dtype=jnp.float32).dtype == jnp.float32
