"""Grouped matmuls: each row times the matrix of its own expert, and no FLOPs for other matrices.

A RowLayout sorts assignments by expert into the rows of one buffer (MegaBlocks, Gale et al. 2022,
where no expert has a capacity and no token is dropped). It pads the rows of each expert to whole
blocks of b rows, so that every block meets a single matrix. The size of the buffer does not depend
on the routing.

Two products, with the names that they have in the field:

  gmm   (P, D), (E, D, F) -> (P, F)    each row times the matrix of its expert
  tgmm  (P, D), (P, F) -> (E, D, F)    the gradient of the matrices: x^T g over each expert's rows

Both walk the blocks in use, expert by expert and several blocks at a time: N assignments cost
2*N*D*F FLOPs, plus those of less than b rows of padding per expert. Off TPU ragged_dot costs E
times that; on TPU only its gradient for the matrices does (experiments/results/grouped.md).

Experts call RowLayout.gmm; it calls _gmm_with_gradient, whose value is gmm and whose gradients are
gmm and tgmm; these choose loops, ragged_dot, or the kernels of the same name for GPUs.

Dimensions: N assignments, P rows, b rows of a block, E experts, D model, F ffn.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe import grouped_matmul_gpu

# Numbers of blocks that one matmul takes. A matmul of few rows spends its time on reading the
# matrix, or on adding to the matrix's gradient, which is as large.
PIECES = (8, 4, 2, 1)


class RowLayout(NamedTuple):
  """Which assignment each row of a buffer holds; the P rows are P / b blocks.

  Attributes:
    sizes: (E,) int32, assignments of each expert: its valid rows.
    block_expert: (P / b,) int32, expert of each block; arbitrary for a block of no expert.
    assignment: (P,) int32 in [0, N), the assignment in each row; arbitrary if not valid.
    valid: (P,) bool, False at padding.
  """
  sizes: jax.Array
  block_expert: jax.Array
  assignment: jax.Array
  valid: jax.Array

  @property
  def rows_per_block(self) -> int:
    """b."""
    return self.assignment.shape[0] // self.block_expert.shape[0]

  @property
  def blocks_per_expert(self) -> jax.Array:
    """(E,) int32; experts follow one another from row 0."""
    return _ceil_div(self.sizes, self.rows_per_block)

  def gmm(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """x (P, D), w (E, D, F) of one dtype -> (P, F): each row times the matrix of its expert.

    Rows after the blocks of the last expert return 0 and reach no gradient. Differentiable in x and
    w; sums over rows are accumulated in at least float32.
    """
    return _gmm_with_gradient(x, _varying_like(w, x), _varying_like(self.blocks_per_expert, x),
                              self.rows_per_block)

  def expand(self, bias: jax.Array, dtype) -> jax.Array:
    """bias (E, F) -> (P, F) in dtype: for each row its expert's; gradients sum in bias's dtype."""
    n, b, F = self.block_expert.shape[0], self.rows_per_block, bias.shape[-1]
    rows = jnp.broadcast_to(bias[self.block_expert][:, None], (n, b, F))
    return rows.astype(dtype).reshape(n * b, F)


def sort_by_expert(expert: jax.Array, valid: jax.Array, num_experts: int) -> RowLayout:
  """Lays assignments out in rows, sorted by expert and in their given order within an expert.

  Args:
    expert: (N,) int32 in [0, E), expert of each assignment.
    valid: (N,) bool; an assignment that is not valid gets no row.
    num_experts: E.
  """
  (N,), E = expert.shape, num_experts
  b = block_size(N, E)
  # Worst case: min(N, E) experts have rows. Each needs one block, and each further b rows one more.
  used = min(N, E)
  num_blocks = used + (N - used) // b
  expert = jnp.where(valid, expert, E)
  sizes = (expert[:, None] == jnp.arange(E)).sum(0, dtype=jnp.int32)
  # A stable sort keeps each expert's assignments in their order, whatever the number of devices.
  _, order = jax.lax.sort_key_val(expert, jnp.arange(N, dtype=jnp.int32), is_stable=True)
  ends = jnp.cumsum(_ceil_div(sizes, b), dtype=jnp.int32)           # (E,) in blocks
  block_expert = (jnp.arange(num_blocks)[:, None] >= ends).sum(-1, dtype=jnp.int32)
  # Blocks of no expert continue the last one: their positions are past its end, so none is valid.
  block_expert = jnp.minimum(block_expert, E - 1)
  starts = ends - _ceil_div(sizes, b)
  # Position of each row among the rows of its expert, (P / b, b).
  position = ((jnp.arange(num_blocks) - starts[block_expert]) * b)[:, None] + jnp.arange(b)
  row_valid = position < sizes[block_expert][:, None]
  sorted_position = (jnp.cumsum(sizes) - sizes)[block_expert][:, None] + position
  row_order = order[jnp.where(row_valid, sorted_position, 0).reshape(-1)]
  return RowLayout(sizes, block_expert, row_order, row_valid.reshape(-1))


def block_size(N: int, E: int) -> int:
  """b: a power of two within [8, 128], the least that is N / (8 E) or more; 16 if N > 32 E.

  Each expert pads half a block on average, and the buffer has room for a whole one, so that small
  blocks waste less; several of them are multiplied at a time. The tiles of a GPU's kernels, and of
  a TPU's, are single blocks and gain from large ones, up to 128; Triton takes none below 16.
  """
  b = 8 if N <= 32 * E else 16
  while b < 128 and 8 * E * b < N:
    b *= 2
  return b


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gmm_with_gradient(x, w, blocks, b):
  """x (P, D), w (E, D, F), blocks (E,) -> (P, F)."""
  return gmm(x, w, blocks, b)


def _gmm_forward(x, w, blocks, b):
  return gmm(x, w, blocks, b), (x, w, blocks)


def _gmm_backward(b, residuals, g):
  x, w, blocks = residuals
  return gmm(g, w, blocks, b, transpose=True), tgmm(x, g, blocks, b), None


_gmm_with_gradient.defvjp(_gmm_forward, _gmm_backward)


def gmm(x: jax.Array, w: jax.Array, blocks: jax.Array, b: int, transpose: bool = False
        ) -> jax.Array:
  """Each row times the matrix of its expert: the kernel of RowLayout.gmm, without a gradient.

  Args:
    x: (P, D), P a multiple of b.
    w: (E, D, F), or (E, F, D) if transpose; x's dtype.
    blocks: (E,) int32, RowLayout.blocks_per_expert.
    b: rows of a block.
    transpose: whether matrices are transposed before the product.

  Returns:
    (P, F) in x's dtype, 0 in rows after the last expert's.
  """
  def loops(x, w, blocks):
    first = jnp.cumsum(blocks) - blocks

    def one_expert(y, of_expert):     # slices its matrix once for all of its blocks
      matrix, first, count = of_expert

      def multiply(i, m, y):
        piece = _dot(_blocks(x, i, m, b), matrix, 1, int(transpose), y.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y, piece, i * b, 0)
      return _over_blocks(first, count, x.shape[0] // b, multiply, y), None

    y = _varying_like(jnp.zeros((x.shape[0], w.shape[1 if transpose else 2]), x.dtype), x)
    return jax.lax.scan(one_expert, y, (w, first, blocks))[0]

  def ragged(x, w, blocks):
    y = jax.lax.ragged_dot(x, w.swapaxes(1, 2) if transpose else w, blocks * b)
    # The kernel leaves arbitrary values in rows of no expert.
    return jnp.where(jnp.arange(x.shape[0])[:, None] < blocks.sum() * b, y, 0)

  cuda = functools.partial(grouped_matmul_gpu.gmm, b=b, transpose=transpose)
  if not grouped_matmul_gpu.fits(x, b, *w.shape):
    cuda = loops
  return jax.lax.platform_dependent(x, w, blocks, tpu=ragged, cuda=cuda, default=loops)


def tgmm(x: jax.Array, g: jax.Array, blocks: jax.Array, b: int) -> jax.Array:
  """x (P, D), g (P, F) -> (E, D, F): the sum over each expert's rows of x_i g_i^T."""
  def loops(x, g, blocks):
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one_expert(_, of_expert):
      first, count = of_expert
      add = lambda i, m, total: total + _dot(
          _blocks(x, i, m, b), _blocks(g, i, m, b), 0, 0, wide)
      zero = _varying_like(jnp.zeros((x.shape[1], g.shape[1]), wide), x)
      return None, _over_blocks(first, count, x.shape[0] // b, add, zero).astype(x.dtype)

    return jax.lax.scan(one_expert, None, (jnp.cumsum(blocks) - blocks, blocks))[1]

  cuda = functools.partial(grouped_matmul_gpu.tgmm, b=b)
  if not grouped_matmul_gpu.fits(x, b, len(blocks), x.shape[1], g.shape[1]):
    cuda = loops
  # On TPU loops too: this is the gradient for which ragged_dot costs E times too much.
  return jax.lax.platform_dependent(x, g, blocks, cuda=cuda, default=loops)


def _dot(a, b, axis_of_a, axis_of_b, dtype):
  """Matrix product summed over one axis of each, in dtype; no operand is transposed in memory."""
  return jax.lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())),
                             preferred_element_type=dtype)


def _over_blocks(first, count, most, body, carry):
  """Calls body(i, m, carry) on runs of m blocks, from block i, until `count` blocks are done.

  m is an entry of PIECES that is no larger than `most`, the number of all blocks.
  """
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
  """a, typed as varying over the mesh axes that `like` varies over, as shard_map requires.

  The transpose sums over those axes: the gradient of a matrix that every device holds whole.
  """
  varying = lambda array: jax.typeof(array).manual_axis_type.varying
  axes = varying(like) - varying(a)
  return jax.lax.pcast(a, tuple(axes), to='varying') if axes else a


def _ceil_div(a, b):
  return (a + b - 1) // b
