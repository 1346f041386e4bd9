"""Placement of token choices into slots: G groups, S group size, E experts, K selected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import placement, routing
from moejax.moe.config import MoEConfig

from . import naive
from .tables import ODDS, assert_buffers, buffers, choices, logs, real, token_routing


def test_place_hand_table_of_the_softmax():
  logits = logs(ODDS)
  tokens = routing.top_k(logits, real(logits), 2)
  # First choices: e0 t1 t2, e1 t3, e2 t0.
  # Second, in order: t0 e1, t1 e1 (full), t2 e1 (full), t3 e2.
  assert_buffers(placement.place(tokens, 3, 2),
                 [{1: 2/3, 2: 1/2}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}])
  # Weights are renormalised over what was asked for, not over what was placed.
  tokens = routing.top_k(logits, real(logits), 2, renormalize=True)
  assert_buffers(placement.place(tokens, 3, 2),
                 [{1: 4/5, 2: 2/3}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}])


def test_place_gradient_stops_at_dropped_choices_only():
  tokens = token_routing([[0], [0], [1], [0]], [[.1], [.2], [.3], [.9]])

  def grad(order, prioritised):
    def total(weight):
      routed = routing.TokenRouting(tokens.expert, weight, tokens.valid)
      priority = weight[..., 0] if prioritised else None
      return jnp.sum(placement.place(routed, 2, 2, order=order, priority=priority).weight)
    return np.asarray(jax.jit(jax.grad(total))(tokens.weight))[0, :, 0]

  for order in ('choice', 'token'):
    np.testing.assert_array_equal(grad(order, prioritised=False), [1, 1, 1, 0])
    np.testing.assert_array_equal(grad(order, prioritised=True), [0, 1, 1, 1])


# The example of place's docstring: first choices e1 e1 e0 e0, second choices the other expert.
TWO_EACH = [[1, 0], [1, 0], [0, 1], [0, 1]], [[.6, .4], [.7, .3], [.8, .2], [.9, .1]]


def queues(slots, group=0):
  """Per expert the tokens of its valid slots, in their order."""
  return [index[valid].tolist() for index, valid in
          zip(np.asarray(slots.index[group]), np.asarray(slots.valid[group]), strict=True)]


@pytest.mark.parametrize('order, prioritised, capacity, expected', [
  # All first choices before any second: e0's t2 t3, e1's t0 t1; then second choices in sequence.
  ('choice', False, 2, [[2, 3], [0, 1]]),
  ('choice', False, 3, [[2, 3, 0], [0, 1, 2]]),
  ('choice', False, 4, [[2, 3, 0, 1], [0, 1, 2, 3]]),
  # First choices t3 t2 t1 t0, then second choices t3 t2 t1 t0.
  ('choice', True, 1, [[3], [1]]),
  ('choice', True, 3, [[3, 2, 1], [1, 0, 3]]),
  ('choice', True, 4, [[3, 2, 1, 0], [1, 0, 3, 2]]),
  # Both choices of t0, then of t1, ...
  ('token', False, 1, [[0], [0]]),
  ('token', False, 3, [[0, 1, 2], [0, 1, 2]]),
  ('token', False, 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
  # Both choices of t3, then of t2, ...
  ('token', True, 1, [[3], [3]]),
  ('token', True, 3, [[3, 2, 1], [3, 2, 1]]),
])
def test_place_in_order_and_by_priority(order, prioritised, capacity, expected):
  tokens = token_routing(*TWO_EACH)
  priority = tokens.weight[..., 0] if prioritised else None
  slots = placement.place(tokens, 2, capacity, order=order, priority=priority)
  assert queues(slots) == expected
  weight = [{0: .4, 1: .3, 2: .8, 3: .9}, {0: .6, 1: .7, 2: .2, 3: .1}]
  assert_buffers(slots, [{t: weight[e][t] for t in row} for e, row in enumerate(expected)])
  if capacity == 3:   # as in the docstring's table
    row, = (line.split() for line in placement.place.__doc__.splitlines()
            if line.split()[:2] == [repr(order), 'first' if prioritised else 'None'])
    held = [word for word in row if word[0] == 't']   # and after each expert's three what it drops
    assert [f't{t}' for e in expected for t in e] == held[:3] + held[4:7]


def test_a_misspelt_order_is_an_error():
  with pytest.raises(KeyError, match='tokens'):
    placement.place(token_routing(*TWO_EACH), 2, 3, order='tokens')


@pytest.mark.parametrize('G, S, E, k, capacity', [
  (3, 9, 4, 2, 3), (2, 7, 5, 3, 1), (2, 8, 3, 3, 8), (1, 6, 1, 1, 4), (2, 1, 4, 2, 1)])
def test_place_equals_the_naive_rule(G, S, E, k, capacity):
  rng = np.random.default_rng(G * 100 + S)
  logits = jnp.asarray(rng.normal(size=(G, S, E)) * 2, jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) < 0.8)
  ties = rng.integers(0, 4, (G, S)).astype(np.float32)
  ways = [MoEConfig(router='top_k', order=order, batch_priority=prioritised)
          for order in ('choice', 'token') for prioritised in (False, True)]

  @jax.jit
  def placed(tokens):
    return [placement.place(tokens, E, capacity, order=way.order,
                            priority=ties if way.batch_priority else None) for way in ways]
  for tokens in (routing.top_k(logits, mask, k), routing.top_p(logits, mask, 0.7, k)):
    for way, slots in zip(ways, placed(tokens)):
      assert slots.index.shape == (G, E, capacity)
      for group in range(G):
        chosen = {s: row for s, row in enumerate(choices(tokens, group)) if row}
        kept = naive.placed(way, chosen, ties[group], capacity)
        assert_buffers(slots, [{s: w for s, expert, w in kept if expert == e}
                               for e in range(E)], group)


@pytest.mark.parametrize('order', ['choice', 'token'])
def test_place_within_a_shard_equals_place_outside(order):
  """Groups are routed inside shard_map, where not every jnp function works."""
  rng = np.random.default_rng(4)
  logits = jnp.asarray(rng.normal(size=(4, 9, 3)), jnp.float32)
  mask = jnp.asarray(rng.random((4, 9)) < 0.8)
  uniform = jnp.asarray(rng.random((4, 9)), jnp.float32)

  def route(logits, mask, uniform):
    tokens = routing.keep_second(routing.top_k(logits, mask, 2), uniform, 0.5)
    return placement.place(tokens, 3, 4, order=order, priority=tokens.weight[..., 0])

  mesh, groups = jax.sharding.Mesh(jax.devices()[:2], 'data'), jax.sharding.PartitionSpec('data')
  sharded = jax.jit(jax.shard_map(route, mesh=mesh, in_specs=groups, out_specs=groups))
  jax.tree.map(np.testing.assert_array_equal, sharded(logits, mask, uniform),
               jax.jit(route)(logits, mask, uniform))


def test_place_with_binding_capacity_leaks_backwards():
  """A later first choice takes an earlier second choice's slot: documented, as in public code."""
  alone = token_routing([[1, 0], [1, 0]], [[.6, .4], [.7, .3]])
  taken = token_routing([[1, 0], [0, 1]], [[.6, .4], [.7, .3]])
  assert buffers(placement.place(alone, 2, 1))[0].keys() == {0}
  assert buffers(placement.place(taken, 2, 1))[0].keys() == {1}
