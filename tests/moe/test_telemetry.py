"""What became of the tokens, counted by hand. G groups, S group size, E experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import placement, routing, telemetry

from .tables import token_routing

# Two groups of four tokens, three experts, two slots each. Group 0: t3 is padding; e0 holds t0 and
# t1, e1 holds t0, and its empty slot points at t2, whom nobody processes. Group 1: only t1 is real,
# and e2 holds it.
MASK = [[True, True, True, False], [False, True, False, False]]
INDEX = [[[0, 1], [0, 2], [0, 0]], [[0, 0], [0, 0], [1, 1]]]
VALID = [[[True, True], [True, False], [False, False]], [[False] * 2, [False] * 2, [True, False]]]
# Entropies in nats: ln 2, 0, ln 3, (padding) and ln 2 for the one token of group 1.
ROUTER = [[[1/2, 1/2, 0], [1, 0, 0], [1/3, 1/3, 1/3], [1/3, 1/3, 1/3]],
          [[1/3, 1/3, 1/3], [0, 1/2, 1/2], [1/2, 1/2, 0], [1, 0, 0]]]


def sums(asked, mask=MASK, index=INDEX, valid=VALID, probs=ROUTER):
  valid = jnp.asarray(valid)
  slots = routing.SlotRouting(jnp.asarray(index, jnp.int32), valid.astype(jnp.float32), valid)
  asked = None if asked is None else jnp.float32(asked)
  found = jax.jit(telemetry.sums)(
    slots, jnp.asarray(probs, jnp.float32), jnp.asarray(mask), asked)
  assert all(v.dtype == jnp.float32 for v in found.values())
  return {name: np.asarray(v) for name, v in found.items()}


def test_telemetry_of_token_choice():
  found = sums(asked=7)
  assert set(found) == {'tokens', 'load', 'assigned', 'dropped', 'unchosen', 'single', 'entropy'}
  assert found['tokens'] == 4
  np.testing.assert_array_equal(found['load'], [2, 1, 1])
  assert found['assigned'] == 7   # four real tokens asked for two experts each, but one for one
  assert found['dropped'] == 3    # and four slots are filled
  assert found['unchosen'] == 1   # t2 of group 0
  assert found['single'] == 2     # t1 of group 0 and t1 of group 1
  assert found['entropy'] == pytest.approx(2 * np.log(2) + np.log(3), rel=1e-6)


def test_telemetry_of_expert_choice_asks_for_what_it_fills():
  found = sums(asked=None)
  assert found['assigned'] == 4
  assert found['dropped'] == 0
  np.testing.assert_array_equal(found['load'], [2, 1, 1])
  assert found['unchosen'] == 1 and found['single'] == 2 and found['tokens'] == 4


@pytest.mark.parametrize('asked', [None, (6, 2)])
def test_telemetry_is_additive_over_groups(asked):
  whole = sums(asked and sum(asked))
  halves = [sums(asked and asked[i], MASK[i:i + 1], INDEX[i:i + 1], VALID[i:i + 1],
                      ROUTER[i:i + 1]) for i in range(2)]
  for name, value in whole.items():
    np.testing.assert_allclose(value, halves[0][name] + halves[1][name], rtol=1e-6)


@pytest.mark.parametrize('asked', [None, 0])
def test_telemetry_of_padding_is_zero(asked):
  found = sums(asked, mask=[[False] * 4] * 2, valid=[[[False] * 2] * 3] * 2)
  for name, value in found.items():
    np.testing.assert_array_equal(value, np.zeros_like(value), err_msg=name)


@pytest.mark.parametrize('router', ['expert_choice', 'top_k', 'top_p'])
def test_telemetry_of_a_router_agrees_with_counting(router):
  rng = np.random.default_rng(8)
  logits = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
  mask = jnp.asarray(rng.random((3, 10)) < 0.7)
  asked = None
  if router == 'expert_choice':
    slots = jax.jit(routing.expert_choice, static_argnums=2)(logits, mask, 2)
  else:
    tokens = (routing.top_k(logits, mask, 2) if router == 'top_k' else
              routing.top_p(logits, mask, 0.5, 3))
    asked = telemetry.choices_per_expert(tokens, 4).sum(0).sum()
    slots = jax.jit(placement.place, static_argnums=(1, 2))(tokens, 4, 2)
  experts_of = np.zeros((3, 10), int)
  load = np.zeros(4)
  for g, e, c in np.argwhere(np.asarray(slots.valid)):
    experts_of[g, slots.index[g, e, c]] += 1
    load[e] += 1
  found = jax.jit(telemetry.sums)(slots, jax.nn.softmax(logits), mask, asked)
  real = np.asarray(mask)
  np.testing.assert_array_equal(found['load'], load)
  assert found['unchosen'] == ((experts_of == 0) & real).sum() > 0
  assert found['single'] == ((experts_of == 1) & real).sum() > 0
  wanted = {'expert_choice': load.sum(), 'top_k': 2 * real.sum()}
  if router == 'top_p':   # as many experts as it takes to reach a half
    sums = np.cumsum(-np.sort(-np.asarray(jax.nn.softmax(logits)), axis=-1), axis=-1)
    wanted['top_p'] = (np.minimum((sums < 0.5).sum(-1) + 1, 3) * real).sum()
    assert real.sum() < wanted['top_p'] < 2 * real.sum()
  assert found['assigned'] == wanted[router]
  assert found['dropped'] == wanted[router] - load.sum()


def test_telemetry_without_capacity_reads_the_choices():
  # t0 asks for e1 and e0, t1 for e1 only, t2 is padding; nothing is dropped.
  tokens = token_routing([[1, 0], [1, 2], [0, 1]], [[.6, .3], [.5, .4], [.5, .3]],
                         valid=[[True, True], [True, False], [False, False]])
  probs = jnp.asarray([[[1/3, 2/3, 0], [0, 1, 0], [1/3, 1/3, 1/3]]], jnp.float32)
  found = jax.jit(telemetry.sums)(tokens, probs, jnp.asarray([[True, True, False]]))
  np.testing.assert_array_equal(found['load'], [1, 2, 0])
  assert {name: float(found[name]) for name in ('tokens', 'assigned', 'dropped', 'unchosen',
                                                'single')} == {
      'tokens': 2, 'assigned': 3, 'dropped': 0, 'unchosen': 0, 'single': 1}
  # As of slots for everybody.
  slots = placement.place(tokens, 3, 3)
  same = telemetry.sums(slots, probs, jnp.asarray([[True, True, False]]),
                        telemetry.choices_per_expert(tokens, 3).sum(0).sum())
  jax.tree.map(np.testing.assert_array_equal, found, same)
