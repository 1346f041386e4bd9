"""The grouped matmul: its layout of rows, against one matmul per expert, and what it costs.

N assignments, P rows, B blocks, b rows of a block, E experts, D model, F ffn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import nn, sharding
from moejax.moe import dispatch, grouped_matmul, routing
from moejax.moe.experts import Experts

from . import experts

# Assignments of each expert; a negative number of those that are not valid. The first five have
# equal shapes, so that they are compiled once.
LOADS = {
  'block edges': [7, 8, 9, 16, 17, 9],
  'empty experts first, between and last': [0, 5, 0, 0, 61, 0],
  'all to one': [0, 66, 0, 0, 0, 0],
  'not valid ones': [3, 12, 0, 0, 8, 0, -43],
  'none valid': [0, 0, 0, 0, 0, 0, -66],
  'one expert': [13],
  'fewer assignments than experts': [0, 1, 0, 0, 1, 0, 0, 0],
  'blocks of 16': [70, 90, 40],
}
CASES = pytest.mark.parametrize('load', LOADS.values(), ids=LOADS.keys())


def shuffled(load):
  """(expert (N,), valid (N,), E): as many assignments of each expert as load says, mixed."""
  E = sum(n >= 0 for n in load)
  expert = np.repeat(np.r_[np.arange(E), np.full(len(load) - E, E + 3)], np.abs(load))
  expert = np.random.default_rng(len(load)).permutation(expert)
  return jnp.asarray(expert, jnp.int32), jnp.asarray(expert < E), E


sort_by_expert = jax.jit(grouped_matmul.sort_by_expert, static_argnums=2)


@functools.cache
def laid_out(load):
  expert, valid, E = shuffled(load)
  return sort_by_expert(expert, valid, E), np.asarray(expert), E


@CASES
def test_rows_hold_each_valid_assignment_once_and_in_order(load):
  rows, expert, E = laid_out(tuple(load))
  b = rows.rows_per_block
  assert rows.assignment.shape == rows.valid.shape == (b * len(rows.block_expert),)
  np.testing.assert_array_equal(rows.sizes, load[:E])
  held = [np.asarray(rows.assignment)[b * i:b * (i + 1)][np.asarray(rows.valid)[b * i:b * (i + 1)]]
          for i in range(len(rows.block_expert))]
  for e in range(E):   # stable: an expert's rows keep the order of the assignments
    mine = [n for block, owner in zip(held, rows.block_expert) if owner == e for n in block]
    np.testing.assert_array_equal(mine, np.flatnonzero(expert == e))
  assert int(rows.valid.sum()) == sum(load[:E])


def test_the_buffer_has_room_for_the_worst_case_and_no_more():
  """The most blocks any N assignments to E experts need, by trying all loads."""
  def loads(N, E):
    return [(N,)] if E == 1 else [(n, *rest) for n in range(N + 1) for rest in loads(N - n, E - 1)]
  for N, E in ((1, 3), (9, 2), (17, 2), (26, 3)):
    b = grouped_matmul.block_size(N, E)
    most = max(sum(-(-n // b) for n in load) for load in loads(N, E))
    rows = jax.eval_shape(lambda e: grouped_matmul.sort_by_expert(e, e >= 0, E),  # noqa: B023
                          jax.ShapeDtypeStruct((N,), jnp.int32))
    assert rows.block_expert.shape == (most,)


def test_block_size_is_an_eighth_of_an_experts_share_within_bounds():
  assert [grouped_matmul.block_size(*given) for given in (
    (10, 8), (256, 8), (257, 8), (1024, 8), (1025, 8), (4096, 32), (4096, 8), (10**6, 8))] == [
      8, 8, 16, 16, 32, 16, 64, 128]


def naive(rows, x, w):
  """Each row times its block's matrix; rows of no run give 0 (NumPy, float64)."""
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  used = int(rows.blocks_per_expert.sum()) * rows.rows_per_block
  owner = np.repeat(np.asarray(rows.block_expert), rows.rows_per_block)
  return np.stack([x[p] @ w[owner[p]] if p < used else np.zeros(w.shape[2])
                   for p in range(len(x))])


@functools.cache
def compiled():
  """(y, gradients for x and w) of a matmul with a cotangent, given the rows."""
  def run(rows, x, w, cotangent):
    y, pull = jax.vjp(lambda x, w: rows.gmm(x, w), x, w)
    return y, *pull(cotangent)
  return jax.jit(run)


