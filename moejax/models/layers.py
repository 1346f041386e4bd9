"""Parts both backbones are built of: norms, MLP, patches, dropout.

Parameters are float32 and cast to the compute dtype where they are used. Norms are computed in at
least float32. Activations are flattened to two dimensions around matmuls: XLA on CPU runs
(B*L, D) @ (D, F) at nearly twice the speed of the three-dimensional form.

Randomness comes as `keys` (B,), one key per example, or None for none; every place that draws gets
its own. What an example draws thus does not depend on how its batch is laid out.

Dimensions: B batch, L length (queries), M length (keys), N rows, D model, F ffn, H heads, K head
width, E experts, P patch side, C channels.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax import sharding

Initializer = Callable[..., jax.Array]
EXPERT_MATMUL = 'expert_matmul'   # what models.stack's policies keep goes by this name

ACTIVATIONS = {
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'gelu_erf': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
    'relu': jax.nn.relu,
    'squared_relu': lambda x: jnp.square(jax.nn.relu(x)),   # So et al. 2021 (Primer)
}

def at_least_float32(dtype) -> jnp.dtype:
  """The dtype in which norms, attention logits and the final logits are computed."""
  return jnp.promote_types(dtype, jnp.float32)


def split(keys: jax.Array | None, n: int) -> jax.Array | list[None]:
  """n keys for each example, (n, B): (B,) for each of n places. None gives n times None.

  One call for many places: each call compiles a hash of its own.
  """
  return [None] * n if keys is None else jax.vmap(lambda k: jax.random.split(k, n))(keys).T


def flat_draw(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """draw(key, (n,)) as an array of `shape`.

  XLA on CPU takes seconds to compile the counters of a multi-dimensional draw, at each place that
  draws; flat, a tenth of that.
  """
  return draw(key, (math.prod(shape),)).reshape(shape)


def zeros(key, shape, dtype):
  """Initialiser: all 0."""
  return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
  """Initialiser: all 1."""
  return jnp.ones(shape, dtype)


def normal(std: float) -> Initializer:
  """Initialiser: N(0, std^2)."""
  return lambda key, shape, dtype: std * flat_draw(
      lambda key, n: jax.random.normal(key, n, dtype), key, shape)


def fan_in_normal(scale: float = 1.0) -> Initializer:
  """Initialiser of a kernel (D, F): N(0, scale / D), truncated and with that variance after it."""
  def init(key, shape, dtype):
    std = math.sqrt(scale / shape[0]) / 0.87962566103423978         # that of N(0, 1) cut at 2
    return std * flat_draw(
        lambda key, n: jax.random.truncated_normal(key, -2, 2, n, dtype), key, shape)
  return init


def xavier_uniform(key, shape, dtype):
  """Initialiser of a kernel (D, F): uniform with variance 2 / (D + F) (Glorot & Bengio 2010)."""
  limit = math.sqrt(6 / sum(shape))
  return flat_draw(
      lambda key, n: jax.random.uniform(key, n, dtype, -limit, limit), key, shape)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and divides the rest by 1 - rate.

  Args:
    x: (B, ...).
    rate: in [0, 1).
    keys: (B,) keys, one per example; None returns x.
  """
  if keys is None or rate == 0.0:
    return x
  draw = lambda key, n: jax.random.bernoulli(key, 1.0 - rate, n)
  keep = jax.vmap(lambda key: flat_draw(draw, key, x.shape[1:]))(keys)
  return jnp.where(keep, x / (1.0 - rate), 0)


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, dtype=None) -> jax.Array:
  """x (..., D) @ kernel (D, F) + bias (F,) -> (..., F), summed and returned in `dtype` or x's."""
  rows = x.reshape(-1, x.shape[-1])
  y = jnp.matmul(rows, kernel.astype(x.dtype), preferred_element_type=dtype or x.dtype)
  if bias is not None:
    y = y + bias.astype(y.dtype)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


