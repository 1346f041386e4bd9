"""The grouped matmul of moe.grouped on NVIDIA GPUs: two Pallas kernels, compiled by Triton.

Each expert's run of rows is whole blocks, so that a block of rows meets one matrix. That is all a
kernel needs: one program multiplies a block by a tile of its expert's matrix, another sums a tile
of an expert's gradient over the blocks of its run. Loops over blocks whose number depends on the
routing, which moe.grouped has for other devices, ask the host of a GPU before every round.

Dimensions: P rows, B blocks, b rows of a block, E experts, K summed over, N columns of the result.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LEAST = 16           # Triton multiplies no narrower tiles
COLUMNS = 128        # of a tile of the result, at most: every GPU from Ampere on has room for that
WIDE = 256           # the same for `rows` where there is room: a block of x is read half as often
DEPTH_BYTES = 128    # of what one step of a program's loop sums over, at most
STAGES = 3           # steps whose tiles are in shared memory at once
SHARED = {(8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}   # KiB a program may have; else 99


def fits(x: jax.Array, b: int, E: int, D: int, F: int) -> bool:
  """Whether the kernels can take rows x (P, D or F) with matrices (E, D, F).

  Tiles are multiples of 16, sums are float32, and Triton counts elements in 32 bits and compiles
  for GPUs from Ampere on.
  """
  return (all(size % LEAST == 0 for size in (b, D, F)) and x.dtype.itemsize <= 4
          and max(x.shape[0] * max(D, F), E * D * F) < 2**31 and not _too_old())


def _too_old() -> bool:
  """Whether this process runs on an NVIDIA GPU before Ampere, as a T4 is."""
  return (8,) > _capability() > ()


def _capability() -> tuple[int, ...]:
  """(9, 0) where this process runs on a Hopper; () off NVIDIA GPUs."""
  if jax.default_backend() != 'gpu':
    return ()
  parts = str(getattr(jax.local_devices()[0], 'compute_capability', '')).split('.')
  return tuple(map(int, parts)) if all(map(str.isdecimal, parts)) else ()


def rows(x: jax.Array, w: jax.Array, blocks: jax.Array, b: int, contract: int,
         interpret: bool = False) -> jax.Array:
  """Each row of a run times its expert's matrix.

  Args:
    x: (P, K), P a multiple of b.
    w: (E, K, N), or (E, N, K) if contract is 1; x's dtype.
    blocks: (E,) int32, blocks of each expert's run; runs follow one another from row 0.
    b: rows of a block.
    contract: which axis of a matrix is summed over.
    interpret: run the kernel as JAX operations, on any device: for tests.

  Returns:
    (P, N) in x's dtype, summed in float32; 0 in rows after the last run.
  """
  P, K = x.shape
  N = w.shape[2 - contract]
  k, n = _tile(K, _depth(x)), _tile(N, _columns(x, b))
  expert = (jnp.arange(P // b)[:, None] >= jnp.cumsum(blocks)).sum(-1)   # (B,); E: in no run
  steps = jnp.where(expert < len(blocks), K // k, 0).astype(jnp.int32)

  def kernel(expert, steps, x, w, y):
    tile, block = pl.program_id(0), pl.program_id(1)
    mine = expert[block]
    here, columns = pl.ds(block * b, b), pl.ds(tile * n, n)

    def step(i, total):
      deep = pl.ds(i * k, k)
      matrix = w[(mine, columns, deep) if contract else (mine, deep, columns)]
      return total + _dot(x[here, deep], matrix, trans_b=bool(contract))
    total = jax.lax.fori_loop(0, steps[block], step, jnp.zeros((b, n), jnp.float32))
    y[here, columns] = total.astype(y.dtype)

  return _call(kernel, 'grouped_rows', (N // n, P // b), (P, N), x, interpret)(
      expert.astype(jnp.int32), steps, x, w)


def matrices(x: jax.Array, g: jax.Array, blocks: jax.Array, b: int, interpret: bool = False
             ) -> jax.Array:
  """The sum over each expert's rows of x_i g_i^T: gradients of its matrix.

  Args:
    x, g: (P, K), (P, N) of one dtype; the other arguments are those of `rows`.

  Returns:
    (E, K, N) in x's dtype, summed in float32.
  """
  K, N, E = x.shape[1], g.shape[1], len(blocks)
  k, n, deep = _tile(K, COLUMNS), _tile(N, COLUMNS), _tile(b, _depth(x))
  ends = jnp.cumsum(blocks) * (b // deep)

  def kernel(first, ends, x, g, out):
    columns, down, expert = (pl.program_id(axis) for axis in range(3))
    columns, down = pl.ds(columns * n, n), pl.ds(down * k, k)

    def step(i, total):
      here = pl.ds(i * deep, deep)
      return total + _dot(x[here, down], g[here, columns], trans_a=True)
    total = jax.lax.fori_loop(first[expert], ends[expert], step, jnp.zeros((k, n), jnp.float32))
    out[expert, down, columns] = total.astype(out.dtype)

  return _call(kernel, 'grouped_matrices', (N // n, K // k, E), (E, K, N), x, interpret)(
      ends - blocks * (b // deep), ends, x, g)


def _depth(x: jax.Array) -> int:
  return DEPTH_BYTES // x.dtype.itemsize


def _columns(x: jax.Array, b: int) -> int:
  """Of a tile of `rows`, at most; wide where the device has room and the tensor cores multiply."""
  room = SHARED.get(_capability(), 99) * 2**10
  fits_wide = STAGES * (b + WIDE) * DEPTH_BYTES <= room
  return WIDE if fits_wide and x.dtype.itemsize == 2 else COLUMNS


def _tile(size: int, most: int) -> int:
  """The largest power of two that divides `size` and is at most `most`."""
  return min(size & -size, most)


def _dot(a, b, **transposed):
  """A product summed in float32; float32 operands keep all their bits."""
  return triton.dot(a, b, allow_tf32=False, **transposed)


def _call(kernel, name, grid, shape, like, interpret):
  """Every operand and the result whole, in the device's memory: kernels pick their tiles."""
  out = jax.ShapeDtypeStruct(shape, like.dtype,
                             manual_axis_type=jax.typeof(like).manual_axis_type)
  return pl.pallas_call(kernel, out, grid=grid, interpret=interpret, name=name,
                        compiler_params=triton.CompilerParams(num_warps=8, num_stages=STAGES))