def operands(rows, E, D=5, F=7, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  P = len(rows.assignment)
  return draw(P, D), draw(E, D, F), draw(P, F)


@CASES
def test_matmul_and_gradients_against_numpy(load):
  """All rows are filled here: padding inside a run counts as its expert's, after the last not."""
  rows, _, E = laid_out(tuple(load))
  x, w, cotangent = operands(rows, E)
  y, gx, gw = compiled()(rows, x, w, cotangent)
  np.testing.assert_allclose(y, naive(rows, x, w), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(gx, naive(rows, cotangent, w.swapaxes(1, 2)), rtol=1e-5, atol=1e-5)
  used = int(rows.blocks_per_expert.sum()) * rows.rows_per_block
  owner = np.repeat(np.asarray(rows.block_expert), rows.rows_per_block)[:used]
  for e in range(E):
    mine = np.flatnonzero(owner == e)
    want = np.asarray(x, np.float64)[mine].T @ np.asarray(cotangent, np.float64)[mine]
    np.testing.assert_allclose(gw[e], want, rtol=1e-5, atol=1e-5)


def test_matmul_in_bfloat16_accumulates_in_float32():
  """The pieces of a run add up to 32 + 3/32 + 3/32 + 3/32. In bfloat16, which resolves 1/4 there,
  32 + 3/32 is 32 for ever: the gradient must not be summed in it."""
  rows, _, E = laid_out((240, 0))
  P, b = len(rows.assignment), rows.rows_per_block
  assert b == 16 and list(rows.blocks_per_expert) == [15, 0]
  assert grouped_matmul.PIECES == (8, 4, 2, 1)
  small = [np.full((m * b, 1), 3 / 32 / (m * b)) for m in (4, 2, 1)]
  run = np.concatenate([np.ones((32, 1)), np.zeros((8 * b - 32, 1)), *small])
  x = jnp.zeros((P, 1), jnp.bfloat16).at[:len(run)].set(run.astype(jnp.bfloat16))
  y, gx, gw = compiled()(rows, x, jnp.ones((E, 1, 1), jnp.bfloat16), jnp.ones_like(x))
  assert y.dtype == gx.dtype == gw.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(gw, np.float32).ravel(), [32.25, 0])


@pytest.mark.parametrize('count, pieces', [(0, []), (1, [1]), (7, [4, 2, 1]), (15, [8, 4, 2, 1]),
                                           (30, [8, 8, 8, 4, 2])])
def test_a_run_is_walked_in_few_pieces(count, pieces):
  def add(i, m, seen):
    starts, sizes, n = seen
    return starts.at[n].set(i), sizes.at[n].set(m), n + 1
  none = jnp.zeros(8, jnp.int32)
  starts, sizes, n = jax.jit(
      lambda count: grouped_matmul._over_blocks(5, count, 30, add, (none, none, 0)))(
      count)
  assert sizes[:n].tolist() == pieces
  assert starts[:n].tolist() == [5 + sum(pieces[:i]) for i in range(len(pieces))]


@jax.jit
def expanded(rows, bias, cotangent):
  y, pull = jax.vjp(lambda bias: rows.expand(bias, jnp.float32), bias)
  return y, pull(jnp.where(rows.valid[:, None], cotangent, 0))[0]


@CASES
def test_expand_gives_each_row_its_experts_vector(load):
  rows, _, E = laid_out(tuple(load))
  bias = jnp.asarray(np.random.default_rng(0).normal(size=(E, 3)), jnp.float32)
  cotangent = operands(rows, E, F=3)[2]
  y, grad = expanded(rows, bias, cotangent)
  owner = np.repeat(np.asarray(rows.block_expert), rows.rows_per_block)
  valid = np.asarray(rows.valid)
  np.testing.assert_array_equal(np.asarray(y)[valid], np.asarray(bias)[owner][valid])
  want = np.zeros((E, 3))
  np.add.at(want, owner[valid], np.asarray(cotangent)[valid])
  np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5)


def flops_run(monkeypatch, function):
  """What function() really multiplies: with jit off, each dot_general that runs is counted."""
  spent, plain = [], jax.lax.dot_general

  def counted(a, b, dimension_numbers, *args, **kwargs):
    y = plain(a, b, dimension_numbers, *args, **kwargs)
    (contract, _), _ = dimension_numbers
    spent.append(2 * y.size * int(np.prod([a.shape[axis] for axis in contract])))
    return y
  monkeypatch.setattr(jax.lax, 'dot_general', counted)
  with jax.disable_jit():
    function()
  return sum(spent)


