"""Multi-head attention and T5's relative position bias.

Attention logits and softmax are computed in at least float32.

Dimensions: B batch, L length (queries), M length (keys), D model, H heads, K head width.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import nn
from moejax.models import layers

MASKED = -1e9  # finite, so that a query whose keys are all masked gets a uniform softmax, not NaN


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
  """The form of an attention.

  Attributes:
    d_model, num_heads, head_dim: D, H, K.
    bias: whether projections add a bias.
    scaled: whether logits are divided by sqrt(K); T5 leaves them and initialises q smaller instead.
    init, q_init: initialisers of the kernels, and of that of the queries.
    dropout_rate: of attention probabilities.
    fused: whether `fused` computes it, not `attend`; there is then no bias, mask or dropout.
  """
  d_model: int
  num_heads: int
  head_dim: int
  bias: bool
  scaled: bool
  init: nn.Initializer
  q_init: nn.Initializer
  dropout_rate: float = 0.0
  fused: bool = False


class Attention(nnx.Module):
  """Multi-head attention (Vaswani et al. 2017); q, k, v kernels (D, H*K), o (H*K, D)."""

  def __init__(self, spec: AttentionSpec, *, rngs: nnx.Rngs):
    D, inner = spec.d_model, spec.num_heads * spec.head_dim
    self.spec = spec
    self.q = layers.Dense(D, inner, bias=spec.bias, init=spec.q_init, rngs=rngs)
    self.k = layers.Dense(D, inner, bias=spec.bias, init=spec.init, rngs=rngs)
    self.v = layers.Dense(D, inner, bias=spec.bias, init=spec.init, rngs=rngs)
    self.o = layers.Dense(inner, D, bias=spec.bias, init=spec.init, rngs=rngs)

  def project(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values of source (B, M, D): two arrays (B, M, H, K)."""
    return self._heads(self.k(source)), self._heads(self.v(source))

  def __call__(self, x: jax.Array, source: tuple[jax.Array, jax.Array], bias: jax.Array | None,
               mask: jax.Array | None, keys: jax.Array | None) -> jax.Array:
    """Attends from x to a source.

    Args:
      x: (B, L, D), of which the queries are made.
      source: keys and values (B, M, H, K), as from `project`; possibly cached from earlier steps.
      bias: (1, H, L, M) added to the logits, or None.
      mask: broadcastable to (B, H, L, M) bool, False at keys that a query must not see; or None.
      keys: (B,) for dropout of the probabilities, or None.

    Returns:
      (B, L, D) in x's dtype.
    """
    spec, (k, v) = self.spec, source
    q = self._heads(self.q(x) * (spec.head_dim ** -0.5 if spec.scaled else 1.0))    # (B, L, H, K)
    if spec.fused:
      out = fused(q, k, v)
    else:
      drop = lambda probs: nn.dropout(probs, spec.dropout_rate, keys)
      out = attend(q, k, v, bias, mask, drop)
    return self.o(out.reshape(*x.shape[:2], -1))

  def _heads(self, y: jax.Array) -> jax.Array:
    """(B, L, H*K) -> (B, L, H, K)."""
    return y.reshape(*y.shape[:2], self.spec.num_heads, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None,
           mask: jax.Array | None = None, drop: Callable[[jax.Array], jax.Array] = lambda x: x
           ) -> jax.Array:
  """softmax(q k + bias) v, with logits and probabilities in memory.

  Args:
    q: (B, L, H, K), scaled.
    k, v: (B, M, H, K).
    bias, mask: as in Attention.
    drop: applied to the probabilities (B, H, L, M).

  Returns:
    (B, L, H, K) in q's dtype.
  """
  logits = jnp.einsum('BLHK,BMHK->BHLM', q, k,
                      preferred_element_type=nn.at_least_float32(q.dtype))
  if bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = jnp.where(mask, logits, MASKED)
  probs = jax.nn.softmax(logits, axis=-1).astype(q.dtype)           # (B, H, L, M)
  return jnp.einsum('BHLM,BMHK->BLHK', drop(probs), v)


