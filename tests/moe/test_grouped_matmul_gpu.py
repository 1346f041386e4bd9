"""The GPU's grouped matmul: its kernels against NumPy; and where it is used.

The kernels are interpreted, but for JAX_PLATFORMS=cuda pytest ... -k 'numpy or float32' on a GPU.

Dimensions as in test_grouped_matmul.py.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.moe import grouped_matmul_gpu, routing

from . import experts
from .test_grouped_matmul import compiled, laid_out, naive, operands, over_devices

# Of one shape: each kernel is interpreted as one compiled program for all.
LOADS = {'blocks of 16': (70, 90, 140, 0, 0), 'empty experts': (0, 100, 0, 200, 0),
         'not valid ones': (200, 60, 0, 0, 0, -40), 'all to one': (0, 0, 0, 300, 0),
         'none valid': (0, 0, 0, 0, 0, -300)}
KERNEL = 'gpu.triton'   # name of a kernel's custom call
INTERPRET = jax.default_backend() != 'gpu'
gmm = jax.jit(functools.partial(grouped_matmul_gpu.gmm, interpret=INTERPRET), static_argnums=(3, 4))
tgmm = jax.jit(functools.partial(grouped_matmul_gpu.tgmm, interpret=INTERPRET), static_argnums=3)


@pytest.mark.parametrize('load', LOADS.values(), ids=LOADS.keys())
def test_kernels_against_numpy(load):
  """D of one tile, F of two, no power of two times 16; rows of no expert are never read."""
  rows, _, E = laid_out(load)
  b, blocks = rows.rows_per_block, rows.blocks_per_expert
  used = int(blocks.sum()) * b
  assert b >= 16
  x, w, g = operands(rows, E, D=48, F=256)
  unused = jnp.arange(len(x))[:, None] >= used
  x, g = jnp.where(unused, jnp.nan, x), jnp.where(unused, jnp.nan, g)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
  close(gmm(x, w, blocks, b), naive(rows, x, w))
  close(gmm(g, w, blocks, b, True), naive(rows, g, w.swapaxes(1, 2)))
  owner = np.repeat(np.asarray(rows.block_expert), b)[:used]
  x64, g64 = (np.asarray(a, np.float64)[:used] for a in (x, g))
  close(tgmm(x, g, blocks, b), [x64[owner == e].T @ g64[owner == e] for e in range(E)])


def test_in_bfloat16_sums_are_float32():
  """Of 16 columns that sum to 32 + 224/512, which is nearest to 32.5."""
  rows, _, _ = laid_out((256, 0))
  P, b = len(rows.assignment), rows.rows_per_block
  x = jnp.where(jnp.arange(P)[:, None] < 32, 1.0, 2.0**-9).astype(jnp.bfloat16)
  assert b == 16   # each block after the first two gives 1/32; bfloat16 resolves 1/4 at 32
  found = tgmm(jnp.tile(x, 16), jnp.ones((P, 16), jnp.bfloat16), rows.blocks_per_expert, b)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(found[0], np.float32), np.full((16, 16), 32.5))
  np.testing.assert_array_equal(np.asarray(found[1], np.float32), np.zeros((16, 16)))
  # Nine tiles of a row sum to 1, 2^-9, 2^-9, ...
  deep = grouped_matmul_gpu.DEPTH_BYTES // 2
  x = jnp.zeros((P, 9 * deep), jnp.bfloat16).at[:, ::deep].set(2.0**-9)
  y = gmm(x.at[:, 0].set(1), jnp.ones((2, x.shape[1], 16), jnp.bfloat16), rows.blocks_per_expert, b)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y[:256], np.float32), np.full((256, 16), 1 + 2.0**-6))


@pytest.mark.parametrize('capability, dtype, columns', [
  ((9, 0), 'bfloat16', 256), ((9, 0), 'float32', 128), ((8, 0), 'bfloat16', 256),
  ((8, 9), 'bfloat16', 128), ((12, 0), 'bfloat16', 128), ((), 'bfloat16', 128)])
def test_tiles_fit_the_shared_memory(monkeypatch, capability, dtype, columns):
  """KiB that a thread block may have: 99 on consumer GPUs, 163 on an A100, 227 on an H100."""
  monkeypatch.setattr(grouped_matmul_gpu, '_capability', lambda: capability)
  grids = []
  monkeypatch.setattr(grouped_matmul_gpu.pl, 'pallas_call', lambda *args, grid, **kwargs:
                      grids.append(grid) or jax.tree_util.Partial(lambda *operands: grid))
  rows, _, E = laid_out((500, 700))
  assert rows.rows_per_block == 128
  x, w, g = (a.astype(dtype) for a in operands(rows, E, D=256, F=1024))
  grouped_matmul_gpu.gmm(x, w, rows.blocks_per_expert, 128)
  grouped_matmul_gpu.tgmm(x, g, rows.blocks_per_expert, 128)
  assert grids == [(1024 // columns, len(x) // 128), (8, 2, 2)]


def test_wide_tiles_against_numpy(monkeypatch):
  monkeypatch.setattr(grouped_matmul_gpu, '_capability', lambda: (9, 0))
  rows, _, E = laid_out((0, 100, 0, 300))
  x, w, _ = (jnp.asarray(a, jnp.bfloat16) for a in operands(rows, E, D=64, F=512))
  y = grouped_matmul_gpu.gmm(x, w, rows.blocks_per_expert, rows.rows_per_block, interpret=INTERPRET)
  np.testing.assert_allclose(np.asarray(y, np.float32), naive(rows, x, w), rtol=2**-8, atol=1e-3)


def kernels(run, *operands) -> int:
  """How many Triton kernels there are in a function compiled for an NVIDIA GPU."""
  lowered = jax.jit(run).trace(*operands).lower(lowering_platforms=('cuda',))
  return lowered.as_text().count(KERNEL)


def test_a_gpu_gets_the_kernels_where_tiles_fit():
  load = LOADS['empty experts']
  rows, _, E = laid_out(load)
  run = lambda *given: compiled()(rows, *given)
  assert kernels(run, *operands(rows, E, D=32, F=48)) == 3
  assert kernels(run, *operands(rows, E, D=32, F=40)) == 0
  here = jax.jit(run).trace(*operands(rows, E, D=32, F=48)).lower()
  assert KERNEL not in here.as_text()
  rows, _, E = laid_out((7, 8, 9, 16, 17))
  assert rows.rows_per_block == 8
  assert kernels(run, *operands(rows, E, D=32, F=48)) == 0


def test_sizes_past_32_bits_are_left_to_the_loops():
  rows = lambda P: jax.ShapeDtypeStruct((P, 1024), jnp.bfloat16)
  assert grouped_matmul_gpu.fits(rows(2**18), 128, 8, 1024, 4096)
  assert not grouped_matmul_gpu.fits(rows(2**19), 128, 8, 1024, 4096)
  assert not grouped_matmul_gpu.fits(rows(2**18), 128, 512, 1024, 4096)


@pytest.mark.parametrize('capability, fits', [('7.5', False), ('8.0', True), ('12.0', True)])
def test_gpus_before_ampere_are_left_to_the_loops(monkeypatch, capability, fits):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  assert grouped_matmul_gpu.fits(jnp.ones((32, 16)), 16, 2, 16, 16) == fits


def test_a_gpu_gets_the_kernels_inside_shard_map():
  """Whose check wants to know over which axes a kernel's result varies."""
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  G, S, E, K, D, F = 8, 96, 4, 2, 32, 48
  choices = routing.top_k(draw(G, S, E), jnp.ones((G, S), bool), K)
  run = lambda *given: over_devices(choices, *given).sum()
  weights = experts.random_weights(rng, E, D, F)
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=4), jax.devices()[:4])):
    assert kernels(jax.grad(run, (0, 1)), draw(G, S, D), weights) >= 5
