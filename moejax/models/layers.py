"""Layers that both backbones are made of: dense maps, embeddings, norms, the MLP, patches.

Norms are computed in at least float32. nn.py has the functions underneath, and the conventions for
parameters, matmuls and random keys.

Dimensions: B batch, L length, N tokens, D model, F ffn, V vocabulary, P patch side, C channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import nn, sharding


class Dense(nnx.Module):
  """Affine map; kernel (D, F), and bias (F,) if it has one."""

  def __init__(self, d_in: int, d_out: int, *, bias: bool, init: nn.Initializer, rngs: nnx.Rngs):
    self.kernel = nn.param(init, (d_in, d_out), rngs)
    self.bias = nn.param(nn.zeros, (d_out,), rngs) if bias else None

  def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
    return nn.dense(x, self.kernel[...], None if self.bias is None else self.bias[...], dtype)


class Embed(nnx.Module):
  """Table of vectors, embedding (V, D). An id outside the table returns NaN, not a neighbour."""

  def __init__(self, size: int, d_model: int, *, init: nn.Initializer, rngs: nnx.Rngs):
    self.embedding = nn.param(init, (size, d_model), rngs)

  def __call__(self, ids: jax.Array, dtype) -> jax.Array:
    table = sharding.gathered_table(self.embedding[...])
    return sharding.by_example(jnp.take(table, ids, axis=0, mode='fill').astype(dtype))


def _wide_tokens(x: jax.Array) -> jax.Array:
  """x (..., D) as (N, D), at least float32.

  The gradient of a norm's scale is a sum over all tokens. Over two axes, XLA on GPUs takes it in
  two steps, and stores the whole residual stream, transposed, for the first.
  """
  return x.reshape(-1, x.shape[-1]).astype(nn.at_least_float32(x.dtype))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale: no mean, no bias (Zhang & Sennrich 2019; T5's layer norm)."""

  def __init__(self, d_model: int, *, eps: float, rngs: nnx.Rngs):
    self.scale = nn.param(nn.ones, (d_model,), rngs)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = _wide_tokens(x)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
    return (wide * self.scale[...]).astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016)."""

  def __init__(self, d_model: int, *, eps: float, rngs: nnx.Rngs):
    self.scale = nn.param(nn.ones, (d_model,), rngs)
    self.bias = nn.param(nn.zeros, (d_model,), rngs)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = _wide_tokens(x)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
    return (wide * self.scale[...] + self.bias[...]).astype(x.dtype).reshape(x.shape)


class MLP(nn.MLPParams):
  """Position-wise MLP of the form nn.MLPSpec. moe.experts has the stacked ones."""

  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """x (B, L, D) -> (B, L, D); keys (B,) for dropout of the hidden activations, or None."""
    B, L, D = x.shape
    drop = lambda h: nn.dropout(
        h.reshape(B, L, -1), self.spec.dropout_rate, keys).reshape(h.shape)
    return self.apply(self.weights(), x.reshape(B * L, D), drop).reshape(B, L, D)

  def apply(self, weights: dict[str, jax.Array], x: jax.Array, drop=None) -> jax.Array:
    """x (N, D) -> (N, D) with the given weights, named as in `weights()`."""
    project = lambda name, h: nn.dense(h, weights[name], weights.get(f'{name}_bias'))
    return nn.mlp(self.spec, project, x, drop)


def patches(image: jax.Array, P: int) -> jax.Array:
  """(B, height, width, C) -> (B, patches, P*P*C), row by row; and so the pixels of a patch."""
  B, height, width, C = image.shape
  x = image.reshape(B, height // P, P, width // P, P, C).swapaxes(2, 3)
  return x.reshape(B, (height // P) * (width // P), P * P * C)