@pytest.mark.parametrize('load', [(30, 2, 0, 0, 15, 1), (48, 0, 0, 0, 0, 0)], ids=str)
def test_flops_are_those_of_the_blocks_in_use(monkeypatch, load):
  """Not E times those of the rows; forward one product per block, backward two."""
  rows, _, E = laid_out(load)
  x, w, cotangent = operands(rows, E)
  used = int(rows.blocks_per_expert.sum())
  D, F, b, N = 5, 7, rows.rows_per_block, sum(load)
  assert used == sum(-(-n // b) for n in load)
  assert flops_run(monkeypatch, lambda: rows.gmm(x, w)) == used * 2 * b * D * F
  both = flops_run(monkeypatch, lambda: compiled()(rows, x, w, cotangent))
  assert both == 3 * used * 2 * b * D * F
  assert both < 3 * 2 * D * F * (N + b * sum(n > 0 for n in load)) < E / 2 * 3 * 2 * D * F * N


def whole(choices, x, weights, cotangent, exchange=None):
  y, pull = jax.vjp(lambda x, weight, weights: dispatch.grouped(
    choices._replace(weight=weight), x, weights, experts.apply, exchange), x, choices.weight,
    weights)
  return (y, *pull(cotangent))


@functools.cache
def layer_inputs(G=4, S=12, E=4, K=2, D=6, F=10):
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) > 0.3)
  choices = routing.top_k(draw(G, S, E), mask, K)
  given = choices, draw(G, S, D), experts.random_weights(rng, E, D, F), draw(G, S, D)
  return given, jax.jit(whole)(*given)


def over_devices(choices, x, weights):
  """dispatch.grouped inside shard_map, which checks what varies over devices."""
  def local(groups, weights, *, exchange, total):
    y = dispatch.grouped(groups['choices'], groups['x'], weights, experts.apply, exchange)
    return y, total(y.sum())
  return sharding.over_groups(local)({'choices': choices, 'x': x}, weights)[0]


def test_every_device_its_own_rows():
  (choices, x, weights, cotangent), wanted = layer_inputs()
  run = jax.jit(lambda weight, *given: over_devices(choices._replace(weight=weight), *given))
  with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, model=2))):
    y, pull = jax.vjp(run, choices.weight, x, weights)
    gweight, gx, gw = jax.jit(pull)(cotangent)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6),
               (y, gx, gweight, gw), wanted)


def test_under_pmap():
  (choices, x, weights, cotangent), wanted = layer_inputs()
  per_device = lambda tree: jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), tree)
  y, gx, gweight, gw = jax.pmap(whole, in_axes=(0, 0, None, 0), devices=jax.devices()[:2])(
    *(per_device(a) for a in (choices, x)), weights, per_device(cotangent))
  found = (y.reshape(x.shape), gx.reshape(x.shape), gweight.reshape(choices.weight.shape),
           jax.tree.map(lambda a: a.sum(0), gw))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, wanted)


@pytest.mark.parametrize('gated', [True, False])
def test_experts_with_biases(gated):
  """Experts in rows, against the expert of each row on it alone; dropout passes through."""
  rows, _, E = laid_out((3, 9, 0, 20))
  spec = nn.MLPSpec(6, 10, gated=gated, activation='gelu_erf', bias=True)
  mlps = Experts(spec, E, rngs=nnx.Rngs(0))
  weights = {name: w + 0.1 * jnp.arange(w.size).reshape(w.shape) / w.size
             for name, w in mlps.weights().items()}
  owner = jnp.repeat(rows.block_expert, rows.rows_per_block)
  x = jnp.asarray(np.random.default_rng(3).normal(size=(len(owner), 6)), jnp.float32)
  drop = lambda h: jnp.where(jnp.arange(10) % 3 > 0, h, 0)

  def by_row(weights, x):
    one = lambda e, row: mlps.apply(
        {name: w[e][None] for name, w in weights.items()}, row[None, None], drop)[0, 0]
    return jax.vmap(one)(owner, x)

  def both(run):
    y, pull = jax.vjp(run, weights, x)
    return jnp.where(rows.valid[:, None], y, 0), pull(jnp.where(rows.valid[:, None], jnp.cos(x), 0))
  found, wanted = jax.jit(lambda: (both(lambda *given: mlps.apply(*given, drop, rows)),
                                   both(by_row)))()
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, wanted)
