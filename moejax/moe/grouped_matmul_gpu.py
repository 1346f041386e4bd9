"""gmm and tgmm on NVIDIA GPUs: two Pallas kernels, compiled by Triton.

The rows of each expert are whole blocks, so that a block of rows meets one matrix. That is all a
kernel needs: one program multiplies a block by a tile of its expert's matrix, another sums a tile
of an expert's gradient over the blocks of that expert. The loops of grouped_matmul.py, whose length
depends on the routing, would wait for the host before every round on a GPU.

Dimensions: P rows, b rows of a block, E experts, D summed over (gmm), F columns of the result.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

MIN_TILE = 16        # Triton multiplies no narrower tiles
COLUMNS = 128        # largest width of a tile of the result: fits every GPU from Ampere on
WIDE = 256           # that of gmm where it fits shared memory: a block of x is read half as often
DEPTH_BYTES = 128    # largest slice that one step of a program's loop sums over
STAGES = 3           # steps whose tiles are in shared memory at once
# Compute capability -> KiB of shared memory per program; else 99.
SHARED = {(8, 0): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}


def fits(x: jax.Array, b: int, E: int, D: int, F: int) -> bool:
  """Whether the kernels can take rows x (P, D or F) with matrices (E, D, F).

  Tiles are multiples of 16, sums are float32, and Triton counts elements in 32 bits and compiles
  for GPUs from Ampere on.
  """
  before_ampere = () < _capability() < (8,)   # as a T4 is
  return (all(size % MIN_TILE == 0 for size in (b, D, F)) and x.dtype.itemsize <= 4
          and max(x.shape[0] * max(D, F), E * D * F) < 2**31 and not before_ampere)


def _capability() -> tuple[int, ...]:
  """CUDA compute capability, (9, 0) on a Hopper; () off NVIDIA GPUs."""
  if jax.default_backend() != 'gpu':
    return ()
  numbers = str(getattr(jax.local_devices()[0], 'compute_capability', '')).split('.')
  return tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else ()


def gmm(x: jax.Array, w: jax.Array, blocks: jax.Array, b: int, transpose: bool = False,
        interpret: bool = False) -> jax.Array:
  """grouped_matmul.gmm, summed in float32.

  interpret: run the kernel as JAX operations, on any device: for tests.
  """
  P, D = x.shape
  F = w.shape[1 if transpose else 2]
  d, f = _tile(D, _depth(x)), _tile(F, _columns(x, b))
  expert = (jnp.arange(P // b)[:, None] >= jnp.cumsum(blocks)).sum(-1)   # (P / b,); E: of none
  steps = jnp.where(expert < len(blocks), D // d, 0).astype(jnp.int32)

  def kernel(expert, steps, x, w, y):
    tile, block = pl.program_id(0), pl.program_id(1)
    e = expert[block]
    rows, columns = pl.ds(block * b, b), pl.ds(tile * f, f)

    def step(i, total):
      depth = pl.ds(i * d, d)
      matrix = w[(e, columns, depth) if transpose else (e, depth, columns)]
      return total + _dot(x[rows, depth], matrix, trans_b=transpose)
    total = jax.lax.fori_loop(0, steps[block], step, jnp.zeros((b, f), jnp.float32))
    y[rows, columns] = total.astype(y.dtype)

  return _call(kernel, 'grouped_gmm', (F // f, P // b), (P, F), x, interpret)(
      expert.astype(jnp.int32), steps, x, w)


def tgmm(x: jax.Array, g: jax.Array, blocks: jax.Array, b: int, interpret: bool = False
         ) -> jax.Array:
  """grouped_matmul.tgmm, summed in float32; interpret as in `gmm`."""
  D, F, E = x.shape[1], g.shape[1], len(blocks)
  d_tile, f_tile, depth = _tile(D, COLUMNS), _tile(F, COLUMNS), _tile(b, _depth(x))
  ends = jnp.cumsum(blocks) * (b // depth)

  def kernel(first, ends, x, g, out):
    j, i, expert = (pl.program_id(axis) for axis in range(3))
    of_D, of_F = pl.ds(i * d_tile, d_tile), pl.ds(j * f_tile, f_tile)

    def step(n, total):
      rows = pl.ds(n * depth, depth)
      return total + _dot(x[rows, of_D], g[rows, of_F], trans_a=True)
    zero = jnp.zeros((d_tile, f_tile), jnp.float32)
    total = jax.lax.fori_loop(first[expert], ends[expert], step, zero)
    out[expert, of_D, of_F] = total.astype(out.dtype)

  return _call(kernel, 'grouped_tgmm', (F // f_tile, D // d_tile, E), (E, D, F), x, interpret)(
      ends - blocks * (b // depth), ends, x, g)


def _depth(x: jax.Array) -> int:
  return DEPTH_BYTES // x.dtype.itemsize


def _columns(x: jax.Array, b: int) -> int:
  """Largest width of a tile of `gmm`: wide where it fits and the tensor cores multiply."""
  shared = SHARED.get(_capability(), 99) * 2**10
  fits_wide = STAGES * (b + WIDE) * DEPTH_BYTES <= shared
  return WIDE if fits_wide and x.dtype.itemsize == 2 else COLUMNS


def _tile(size: int, most: int) -> int:
  """The largest power of two that divides `size` and is at most `most`."""
  return min(size & -size, most)


def _dot(a, b, **transposed):
  """A product summed in float32; float32 operands keep all their bits."""
  return triton.dot(a, b, allow_tf32=False, **transposed)


def _call(kernel, name, grid, shape, like, interpret):
  """pallas_call with every operand whole in device memory: kernels load their own tiles."""
  out = jax.ShapeDtypeStruct(shape, like.dtype,
                             manual_axis_type=jax.typeof(like).manual_axis_type)
  return pl.pallas_call(kernel, out, grid=grid, interpret=interpret, name=name,
                        compiler_params=triton.CompilerParams(num_warps=8, num_stages=STAGES))
