"""Grouped matmul: each row times the matrix of its own expert, and no FLOP for the others.

The rows of all experts stand in one buffer, sorted by expert (MegaBlocks, Gale et al. 2022, where
no expert has a capacity and no token is dropped). Each expert's run is padded to whole blocks of b
rows, so that a block meets one matrix. The buffer's size does not depend on the routing.

A matmul walks the blocks in use, expert by expert and several at a time: N rows cost 2*N*D*F
FLOPs, plus those of less than b rows of padding per expert. jax.lax.ragged_dot off TPU multiplies
every row by every matrix, E times as much; on TPU only its gradient for the matrices does. What was
measured, and what could not be, is in experiments/results/grouped.md.

Dimensions: N assignments, P rows, B blocks, b rows of a block, E experts, D model, F ffn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe import grouped_matmul_gpu

# Blocks that are multiplied at once. A small product spends its time on reading the matrix, or on
# adding to its gradient, which is as large.
PIECES = (8, 4, 2, 1)


class Rows(NamedTuple):
  """Which assignment each row of the buffer holds. P = B * b rows.

  Attributes:
    sizes: (E,) int32, assignments of each expert: valid rows of its run.
    expert: (B,) int32, expert of each block; that of a block in no expert's run means nothing.
    order: (P,) int32 in [0, N), the assignment in each row; means nothing if not valid.
    valid: (P,) bool, False at padding.
  """
  sizes: jax.Array
  expert: jax.Array
  order: jax.Array
  valid: jax.Array

  @property
  def block(self) -> int:
    """b, rows of a block."""
    return self.order.shape[0] // self.expert.shape[0]

  @property
  def blocks(self) -> jax.Array:
    """(E,) int32, blocks of each expert's run; runs follow one another from row 0."""
    return _ceil_div(self.sizes, self.block)

  def matmul(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """x (P, D), w (E, D, F) of one dtype -> (P, F): each row of a run times its expert's matrix.

    Rows after the last run give 0, and none of them reaches a gradient. Differentiable in x and w;
    sums over rows are accumulated in at least float32.
    """
    return _matmul(x, _varying_like(w, x), _varying_like(self.blocks, x), self.block)

  def expand(self, bias: jax.Array, dtype) -> jax.Array:
    """bias (E, F) -> (P, F) in dtype: each row its expert's. Gradients are summed in bias's dtype.
    """
    B, b, F = self.expert.shape[0], self.block, bias.shape[-1]
    return jnp.broadcast_to(bias[self.expert][:, None], (B, b, F)).astype(dtype).reshape(B * b, F)


def by_expert(expert: jax.Array, valid: jax.Array, num_experts: int) -> Rows:
  """Lays assignments out in rows, sorted by expert and in their own order within one.

  Args:
    expert: (N,) int32 in [0, E), expert of each assignment.
    valid: (N,) bool; an assignment that is not valid gets no row.
    num_experts: E.

  Returns:
    Rows.
  """
  (N,), E = expert.shape, num_experts
  b = block_size(N, E)
  most = min(N, E)                      # experts that can have rows
  B = most + (N - most) // b            # each has a first row, which opens a block; b more, another
  expert = jnp.where(valid, expert, E)
  sizes = (expert[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
  # A stable sort keeps each expert's assignments in their order, whatever the number of devices.
  _, order = jax.lax.sort_key_val(expert, jnp.arange(N, dtype=jnp.int32), is_stable=True)
  ends = jnp.cumsum(_ceil_div(sizes, b), dtype=jnp.int32)           # (E,) in blocks
  block_expert = (jnp.arange(B)[:, None] >= ends).sum(-1, dtype=jnp.int32)        # (B,)
  # Blocks of no run continue the last one: their places are past its end, so nothing is valid.
  block_expert = jnp.minimum(block_expert, E - 1)
  starts = ends - _ceil_div(sizes, b)
  # Place of each row in its expert's queue, and so in the sorted assignments.
  place = ((jnp.arange(B) - starts[block_expert]) * b)[:, None] + jnp.arange(b)   # (B, b)
  row_valid = place < sizes[block_expert][:, None]
  queue = (jnp.cumsum(sizes) - sizes)[block_expert][:, None] + place
  row_order = order[jnp.where(row_valid, queue, 0).reshape(-1)]
  return Rows(sizes, block_expert, row_order, row_valid.reshape(-1))


def block_size(N: int, E: int) -> int:
  """b: a power of two within [8, 128], the least that is N / (8 E) or more; 16 if N > 32 E.

  Each expert pads half a block on average, and the buffer has room for a whole one, so that small
  blocks waste less; they are multiplied several at a time. The tiles of a GPU's kernels, and of a
  TPU's, are single blocks: these gain from large ones, up to 128, and Triton takes none below 16.
  """
  b = 8 if N <= 32 * E else 16
  while b < 128 and 8 * E * b < N:
    b *= 2
  return b


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x, w, blocks, b):
  """x (P, D), w (E, D, F), blocks (E,) -> (P, F)."""
  return _rows(x, w, blocks, b, 0)


def _matmul_forward(x, w, blocks, b):
  return _rows(x, w, blocks, b, 0), (x, w, blocks)


def _matmul_backward(b, residuals, g):
  x, w, blocks = residuals
  return _rows(g, w, blocks, b, 1), _matrices(x, g, blocks, b), None


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _rows(x, w, blocks, b, contract):
  """x @ w of each row's expert, summed over axis `contract` of its matrix."""
  def loops(x, w, blocks):
    first = jnp.cumsum(blocks) - blocks

    def one_expert(y, of_expert):     # slices its matrix once for all of its blocks
      matrix, first, count = of_expert

      def multiply(i, m, y):
        piece = _dot(_blocks(x, i, m, b), matrix, 1, contract, y.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, piece, i * b, 0)
      return _over_run(first, count, x.shape[0] // b, multiply, y), None

    y = _varying_like(jnp.zeros((x.shape[0], w.shape[2 - contract]), x.dtype), x)
    return jax.lax.scan(one_expert, y, (w, first, blocks))[0]

  def ragged(x, w, blocks):
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if contract else w, blocks * b)
    # What the kernel leaves in rows of no group is its own affair.
    return jnp.where(jnp.arange(x.shape[0])[:, None] < blocks.sum() * b, y, 0)

  cuda = functools.partial(grouped_matmul_gpu.rows, b=b, contract=contract)
  if not grouped_matmul_gpu.fits(x, b, *w.shape):
    cuda = loops
  return jax.lax.platform_dependent(x, w, blocks, tpu=ragged, cuda=cuda, default=loops)


def _matrices(x, g, blocks, b):
  """x (P, D), g (P, F) -> (E, D, F): the sum over each expert's rows of x_i g_i^T."""
  def loops(x, g, blocks):
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one_expert(_, of_expert):
      first, count = of_expert
      add = lambda i, m, total: total + _dot(
          _blocks(x, i, m, b), _blocks(g, i, m, b), 0, 0, wide)
      zero = _varying_like(jnp.zeros((x.shape[1], g.shape[1]), wide), x)
      return None, _over_run(first, count, x.shape[0] // b, add, zero).astype(x.dtype)

    return jax.lax.scan(one_expert, None, (jnp.cumsum(blocks) - blocks, blocks))[1]

  cuda = functools.partial(grouped_matmul_gpu.matrices, b=b)
  if not grouped_matmul_gpu.fits(x, b, len(blocks), x.shape[1], g.shape[1]):
    cuda = loops
  return jax.lax.platform_dependent(x, g, blocks, cuda=cuda, default=loops)


def _dot(a, b, axis_of_a, axis_of_b, dtype):
  """Matrix product summed over one axis of each, in dtype; no operand is transposed in memory."""
  return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())),
                             preferred_element_type=dtype)


def _over_run(first, count, most, body, carry):
  """body(i, m, carry) -> carry over blocks first to first + count: blocks i to i + m at a time, as
  few times as can be; there are `most` blocks in all."""
  for m in (m for m in PIECES if m <= most):
    times = count // m
    carry = jax.lax.fori_loop(
        0, times, lambda j, carry, first=first, m=m: body(first + j * m, m, carry), carry)
    first, count = first + times * m, count - times * m
  return carry


def _blocks(a, i, m, b):
  """Rows of blocks i to i + m."""
  return jax.lax.dynamic_slice_in_dim(a, i * b, m * b)


def _varying_like(a, like):
  """a, typed as varying over the mesh axes `like` varies over: shard_map wants operands alike.

  Its transpose sums over those axes: the gradient of a matrix held whole by every device.
  """
  varying = lambda array: jax.typeof(array).manual_axis_type.varying
  axes = varying(like) - varying(a)
  return jax.lax.pcast(a, tuple(axes), to='varying') if axes else a


def _ceil_div(a, b):
  return (a + b - 1) // b
