"""Attention and relative bias against their formulas, written out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import nn
from moejax.models import attention

RNGS = lambda: nnx.Rngs(params=jax.random.key(0))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_attention(scaled, bias=True, d_model=6, num_heads=2, head_dim=4):
  init = nn.fan_in_normal()
  return attention.Attention(attention.AttentionSpec(
      d_model, num_heads, head_dim, bias=bias, scaled=scaled, init=init, q_init=init), rngs=RNGS())


@pytest.mark.parametrize('scaled', [True, False])
def test_attention_head_by_head(scaled):
  layer = make_attention(scaled)
  for i, part in enumerate((layer.q, layer.k, layer.v, layer.o)):
    part.bias[...] = normal(*part.bias.shape, seed=i)
  x, source, bias = normal(3, 6), normal(5, 6, seed=1), normal(2, 3, 5, seed=2)
  mask = np.array([[1, 1, 0, 1, 0]] * 3, bool)
  heads = []
  for h in range(2):
    cut = slice(4 * h, 4 * h + 4)
    q, k, v = (a @ p.kernel[:, cut] + p.bias[cut] for a, p in (
        (x, layer.q), (source, layer.k), (source, layer.v)))
    logits = q @ k.T / (2 if scaled else 1) + bias[h]
    probs = np.exp(logits) * mask
    heads.append(probs / probs.sum(-1, keepdims=True) @ v)
  wanted = np.concatenate(heads, -1) @ layer.o.kernel[...] + layer.o.bias[...]
  found = layer(x[None], layer.project(source[None]), bias[None], mask, None)[0]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_fused_attention_is_attention_in_value_and_every_gradient():
  """The kernel itself is for GPUs; here it is what jax.nn computes in its place."""
  q, k, v, out = (normal(2, L, 3, 8, seed=i) for i, L in enumerate((5, 7, 7, 5)))
  wanted, pull = jax.vjp(attention.attend, q, k, v)
  found, pull_fused = jax.vjp(attention.fused, q, k, v)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  for a, b in zip(pull_fused(out), pull(out)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('backend, kernel', [('cpu', 'xla'), ('gpu', 'cudnn'), ('tpu', 'xla')])
def test_the_kernel_is_that_of_the_devices(backend, kernel, monkeypatch):
  asked = []
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *qkv, **how: asked.append(how))
  attention.fused(*(normal(1, 2, 1, 8),) * 3)
  assert asked == [{'scale': 1.0, 'implementation': kernel}]


@pytest.mark.parametrize('L, M', [(7, 7), (5, 9), (9, 5), (1, 1)])
@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_bias_is_its_table_looked_up_by_bucket(L, M, bidirectional):
  bias = attention.RelativeBias(8, 4 + 2, 3, bidirectional=bidirectional, rngs=RNGS())
  found = bias(L, M, jnp.float32)
  distance = np.arange(M) - np.arange(L)[:, None]                   # key minus query
  table = np.asarray(bias.embedding[...])
  wanted = table[attention.relative_buckets(distance, 8, 6, bidirectional)].transpose(2, 0, 1)
  np.testing.assert_array_equal(found, wanted[None])


@pytest.mark.parametrize('bidirectional', [True, False])
def test_row_is_that_of_the_whole_bias(bidirectional):
  bias = attention.RelativeBias(8, 4 + 2, 3, bidirectional=bidirectional, rngs=RNGS())
  row = jax.jit(lambda position: bias.row(position, 9, jnp.float32))
  whole = bias(9, 9, jnp.float32)
  for position in range(9):
    np.testing.assert_array_equal(row(position), whole[:, :, position:position + 1])


def test_relative_buckets_by_hand():
  """8 buckets for both signs, 4 each: 0 and 1 exact, then [2, 4) and all from 4 on."""
  found = attention.relative_buckets(np.array([0, -1, -2, -3, -4, -9, 1, 2, 3, 4, 9]), 8, 8, True)
  assert found.tolist() == [0, 1, 2, 2, 3, 3, 5, 6, 6, 7, 7]
  found = attention.relative_buckets(np.array([3, 0, -3, -4, -5, -6, -8, -99]), 8, 16, False)
  # 4 exact; then 4 + floor(4 * log(n / 4) / log(4)): 4, 4 (0.64), 5 (1.17), 6 (2), 7
  assert found.tolist() == [0, 0, 3, 4, 4, 5, 6, 7]