def param(init: Initializer, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
  """A float32 parameter."""
  return nnx.Param(_draw(init, rngs.params(), shape))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(init, key, shape):
  """Jitted so that alike parameters are traced once: deep models would take long to build."""
  return init(key, shape, jnp.float32)


class Dense(nnx.Module):
  """Affine map; kernel (D, F), bias (F,) if asked for."""

  def __init__(self, d_in: int, d_out: int, *, bias: bool, init: Initializer, rngs: nnx.Rngs):
    self.kernel = param(init, (d_in, d_out), rngs)
    self.has_bias = bias
    if bias:
      self.bias = param(zeros, (d_out,), rngs)

  def __call__(self, x: jax.Array, dtype=None) -> jax.Array:
    return dense(x, self.kernel[...], self.bias[...] if self.has_bias else None, dtype)


class Embed(nnx.Module):
  """Table of vectors, embedding (V, D). An id outside the table gives NaN, not a neighbour."""

  def __init__(self, size: int, d_model: int, *, init: Initializer, rngs: nnx.Rngs):
    self.embedding = param(init, (size, d_model), rngs)

  def __call__(self, ids: jax.Array, dtype) -> jax.Array:
    found = jnp.take(sharding.whole_rows(self.embedding[...]), ids, axis=0, mode='fill')
    return sharding.by_example(found.astype(dtype))


def _wide_rows(x: jax.Array) -> jax.Array:
  """x (..., D) as (N, D), at least float32.

  The gradient of a norm's scale is a sum over all rows. Over two axes, XLA on GPUs takes it in two
  parts, and lays out the whole residual stream, transposed, for the first.
  """
  return x.reshape(-1, x.shape[-1]).astype(at_least_float32(x.dtype))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale: no mean, no bias (Zhang & Sennrich 2019; T5's layer norm)."""

  def __init__(self, d_model: int, *, eps: float, rngs: nnx.Rngs):
    self.scale = param(ones, (d_model,), rngs)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = _wide_rows(x)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
    return (wide * self.scale[...]).astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016)."""

  def __init__(self, d_model: int, *, eps: float, rngs: nnx.Rngs):
    self.scale = param(ones, (d_model,), rngs)
    self.bias = param(zeros, (d_model,), rngs)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = _wide_rows(x)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
    return (wide * self.scale[...] + self.bias[...]).astype(x.dtype).reshape(x.shape)


class MLP(nnx.Module):
  """Position-wise MLP; or E of them stacked on axis 0, which are the experts of an MoE layer.

  Gated: (act(x wi_gate) * (x wi_up)) wo (Shazeer 2020); otherwise act(x wi) wo. Every one of the E
  stacked MLPs is initialised with its own key and the fan-in of one MLP.

  Attributes:
    dropout_rate: for the hidden activations; whoever calls `apply` draws the mask.
  """

  def __init__(self, d_model: int, d_ff: int, *, gated: bool, activation: str, bias: bool,
               init: Initializer, rngs: nnx.Rngs, num_experts: int | None = None,
               dropout_rate: float = 0.0):
    shapes = {'wi_gate': (d_model, d_ff), 'wi_up': (d_model, d_ff)} if gated else {
        'wi': (d_model, d_ff)}
    shapes['wo'] = (d_ff, d_model)
    if bias:
      shapes |= {f'{name}_bias': (shape[1],) for name, shape in shapes.items()}
    for name, shape in shapes.items():
      init_one = zeros if name.endswith('_bias') else init
      setattr(self, name, param(_per_expert(init_one, num_experts), shape, rngs))
    self.names = tuple(shapes)
    self.gated, self.has_bias, self.activation = gated, bias, activation
    self.dropout_rate = dropout_rate

  def weights(self) -> dict[str, jax.Array]:
    """Name -> array: wi_gate, wi_up (or wi), wo; with bias also *_bias. Leading E when stacked."""
    return {name: getattr(self, name)[...] for name in self.names}

  def apply(self, weights: dict[str, jax.Array], x: jax.Array,
            drop: Callable[[jax.Array], jax.Array] | None = None, rows=None) -> jax.Array:
    """Runs the MLP with the given weights.

    Args:
      weights: as from `weights()`, or a slice of its expert axis.
      x: (N, D), or (E, N, D) with stacked weights, or (N, D) with stacked weights and `rows`.
      drop: applied to the hidden activations, (N, F) or (E, N, F).
      rows: moe.grouped.Rows, which say whose weights each row of x is for; or None.

    Returns:
      The shape and dtype of x.
    """
    def project(name, h):
      kernel = weights[name].astype(h.dtype)
      y = h @ kernel if rows is None else rows.matmul(h, kernel)
      y = checkpoint_name(y, EXPERT_MATMUL) if kernel.ndim == 3 else y
      if not self.has_bias:
        return y
      if rows is not None:
        return y + rows.expand(weights[f'{name}_bias'], h.dtype)
      bias = weights[f'{name}_bias'].astype(h.dtype)                # (F,) or (E, F)
      return y + (bias if bias.ndim == 1 else bias[:, None])

    act = ACTIVATIONS[self.activation]
    h = act(project('wi_gate', x)) * project('wi_up', x) if self.gated else act(project('wi', x))
    return project('wo', drop(h) if drop else h)

  def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
    """The dense layer: x (B, L, D) -> (B, L, D); keys (B,) for dropout, or None."""
    B, L, D = x.shape
    drop = lambda h: dropout(h.reshape(B, L, -1), self.dropout_rate, keys).reshape(h.shape)
    return self.apply(self.weights(), x.reshape(B * L, D), drop).reshape(B, L, D)


@functools.cache
def _per_expert(init: Initializer, num_experts: int | None) -> Initializer:
  """init, or its stack of num_experts independent draws."""
  if num_experts is None:
    return init
  return lambda key, shape, dtype: jax.vmap(lambda k: init(k, shape, dtype))(
      jax.random.split(key, num_experts))


def patches(image: jax.Array, P: int) -> jax.Array:
  """(B, height, width, C) -> (B, patches, P*P*C), patches row by row, pixels likewise."""
  B, height, width, C = image.shape
  x = image.reshape(B, height // P, P, width // P, P, C).swapaxes(2, 3)
  return x.reshape(B, (height // P) * (width // P), P * P * C)
