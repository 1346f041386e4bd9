"""Auxiliary losses and telemetry against hand tables. G groups, S group size, E experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import balance, routing

from .tables import token_routing

load_balance = jax.jit(balance.load_balance)


def routed(expert, mask=None):
  """TokenRouting of one group from an (S, K) list of experts."""
  expert = jnp.asarray([expert], jnp.int32)
  mask = jnp.ones(expert.shape[:2], bool) if mask is None else jnp.asarray([mask])
  valid = jnp.broadcast_to(mask[..., None], expert.shape)
  return routing.TokenRouting(expert, jnp.where(valid, 0.5, 0.0).astype(jnp.float32), valid), mask


def loss(probs, expert, mask=None):
  tokens, mask = routed(expert, mask)
  found = load_balance(jnp.asarray([probs], jnp.float32), tokens, mask)
  assert found.shape == (1,) and found.dtype == jnp.float32
  return float(found[0])


# f = (3/4, 1/4); p0 = (3/4 + 3/4 + 1/2 + 1/4) / 4 = 9/16, p1 = 7/16.
# 2 * (3/4 * 9/16 + 1/4 * 7/16) = 2 * 34/64 = 17/16.
PROBS = [[3/4, 1/4], [3/4, 1/4], [1/2, 1/2], [1/4, 3/4]]
TOP_1 = [[0], [0], [0], [1]]


def test_load_balance_top_1():
  assert loss(PROBS, TOP_1) == pytest.approx(17/16, rel=1e-6)


def test_load_balance_top_2_fractions_sum_to_one():
  # f = (3, 2, 1) / 6; p0 = (1/2 + 1/2 + 2/3) / 3 = 5/9, p1 = (1/3 + 1/6 + 1/6) / 3 = 2/9 = p2.
  # 3 * (1/2 * 5/9 + 1/3 * 2/9 + 1/6 * 2/9) = 3 * (5/18 + 2/18) = 7/6; flaxformer's would be 7/3.
  probs = [[1/2, 1/3, 1/6], [1/2, 1/6, 1/3], [2/3, 1/6, 1/6]]
  assert loss(probs, [[0, 1], [0, 2], [0, 1]]) == pytest.approx(7/6, rel=1e-6)


@pytest.mark.parametrize('probs, expert', [
  (PROBS, [[0], [1], [0], [1]]),                  # equal loads, unequal probabilities
  (PROBS, [[0, 1]] * 4),                          # every expert for every token
  ([[1/4] * 4] * 4, [[0], [1], [2], [3]]),
  ([[1/4] * 4] * 4, [[0], [0], [0], [0]]),        # uniform probabilities, collapsed load
  ([[1/4] * 4] * 4, [[0, 1], [2, 3], [1, 0], [3, 2]]),
])
def test_load_balance_is_one_when_either_factor_is_uniform(probs, expert):
  assert loss(probs, expert) == 1.0


@pytest.mark.parametrize('E', [1, 2, 8])
def test_load_balance_of_a_collapsed_router_is_the_number_of_experts(E):
  assert loss([[1.0] + [0.0] * (E - 1)] * 3, [[0]] * 3) == E


def test_load_balance_does_not_see_padding():
  probs = [[0.0, 1.0], *PROBS[:2], [1.0, 0.0], *PROBS[2:]]
  expert = [[1], [0], [0], [0], [0], [1]]
  mask = [False, True, True, False, True, True]
  assert loss(probs, expert, mask) == pytest.approx(17/16, rel=1e-6)


def test_load_balance_is_per_group_and_zero_for_padding():
  probs = jnp.asarray([PROBS, PROBS, PROBS], jnp.float32)
  expert = jnp.asarray([TOP_1, TOP_1, [[1], [1], [0], [0]]], jnp.int32)
  mask = jnp.asarray([[True] * 4, [False] * 4, [True, False, False, True]])
  valid = mask[..., None]
  tokens = routing.TokenRouting(expert, valid.astype(jnp.float32), valid)
  found = balance.load_balance(probs, tokens, mask)
  # Last group: tokens 0 and 3 choose e1 and e0, a balanced load.
  np.testing.assert_allclose(found, [17/16, 0, 1], rtol=1e-6)
  assert found.dtype == jnp.float32


def test_load_balance_gradient_flows_through_the_mean_probability_only():
  probs = jnp.asarray([PROBS, PROBS], jnp.float32)
  mask = jnp.asarray([[True, True, False, True], [False] * 4])
  expert = jnp.asarray([TOP_1, TOP_1], jnp.int32)
  tokens = routing.TokenRouting(expert, mask[..., None].astype(jnp.float32), mask[..., None])
  grad = jax.jit(jax.grad(lambda p: jnp.sum(balance.load_balance(p, tokens, mask))))(probs)
  # E f_e / n with f = (2/3, 1/3) and n = 3 real tokens: 4/9 and 2/9; padding has none.
  expected = np.where(np.asarray(mask)[..., None], [4/9, 2/9], 0.0)
  np.testing.assert_allclose(grad, expected, rtol=1e-6)


def test_load_balance_through_the_router_pushes_down_the_busy_expert():
  logits = jnp.asarray([np.log(PROBS)], jnp.float32)
  mask = jnp.ones((1, 4), bool)

  def of_logits(logits):
    tokens = routing.top_k(logits, mask, 1)
    return balance.load_balance(jax.nn.softmax(logits), tokens, mask)[0]

  # dL/dl0 of a token = p0 (a0 - (p0 a0 + p1 a1)) = p0 p1 (a0 - a1), a = E f / n = (3/8, 1/8).
  expected = [[p * q / 4, -p * q / 4] for p, q in PROBS]
  np.testing.assert_allclose(jax.jit(jax.grad(of_logits))(logits)[0], expected, rtol=1e-5)


def test_router_z_sums_over_real_tokens():
  # logsumexp of log(1, 2, 3) is log 6, of log(2, 1, 1) log 4, of log(5, 2, 3) log 10.
  odds = [[[1, 2, 3], [2, 1, 1], [5, 2, 3]], [[1, 2, 3], [2, 1, 1], [1, 1, 1]]]
  logits = jnp.asarray(np.log(odds), jnp.float32)
  mask = jnp.asarray([[True, False, True], [False] * 3])
  found = balance.router_z(logits, mask)
  np.testing.assert_allclose(found, [np.log(6)**2 + np.log(10)**2, 0], rtol=1e-6)
  assert found.dtype == jnp.float32
  # d lse^2 = 2 lse softmax.
  grad = np.asarray(jax.jit(jax.grad(lambda l: jnp.sum(balance.router_z(l, mask))))(logits))
  np.testing.assert_allclose(grad[0, 0], 2 * np.log(6) * np.array([1/6, 1/3, 1/2]), rtol=1e-5)
  np.testing.assert_array_equal(grad[0, 1], 0)
  np.testing.assert_array_equal(grad[1], 0)


def test_router_z_of_large_and_of_bfloat16_logits():
  mask = jnp.ones((1, 1), bool)
  large = balance.router_z(jnp.full((1, 1, 4), 1000.0), mask)
  np.testing.assert_allclose(large, [(1000 + np.log(4))**2], rtol=1e-6)
  low = balance.router_z(jnp.full((1, 1, 4), 3.0, jnp.bfloat16), mask)
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low, [(3 + np.log(4))**2], rtol=1e-6)


# Two groups of four tokens, three experts, two slots each. Group 0: t3 is padding; e0 holds t0 and
# t1, e1 holds t0, and its empty slot points at t2, whom nobody processes. Group 1: only t1 is real,
# and e2 holds it.
MASK = [[True, True, True, False], [False, True, False, False]]
INDEX = [[[0, 1], [0, 2], [0, 0]], [[0, 0], [0, 0], [1, 1]]]
VALID = [[[True, True], [True, False], [False, False]], [[False] * 2, [False] * 2, [True, False]]]
# Entropies in nats: ln 2, 0, ln 3, (padding) and ln 2 for the one token of group 1.
ROUTER = [[[1/2, 1/2, 0], [1, 0, 0], [1/3, 1/3, 1/3], [1/3, 1/3, 1/3]],
          [[1/3, 1/3, 1/3], [0, 1/2, 1/2], [1/2, 1/2, 0], [1, 0, 0]]]


def telemetry(asked, mask=MASK, index=INDEX, valid=VALID, probs=ROUTER):
  valid = jnp.asarray(valid)
  slots = routing.SlotRouting(jnp.asarray(index, jnp.int32), valid.astype(jnp.float32), valid)
  asked = None if asked is None else jnp.float32(asked)
  found = jax.jit(balance.telemetry)(
    slots, jnp.asarray(probs, jnp.float32), jnp.asarray(mask), asked)
  assert all(v.dtype == jnp.float32 for v in found.values())
  return {name: np.asarray(v) for name, v in found.items()}


def test_telemetry_of_token_choice():
  found = telemetry(asked=7)
  assert set(found) == {'tokens', 'load', 'assigned', 'dropped', 'unchosen', 'single', 'entropy'}
  assert found['tokens'] == 4
  np.testing.assert_array_equal(found['load'], [2, 1, 1])
  assert found['assigned'] == 7   # four real tokens asked for two experts each, but one for one
  assert found['dropped'] == 3    # and four slots are filled
  assert found['unchosen'] == 1   # t2 of group 0
  assert found['single'] == 2     # t1 of group 0 and t1 of group 1
  assert found['entropy'] == pytest.approx(2 * np.log(2) + np.log(3), rel=1e-6)


def test_telemetry_of_expert_choice_asks_for_what_it_fills():
  found = telemetry(asked=None)
  assert found['assigned'] == 4
  assert found['dropped'] == 0
  np.testing.assert_array_equal(found['load'], [2, 1, 1])
  assert found['unchosen'] == 1 and found['single'] == 2 and found['tokens'] == 4


@pytest.mark.parametrize('asked', [None, (6, 2)])
def test_telemetry_is_additive_over_groups(asked):
  whole = telemetry(asked and sum(asked))
  halves = [telemetry(asked and asked[i], MASK[i:i + 1], INDEX[i:i + 1], VALID[i:i + 1],
                      ROUTER[i:i + 1]) for i in range(2)]
  for name, value in whole.items():
    np.testing.assert_allclose(value, halves[0][name] + halves[1][name], rtol=1e-6)


@pytest.mark.parametrize('asked', [None, 0])
def test_telemetry_of_padding_is_zero(asked):
  found = telemetry(asked, mask=[[False] * 4] * 2, valid=[[[False] * 2] * 3] * 2)
  for name, value in found.items():
    np.testing.assert_array_equal(value, np.zeros_like(value), err_msg=name)


@pytest.mark.parametrize('router', ['expert_choice', 'top_k', 'top_p'])
def test_telemetry_of_a_router_agrees_with_counting(router):
  rng = np.random.default_rng(8)
  logits = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
  mask = jnp.asarray(rng.random((3, 10)) < 0.7)
  asked = None
  if router == 'expert_choice':
    slots = routing.expert_choice(logits, mask, 2)
  else:
    tokens = (routing.top_k(logits, mask, 2) if router == 'top_k' else
              routing.top_p(logits, mask, 0.5, 3))
    asked = balance.asked(tokens, 4).sum()
    slots = routing.place(tokens, 4, 2)
  experts_of = np.zeros((3, 10), int)
  load = np.zeros(4)
  for g, e, c in np.argwhere(np.asarray(slots.valid)):
    experts_of[g, slots.index[g, e, c]] += 1
    load[e] += 1
  found = balance.telemetry(slots, jax.nn.softmax(logits), mask, asked)
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
  found = balance.telemetry(tokens, probs, jnp.asarray([[True, True, False]]))
  np.testing.assert_array_equal(found['load'], [1, 2, 0])
  assert {name: float(found[name]) for name in ('tokens', 'assigned', 'dropped', 'unchosen',
                                                'single')} == {
      'tokens': 2, 'assigned': 3, 'dropped': 0, 'unchosen': 0, 'single': 1}
  # As of slots for everybody.
  slots = routing.place(tokens, 3, 3)
  same = balance.telemetry(slots, probs, jnp.asarray([[True, True, False]]),
                           balance.asked(tokens, 3).sum())
  jax.tree.map(np.testing.assert_array_equal, found, same)
