"""Placement of token choices into slots: G groups, S group size, E experts, K selected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import placement, routing

from .tables import ODDS, assert_buffers, buffers, logs, real, token_routing


def test_place_drops_the_later_tokens_however_sure_they_are():
  tokens = token_routing([[0], [0], [1], [0]], [[.1], [.2], [.3], [.9]])
  assert_buffers(placement.place(tokens, 2, 2), [{0: .1, 1: .2}, {2: .3}])
  assert_buffers(placement.place(tokens, 2, 1), [{0: .1}, {2: .3}])
  slots = placement.place(tokens, 2, 2)
  assert slots.index.shape == slots.weight.shape == slots.valid.shape == (1, 2, 2)
  assert (slots.index >= 0).all() and (slots.index < 4).all()


def test_place_puts_all_first_choices_before_any_second():
  # In plain token order expert 0 would fill with t0, t1 (second choices) and drop t2 and t3.
  tokens = token_routing([[1, 0], [1, 0], [0, 1], [0, 1]], [[.6, .4], [.7, .3], [.8, .2], [.9, .1]])
  assert_buffers(placement.place(tokens, 2, 2), [{2: .8, 3: .9}, {0: .6, 1: .7}])
  # With room for three, the first second choice in sequence order follows.
  assert_buffers(placement.place(tokens, 2, 3),
                 [{2: .8, 3: .9, 0: .4}, {0: .6, 1: .7, 2: .2}])
  assert_buffers(placement.place(tokens, 2, 4),
                 [{2: .8, 3: .9, 0: .4, 1: .3}, {0: .6, 1: .7, 2: .2, 3: .1}])


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


def test_place_gives_padding_no_slot():
  tokens = token_routing([[0, 1]] * 4, [[.6, .4], [.7, .3], [.8, .2], [.9, .1]],
                         valid=[[False] * 2, [True] * 2, [False] * 2, [True] * 2])
  assert_buffers(placement.place(tokens, 2, 2), [{1: .7, 3: .9}, {1: .3, 3: .1}])
  assert_buffers(placement.place(tokens, 2, 4), [{1: .7, 3: .9}, {1: .3, 3: .1}])


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


@pytest.mark.parametrize('order, prioritised, expected', [
  ('choice', False, [[2, 3, 0], [0, 1, 2]]), ('choice', True, [[3, 2, 1], [1, 0, 3]]),
  ('token', False, [[0, 1, 2], [0, 1, 2]]), ('token', True, [[3, 2, 1], [3, 2, 1]])])
def test_the_example_of_the_docstring(order, prioritised, expected):
  tokens = token_routing(*TWO_EACH)
  priority = tokens.weight[..., 0] if prioritised else None
  assert queues(placement.place(tokens, 2, 3, order=order, priority=priority)) == expected
  row, = (line.split() for line in placement.place.__doc__.splitlines() if line.split()[:2] == [
      repr(order), 'first' if prioritised else 'None'])
  assert [f't{t}' for e in expected for t in e] == [w for w in row if w[0] == 't'][:3] + [
      w for w in row if w[0] == 't'][4:7]


@pytest.mark.parametrize('capacity, expected', [
  (1, [[0], [0]]),                        # both choices of t0
  (2, [[0, 1], [0, 1]]),
  (3, [[0, 1, 2], [0, 1, 2]]),
  (4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
])
def test_place_token_by_token(capacity, expected):
  slots = placement.place(token_routing(*TWO_EACH), 2, capacity, order='token')
  assert queues(slots) == expected
  weight = [{0: .4, 1: .3, 2: .8, 3: .9}, {0: .6, 1: .7, 2: .2, 3: .1}]
  assert_buffers(slots, [{t: weight[e][t] for t in row} for e, row in enumerate(expected)])


@pytest.mark.parametrize('order, capacity, expected', [
  # First choices t3 t2 t1 t0, then second choices t3 t2 t1 t0.
  ('choice', 1, [[3], [1]]),
  ('choice', 3, [[3, 2, 1], [1, 0, 3]]),
  ('choice', 4, [[3, 2, 1, 0], [1, 0, 3, 2]]),
  # Both choices of t3, then of t2, ...
  ('token', 1, [[3], [3]]),
  ('token', 3, [[3, 2, 1], [3, 2, 1]]),
])
def test_place_by_priority(order, capacity, expected):
  tokens = token_routing(*TWO_EACH)
  priority = tokens.weight[..., 0]
  slots = placement.place(tokens, 2, capacity, order=order, priority=priority)
  assert queues(slots) == expected
  weight = [{0: .4, 1: .3, 2: .8, 3: .9}, {0: .6, 1: .7, 2: .2, 3: .1}]
  assert_buffers(slots, [{t: weight[e][t] for t in row} for e, row in enumerate(expected)])


def test_place_by_priority_serves_ties_in_sequence():
  tokens = token_routing([[0], [0], [0], [0]], [[.5], [.7], [.5], [.7]])
  slots = placement.place(tokens, 1, 3, priority=tokens.weight[..., 0])
  assert queues(slots) == [[1, 3, 0]]
  same = placement.place(token_routing(*TWO_EACH), 2, 3, priority=jnp.ones((1, 4)))
  jax.tree.map(np.testing.assert_array_equal, same, placement.place(token_routing(*TWO_EACH), 2, 3))


@pytest.mark.parametrize('order', ['choice', 'token'])
def test_a_choice_taken_back_takes_no_slot(order):
  # t0's second choice, e0, is refused: its slot goes to the next in line.
  valid = [[True, False], [True, True], [True, True], [True, False]]
  slots = placement.place(token_routing(*TWO_EACH, valid), 2, 3, order=order)
  # 'choice': e0 first t2 t3, then t1; e1 first t0 t1, then t2. 'token': t1 t2 t3; t0 t1 t2.
  assert queues(slots) == [[2, 3, 1] if order == 'choice' else [1, 2, 3], [0, 1, 2]]
  # A token without any valid choice is padding to everybody.
  valid = [[False] * 2, [True, False], [True, False], [False] * 2]
  slots = placement.place(token_routing(*TWO_EACH, valid), 2, 1, order=order,
                        priority=jnp.asarray([[9., 1., 1., 9.]]))
  assert_buffers(slots, [{2: .8}, {1: .7}])


def test_a_misspelt_order_is_an_error():
  with pytest.raises(KeyError, match='tokens'):
    placement.place(token_routing(*TWO_EACH), 2, 3, order='tokens')


def place_naively(tokens, num_experts, capacity, order='choice', priority=None):
  """Per group and expert {token: weight}, by the rule as it is written."""
  expert, weight, valid = (np.asarray(a) for a in (tokens.expert, tokens.weight, tokens.valid))
  G, S, K = expert.shape
  tables = [[{} for _ in range(num_experts)] for _ in range(G)]
  for g in range(G):
    turn = range(S) if priority is None else sorted(range(S), key=lambda s: -priority[g, s])
    line = ([(s, k) for k in range(K) for s in turn] if order == 'choice' else
            [(s, k) for s in turn for k in range(K)])
    for s, k in line:
      buffer = tables[g][expert[g, s, k]]
      if valid[g, s, k] and len(buffer) < capacity:
        buffer[s] = weight[g, s, k]
  return tables


@pytest.mark.parametrize('G, S, E, k, capacity', [
  (3, 9, 4, 2, 3), (2, 7, 5, 3, 1), (2, 8, 3, 3, 8), (1, 6, 1, 1, 4), (2, 1, 4, 2, 1)])
def test_place_equals_the_naive_rule(G, S, E, k, capacity):
  rng = np.random.default_rng(G * 100 + S)
  logits = jnp.asarray(rng.normal(size=(G, S, E)) * 2, jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) < 0.8)
  ties = rng.integers(0, 4, (G, S)).astype(np.float32)
  ways = [dict(order=order, priority=priority) for order in ('choice', 'token')
          for priority in (None, ties)]

  @jax.jit
  def placed(tokens):
    return [placement.place(tokens, E, capacity, **way) for way in ways]
  for tokens in (routing.top_k(logits, mask, k), routing.top_p(logits, mask, 0.7, k)):
    for way, slots in zip(ways, placed(tokens)):
      assert slots.index.shape == (G, E, capacity)
      for group, expected in enumerate(place_naively(tokens, E, capacity, **way)):
        assert_buffers(slots, expected, group)


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


def test_place_at_capacity_of_the_group_drops_nothing_and_cannot_see_later_tokens():
  rng = np.random.default_rng(3)
  logits = jnp.asarray(rng.normal(size=(1, 6, 3)), jnp.float32)
  later = logits.at[:, 4:].set(jnp.asarray(rng.normal(size=(1, 2, 3)) * 5, jnp.float32))
  first, second = (buffers(placement.place(routing.top_k(l, real(l), 2), 3, 6))
                   for l in (logits, later))
  assert sum(map(len, first)) == 12
  for a, b in zip(first, second, strict=True):
    assert {t: w for t, w in a.items() if t < 4} == {t: w for t, w in b.items() if t < 4}


def test_place_with_binding_capacity_leaks_backwards():
  """A later first choice takes an earlier second choice's slot: documented, as in public code."""
  alone = token_routing([[1, 0], [1, 0]], [[.6, .4], [.7, .3]])
  taken = token_routing([[1, 0], [0, 1]], [[.6, .4], [.7, .3]])
  assert buffers(placement.place(alone, 2, 1))[0].keys() == {0}
  assert buffers(placement.place(taken, 2, 1))[0].keys() == {1}