def fused(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """`attend` without bias, mask or dropout, in one kernel that keeps logits out of memory.

  On GPU cuDNN's kernel, which takes bfloat16 and float16; elsewhere jax.nn's own implementation.
  """
  kernel = 'cudnn' if jax.default_backend() == 'gpu' else 'xla'
  return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=kernel)


class RelativeBias(nnx.Module):
  """Bias on attention logits by bucketed distance (Raffel et al. 2020, section 2.1).

  Parameter embedding (buckets, H): one table per stack, shared by its layers.
  """

  def __init__(self, num_buckets: int, max_distance: int, num_heads: int, *, bidirectional: bool,
               rngs: nnx.Rngs):
    self.embedding = nn.param(nn.xavier_uniform, (num_buckets, num_heads), rngs)
    self.num_buckets, self.max_distance = num_buckets, max_distance
    self.bidirectional = bidirectional

  def __call__(self, L: int, M: int, dtype) -> jax.Array:
    """(1, H, L, M): entry (i, j) is the bias of key position j seen from query position i."""
    return _toeplitz(self._by_distance(L, M, dtype), L, M)[None]

  def row(self, position: jax.Array, M: int, dtype) -> jax.Array:
    """(1, H, 1, M): bias of M keys for the query at `position`, a traced scalar in [0, M)."""
    by_distance = self._by_distance(M, M, dtype)                    # (H, 2M-1)
    return jax.lax.dynamic_slice_in_dim(by_distance, M - 1 - position, M, axis=1)[None, :, None]

  def _by_distance(self, L: int, M: int, dtype) -> jax.Array:
    """(H, L+M-1): the bias of each distance (key minus query position), from 1 - L on."""
    distance = np.arange(1 - L, M)
    buckets = relative_buckets(distance, self.num_buckets, self.max_distance, self.bidirectional)
    one_hot = jax.nn.one_hot(buckets, self.num_buckets, dtype=dtype)
    return (one_hot @ self.embedding[...].astype(dtype)).T


def relative_buckets(distance: np.ndarray, num_buckets: int, max_distance: int,
                     bidirectional: bool) -> np.ndarray:
  """Bucket of each distance (key position minus query position).

  Half of the buckets hold one distance each; the others cover logarithmically growing ranges up to
  max_distance, and the last of them everything beyond. Bidirectional stacks use half of the buckets
  for each sign; causal ones put every later key into bucket 0.

  Args:
    distance: int array.
    num_buckets: size of the table.
    max_distance: where the last bucket begins.
    bidirectional: True in an encoder.

  Returns:
    int32 array of distance's shape, in [0, num_buckets).
  """
  bucket = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    bucket = num_buckets * (distance > 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(-distance, 0)
  exact = num_buckets // 2
  # float32 plus one epsilon, as in the code that trained the published models: powers of two would
  # otherwise round to either side of their boundary.
  ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
  far = exact + (np.log(ratio) / math.log(max_distance / exact) * (num_buckets - exact)).astype(int)
  far = np.minimum(far, num_buckets - 1)
  return (bucket + np.where(distance < exact, distance, far)).astype(np.int32)


def _toeplitz(values: jax.Array, L: int, M: int) -> jax.Array:
  """values (H, L+M-1) -> (H, L, M) with entry (i, j) = values[j - i + L - 1].

  Repeats values with one entry of padding and cuts the result into rows without it, so that each
  row starts one entry earlier. A gather would be simpler, but its gradient, a scatter of L*M
  entries, is slow.
  """
  H, W = values.shape
  longer = jnp.pad(values, ((0, 0), (0, 1)))                        # (H, W+1)
  rows = jnp.broadcast_to(longer[:, None], (H, L, W + 1)).reshape(H, L * (W + 1))
  return rows[:, :L * W].reshape(H, L, W)[:, :, L - 1:L - 1 + M]
