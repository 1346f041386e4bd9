"""Placement of token choices into slots: G groups, S group size, E experts, K selected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import routing

from .tables import ODDS, assert_buffers, buffers, logs, real


def token_routing(expert, weight, valid=None):
  """TokenRouting of one group from (S, K) lists."""
  expert = jnp.asarray([expert], jnp.int32)
  valid = jnp.ones_like(expert, bool) if valid is None else jnp.asarray([valid])
  return routing.TokenRouting(expert, jnp.where(valid, jnp.asarray([weight], jnp.float32), 0.0),
                              valid)


def test_place_drops_the_later_tokens_however_sure_they_are():
  tokens = token_routing([[0], [0], [1], [0]], [[.1], [.2], [.3], [.9]])
  assert_buffers(routing.place(tokens, 2, 2), [{0: .1, 1: .2}, {2: .3}])
  assert_buffers(routing.place(tokens, 2, 1), [{0: .1}, {2: .3}])
  slots = routing.place(tokens, 2, 2)
  assert slots.index.shape == slots.weight.shape == slots.valid.shape == (1, 2, 2)
  assert (slots.index >= 0).all() and (slots.index < 4).all()


def test_place_puts_all_first_choices_before_any_second():
  # In plain token order expert 0 would fill with t0, t1 (second choices) and drop t2 and t3.
  tokens = token_routing([[1, 0], [1, 0], [0, 1], [0, 1]], [[.6, .4], [.7, .3], [.8, .2], [.9, .1]])
  assert_buffers(routing.place(tokens, 2, 2), [{2: .8, 3: .9}, {0: .6, 1: .7}])
  # With room for three, the first second choice in sequence order follows.
  assert_buffers(routing.place(tokens, 2, 3),
                 [{2: .8, 3: .9, 0: .4}, {0: .6, 1: .7, 2: .2}])
  assert_buffers(routing.place(tokens, 2, 4),
                 [{2: .8, 3: .9, 0: .4, 1: .3}, {0: .6, 1: .7, 2: .2, 3: .1}])


def test_place_hand_table_of_the_softmax():
  logits = logs(ODDS)
  tokens = routing.top_k(logits, real(logits), 2)
  # First choices: e0 t1 t2, e1 t3, e2 t0.
  # Second, in order: t0 e1, t1 e1 (full), t2 e1 (full), t3 e2.
  assert_buffers(routing.place(tokens, 3, 2),
                 [{1: 2/3, 2: 1/2}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}])
  # Weights are renormalised over what was asked for, not over what was placed.
  tokens = routing.top_k(logits, real(logits), 2, renormalize=True)
  assert_buffers(routing.place(tokens, 3, 2),
                 [{1: 4/5, 2: 2/3}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}])


def test_place_gives_padding_no_slot():
  tokens = token_routing([[0, 1]] * 4, [[.6, .4], [.7, .3], [.8, .2], [.9, .1]],
                         valid=[[False] * 2, [True] * 2, [False] * 2, [True] * 2])
  assert_buffers(routing.place(tokens, 2, 2), [{1: .7, 3: .9}, {1: .3, 3: .1}])
  assert_buffers(routing.place(tokens, 2, 4), [{1: .7, 3: .9}, {1: .3, 3: .1}])


def test_place_gradient_stops_at_dropped_choices_only():
  tokens = token_routing([[0], [0], [1], [0]], [[.1], [.2], [.3], [.9]])

  def total(weight):
    routed = routing.TokenRouting(tokens.expert, weight, tokens.valid)
    return jnp.sum(routing.place(routed, 2, 2).weight)

  grad = jax.jit(jax.grad(total))(tokens.weight)
  np.testing.assert_array_equal(np.asarray(grad)[0, :, 0], [1, 1, 1, 0])


def place_naively(tokens, num_experts, capacity):
  """Per group and expert {token: weight}, by the rule as it is written."""
  expert, weight, valid = (np.asarray(a) for a in (tokens.expert, tokens.weight, tokens.valid))
  G, S, K = expert.shape
  tables = [[{} for _ in range(num_experts)] for _ in range(G)]
  for g in range(G):
    for k in range(K):
      for s in range(S):
        buffer = tables[g][expert[g, s, k]]
        if valid[g, s, k] and len(buffer) < capacity:
          buffer[s] = weight[g, s, k]
  return tables


@pytest.mark.parametrize('G, S, E, k, capacity', [
  (3, 9, 4, 2, 3), (2, 7, 5, 3, 1), (2, 8, 3, 3, 8), (1, 6, 1, 1, 4), (2, 1, 4, 2, 1),
  (2, 10, 2, 2, 5),
])
def test_place_equals_the_naive_rule(G, S, E, k, capacity):
  rng = np.random.default_rng(G * 100 + S)
  logits = jnp.asarray(rng.normal(size=(G, S, E)) * 2, jnp.float32)
  mask = jnp.asarray(rng.random((G, S)) < 0.8)
  tokens = routing.top_k(logits, mask, k)
  slots = jax.jit(routing.place, static_argnums=(1, 2))(tokens, E, capacity)
  assert slots.index.shape == (G, E, capacity)
  for group, expected in enumerate(place_naively(tokens, E, capacity)):
    assert_buffers(slots, expected, group)


def test_place_at_capacity_of_the_group_drops_nothing_and_cannot_see_later_tokens():
  rng = np.random.default_rng(3)
  logits = jnp.asarray(rng.normal(size=(1, 6, 3)), jnp.float32)
  later = logits.at[:, 4:].set(jnp.asarray(rng.normal(size=(1, 2, 3)) * 5, jnp.float32))
  first, second = (buffers(routing.place(routing.top_k(l, real(l), 2), 3, 6))
                   for l in (logits, later))
  assert sum(map(len, first)) == 12
  for a, b in zip(first, second, strict=True):
    assert {t: w for t, w in a.items() if t < 4} == {t: w for t, w in b.items() if t < 4}


def test_place_with_binding_capacity_leaks_backwards():
  """A later first choice takes an earlier second choice's slot: documented, as in public code."""
  alone = token_routing([[1, 0], [1, 0]], [[.6, .4], [.7, .3]])
  taken = token_routing([[1, 0], [0, 1]], [[.6, .4], [.7, .3]])
  assert buffers(routing.place(alone, 2, 1))[0].keys() == {0}
  assert buffers(routing.place(taken, 2, 1))[0].keys() == {1}