def test_place_token_by_token_is_causal_under_any_capacity():
  rng = np.random.default_rng(7)
  logits = jnp.asarray(rng.normal(size=(1, 6, 3)), jnp.float32)
  later = logits.at[:, 3:].set(jnp.asarray(rng.normal(size=(1, 3, 3)) * 5, jnp.float32))
  place = lambda l, order: buffers(placement.place(routing.top_k(l, real(l), 2), 3, 2, order=order))
  early = lambda tables: [{t: w for t, w in b.items() if t < 3} for b in tables]
  assert early(place(logits, 'token')) == early(place(later, 'token'))
  assert sum(map(len, early(place(logits, 'token')))) < 6   # and capacity did bind for them
  assert early(place(logits, 'choice')) != early(place(later, 'choice'))


@pytest.mark.parametrize('order', ['choice', 'token'])
def test_permuting_experts_permutes_the_buffers(order):
  rng = np.random.default_rng(9)
  logits = jnp.asarray(rng.normal(size=(2, 8, 5)), jnp.float32)
  permutation = np.array([3, 0, 4, 1, 2])

  def route(logits):
    tokens = routing.top_k(logits, real(logits), 2)
    return placement.place(tokens, 5, 3, order=order, priority=tokens.weight[..., 0])

  old, new = route(logits), route(logits[..., permutation])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, permutation], b, rtol=1e-6),
               jax.tree.map(lambda a: jnp.where(old.valid, a, 0), old),
               jax.tree.map(lambda a: jnp.where(new.valid, a, 0), new))
