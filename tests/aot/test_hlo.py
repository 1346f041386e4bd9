"""Programs read back: FLOPs, bytes and communication that are known by hand."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moejax.aot import collectives, hlo

# As a TPU's compiler writes: tiled layouts, S(1) for VMEM, matmuls as convolutions, loops whose
# length stands in their condition, and groups of devices by mesh axes.
TPU = (pathlib.Path(__file__).parent / 'tpu.hlo').read_text()
# Copies ahead of time, kernels, a conditional, work for the SparseCores.
ASYNC = (pathlib.Path(__file__).parent / 'async.hlo').read_text()


@pytest.fixture
def tpu():
  return hlo.Module(TPU)


def test_a_loop_counts_as_often_as_it_runs(tpu):
  runs = {i.name: n for i, n, _ in tpu.run()}
  assert runs['y'] == 12 and runs['loop'] == 1 and not tpu.unknown_loops
  assert 'slice.1' not in runs    # fused: part of an operation, not one
  assert sum(n * tpu.flops(i, c) for i, n, c in tpu.run()) == (12 + 1) * 2 * 128 * 64 * 32


def test_bytes_are_those_that_are_touched_in_hbm(tpu):
  found = {i.name: tpu.bytes(i, c) for i, _, c in tpu.run()}
  assert found['own'] == 2 * 64 * 32 * 2 + 4          # a slice read, the same written, the number
  assert found['y'] == 64 * 32 * 2 + 128 * 32 * 4     # x is in VMEM
  assert found['new'] == 2 * 128 * 32 * 4 + 4         # the update read, and written in place
  assert found['loop'] == found['out'] == found['w'] == 0


def test_communication_by_mesh_axes(tpu):
  found, *_ = collectives.of(tpu)
  assert (found.kind, found.devices, found.times) == ('all-reduce', 8, 12)
  assert found.bytes == 128 * 32 * 4 and found.scope == 'jit(step)/encoder/mlp/psum'
  assert found.sent == 12 * 2 * 7 / 8 * 128 * 32 * 4


def test_fused_communication_counts_once_and_what_is_computed_meanwhile_as_computed(tpu):
  _, scattered, gathered = collectives.of(tpu)
  assert (scattered.kind, scattered.devices, scattered.bytes) == ('reduce-scatter', 4, 64 * 32 * 2)
  assert scattered.scope == 'jit(step)/transpose(encoder)/psum_scatter'
  assert (gathered.kind, gathered.devices, gathered.bytes) == ('all-gather', 4, 64 * 32 * 2)
  talking = {i.name for i, _, _ in tpu.run() if collectives.communication(tpu, i)}
  assert talking == {'all-reduce.1', 'scattered', 'async-collective-start.9'}


@pytest.mark.parametrize('text, groups', [
    ('replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('replica_groups=[2,4]<=[8], dimensions={0}', [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ('replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true',
     [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, x={1}", [[*range(8)]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}, x={1}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['axis_0'=1,'axis_2'=2,'axis_3'=4], device_ids=([4,2]T(1,0)) {'axis_2'}",
     [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'a','b'}, dimensions={2}", [[*range(8)]]),
    ('source_target_pairs={{0,1},{1,2}}', [[0, 1], [1, 2]]),
    ('replica_groups={}, to_apply=%add', [[*range(8)]]),
])
def test_groups_in_every_notation(text, groups):
  assert collectives.groups_of(text, 8).tolist() == groups


def test_a_notation_that_is_not_known_is_no_group_of_one():
  with pytest.raises(ValueError, match='who takes part'):
    collectives.groups_of('replica_groups=circle(8), dimensions={0}', 8)


@pytest.mark.parametrize('header, devices', [
    ('HloModule f, is_scheduled=true, num_partitions=8', 8), ('HloModule f', 1),
    ('HloModule f, replica_count=2, num_partitions=4', 8)])
def test_a_program_knows_how_many_run_it(header, devices):
  module = hlo.Module(TPU.replace(TPU.strip().splitlines()[0], header))
  assert module.devices == devices


@pytest.mark.parametrize('text, left, right, out, flops', [
    ('dim_labels=bf_io->bf', (128, 64), (64, 32), (128, 32), 2 * 128 * 64 * 32),
    # 3 x 3 over 5 x 5 without padding: 9 places each.
    ('window={size=3x3}, dim_labels=b01f_01io->b01f', (2, 5, 5, 4), (3, 3, 4, 8), (2, 3, 3, 8),
     2 * 2 * 9 * 9 * 4 * 8),
    # The same with padding: along each side 2 + 3 + 3 + 3 + 2 = 13 of 15 taps are inside.
    ('window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f', (2, 5, 5, 4), (3, 3, 4, 8),
     (2, 5, 5, 8), 2 * 2 * 13 * 13 * 4 * 8),
    # A batch of 6 matmuls as a window of 6 that meets one element at each of 6 places.
    ('window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf', (6, 10, 4),
     (6, 4, 8), (6, 10, 8), 6 * 2 * 10 * 4 * 8),
])
def test_flops_of_convolutions_by_hand(text, left, right, out, flops):
  assert hlo._convolution_flops(text, left, right, out) == flops


def test_a_loop_of_unknown_length_is_told():
  text = TPU.replace('constant(12)', 'parameter(1)')
  module = hlo.Module(text)
  assert sum(n * module.flops(i, c) for i, n, c in module.run()) == (1 + 1) * 2 * 128 * 64 * 32
  assert module.unknown_loops == ['body']


def compiled(fn, *args):
  return hlo.Module(jax.jit(fn).lower(*args).compile().as_text())


def test_flops_of_a_program_that_runs_here():
  def fn(x, ws):
    y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)
    return jnp.einsum('bij,bjk->bik', y.reshape(4, 2, 16), jnp.ones((4, 16, 3)) * y.sum())
  module = compiled(fn, jnp.ones((8, 16)), jnp.ones((5, 16, 16)))
  assert sum(n * module.flops(i, c) for i, n, c in module.run()) == (
      5 * 2 * 8 * 16 * 16 + 4 * 2 * 2 * 16 * 3)


@pytest.mark.parametrize('precision, passes', [('default', 1), ('high', 3), ('highest', 6)])
def test_precision_takes_several_matmuls_of_bfloat16(precision, passes):
  module = compiled(lambda x: jnp.dot(x, x, precision=precision), jnp.ones((16, 16)))
  count = lambda **how: sum(n * module.flops(i, c, **how) for i, n, c in module.run())
  assert count() == 2 * 16 ** 3
  assert count(passes=True) == passes * 2 * 16 ** 3


@pytest.mark.parametrize('kind, fn, size', [
    ('all-gather', lambda x: jax.lax.all_gather(x, 'a', tiled=True), 8 * 6 * 4),
    ('all-reduce', lambda x: jax.lax.psum(x, 'a'), 2 * 6 * 4),
    ('reduce-scatter', lambda x: jax.lax.psum_scatter(
        jnp.tile(x, (2, 1)), 'a', tiled=True), 4 * 6 * 4),
    ('all-to-all', lambda x: jax.lax.all_to_all(
        jnp.tile(x, (2, 1)), 'a', 0, 1, tiled=True), 4 * 6 * 4),
    ('collective-permute', lambda x: jax.lax.ppermute(
        x, 'a', [(0, 1), (1, 2), (2, 3), (3, 0)]), 2 * 6 * 4),
])
def test_collectives_of_programs_that_run_here(kind, fn, size):
  mesh = jax.make_mesh((4,), ('a',), devices=jax.devices()[:4],
                       axis_types=(jax.sharding.AxisType.Auto,))

  @functools.partial(jax.shard_map, mesh=mesh, in_specs=P('a'), out_specs=P('a'), check_vma=False)
  def run(x):   # (2, 6) on each of four devices
    return jax.lax.fori_loop(0, 3, lambda i, y: y + jnp.sin(fn(x + y)).sum(), 0.0)[None]

  [found] = collectives.of(compiled(run, jnp.arange(48.).reshape(8, 6)))
  assert (found.kind, found.bytes, found.times) == (kind, size, 3)
  assert found.devices == (2 if kind == 'collective-permute' else 4)


def test_what_comes_from_hbm_ahead_of_time_is_read_and_what_only_tells_the_compiler_is_not():
  module = hlo.Module(ASYNC)
  found = {i.name: module.bytes(i, c) for i, _, c in module.run()}
  whole, part = 64 * 32 * 2, 16 * 32 * 2
  assert found['fetched'] == found['stored'] == whole and found['moved'] == 2 * whole
  assert found['part'] == found['kept'] == part
  assert found['near'] == found['joined'] == found['aside'] == 0
  assert found['negate.3'] == 2 * 64 * 4               # on the SparseCore, from the same HBM


def test_a_kernel_has_the_flops_it_declares_and_a_conditional_those_of_its_costliest_branch():
  module = hlo.Module(ASYNC)
  flops = {i.name: module.flops(i, c) for i, _, c in module.run()}
  assert flops['kernel'] == 262144 and flops['dot.2'] == 2 * 8 * 16 * 16
  assert 'p.1' not in flops


@pytest.mark.parametrize('branch', [
    lambda n, x: jax.lax.cond(n > 0, lambda x: x @ x, lambda x: x, x),
    lambda n, x: jax.lax.switch(n, [lambda x: x, lambda x: x + 1, lambda x: x @ x], x)])
def test_branches_of_a_program_that_runs_here(branch):
  module = compiled(branch, jnp.int32(1), jnp.ones((16, 16)))
  assert sum(n * module.flops(i, c) for i, n, c in module.run()) == 2 * 16 ** 3


def test_a_loop_of_unknown_length_is_one_however_often_it_is_read():
  module = hlo.Module(TPU.replace('constant(12)', 'parameter(1)'))
  for _ in range(3):
    list(module.run())
  assert module.unknown_loops == ['body']


def test_an_element_of_unknown_size_is_no_element_of_none():
  module = hlo.Module(ASYNC.replace('f32[64]', 'f8e5m2[64]'))
  found = {i.name: module.bytes(i, c) for i, _, c in module.run()}
  assert found['negate.3'] == 2 * 64
  module = hlo.Module(ASYNC.replace('f32[64]', 'q7[64]'))
  with pytest.raises(ValueError, match="size of an array of 'q7'"):
    [module.bytes(i, c) for i, _, c in module.run()]
