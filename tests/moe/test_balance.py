"""Auxiliary losses and balancing biases against hand tables. G groups, S group size, E experts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import balance, routing

from .tables import real, token_routing

load_balance = jax.jit(balance.load_balance, static_argnames='first_only')
load = jax.jit(balance.smooth_load, static_argnums=3, static_argnames='exclude_self')


PROBS = [[3/4, 1/4], [3/4, 1/4], [1/2, 1/2], [1/4, 3/4]]
TOP_1 = [[0], [0], [0], [1]]
THREE = [[1/2, 1/3, 1/6], [1/2, 1/6, 1/3], [2/3, 1/6, 1/6]]   # means 5/9, 2/9, 2/9
FLAT = [[1/4] * 4] * 4


@pytest.mark.parametrize('probs, expert, first_only, expected', [
  # f = (3/4, 1/4); p0 = (3/4 + 3/4 + 1/2 + 1/4) / 4 = 9/16, p1 = 7/16.
  # 2 * (3/4 * 9/16 + 1/4 * 7/16) = 2 * 34/64 = 17/16.
  (PROBS, TOP_1, False, 17/16),
  # Padding (None) in between.
  ([[0, 1], *PROBS[:2], [1, 0], *PROBS[2:]], [None, [0], [0], None, [0], [1]], False, 17/16),
  # f = (3, 2, 1) / 6: 3 * (1/2 * 5/9 + 1/3 * 2/9 + 1/6 * 2/9) = 7/6; flaxformer's would be 7/3.
  (THREE, [[0, 1], [0, 2], [0, 1]], False, 7/6),
  (THREE, [[0, 1], [2, 0], [0, 1]], False, 7/6),
  # Of first choices f = (2, 0, 1) / 3: 3 * (2/3 * 5/9 + 1/3 * 2/9).
  (THREE, [[0, 1], [2, 0], [0, 1]], True, 4/3),
  # Second choices taken back, -e for e: f = (3, 1, 0) / 4: 3 * (3/4 * 5/9 + 1/4 * 2/9).
  (THREE, [[0, 1], [0, -2], [0, -1]], False, 17/12),
  # Exactly 1 where loads or probabilities are uniform: every expert for every token, or a collapsed
  # load.
  (PROBS, [[0], [1], [0], [1]], False, 1), (PROBS, [[0, 1]] * 4, False, 1),
  (FLAT, [[0], [1], [2], [3]], False, 1), (FLAT, [[0]] * 4, False, 1),
  (FLAT, [[0, 1], [2, 3], [1, 0], [3, 2]], False, 1),
  # E for a router that has collapsed.
  *(([[1.0] + [0.0] * (E - 1)] * 3, [[0]] * 3, False, E) for E in (1, 2, 8)),
])
def test_load_balance_of_all_and_of_first_choices(probs, expert, first_only, expected):
  mask = jnp.asarray([[row is not None for row in expert]])
  K = max(len(row) for row in expert if row)
  expert = jnp.asarray([[row or [0] * K for row in expert]], jnp.int32)
  valid = mask[..., None] & (expert >= 0)
  tokens = routing.TokenRouting(jnp.abs(expert), jnp.where(valid, 0.5, 0.0), valid)
  found = load_balance(jnp.asarray([probs], jnp.float32), tokens, mask, first_only=first_only)
  assert found.shape == (1,) and found.dtype == jnp.float32
  np.testing.assert_allclose(found, [expected], rtol=0 if isinstance(expected, int) else 1e-6)


def test_load_balance_is_per_group_and_zero_for_padding():
  probs = jnp.asarray([PROBS, PROBS, PROBS], jnp.float32)
  expert = jnp.asarray([TOP_1, TOP_1, [[1], [1], [0], [0]]], jnp.int32)
  mask = jnp.asarray([[True] * 4, [False] * 4, [True, False, False, True]])
  valid = mask[..., None]
  tokens = routing.TokenRouting(expert, valid.astype(jnp.float32), valid)
  found = load_balance(probs, tokens, mask)
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


def test_entropy_penalty_sums_over_real_tokens():
  probs = jnp.asarray([[[1/2, 1/2, 0], [1, 0, 0], [1/3, 1/3, 1/3]], [[1/2, 1/4, 1/4]] * 3])
  mask = jnp.asarray([[True, True, False], [True, False, True]])
  found = balance.entropy_penalty(probs, mask)
  # ln 2 + 0; twice 1/2 ln 2 + 1/2 ln 4 = 3/2 ln 2.
  np.testing.assert_allclose(found, [math.log(2), 3 * math.log(2)], rtol=1e-6)
  assert found.dtype == jnp.float32


def test_entropy_penalty_gradient_sharpens_and_stays_finite():
  logits = jnp.asarray([[[math.log(3), 0.0], [0.0, 0.0], [0.0, -200.0]]])
  total = lambda l: balance.entropy_penalty(jax.nn.softmax(l), real(l)).sum()
  grad = np.asarray(jax.jit(jax.grad(total))(logits))[0]
  # dH/dl0 = -p0 p1 (ln p0 - ln p1) = -3/16 ln 3: descent makes the likelier expert likelier.
  np.testing.assert_allclose(grad[0], [-3/16 * math.log(3), 3/16 * math.log(3)], rtol=1e-5)
  np.testing.assert_allclose(grad[1:], 0, atol=1e-7)   # flat, and sure beyond float32


def test_importance_is_the_squared_coefficient_of_variation():
  mask = jnp.ones((4, 2), bool).at[1, 1].set(False).at[3].set(False)
  weights = jnp.asarray([[[2, 1], [1, 0]],            # sums 3 and 1: mean 2, variance 1
                         [[1/5, 4/5], [9, 0]],        # padding: 1/5 and 4/5, mean 1/2, var 9/100
                         [[1/4, 3/4], [3/4, 1/4]],    # even
                         [[1, 2], [3, 4]]], jnp.float32)   # padding only
  found = balance.importance(weights, mask)
  np.testing.assert_allclose(found, [1/4, 9/25, 0, 0], rtol=1e-5, atol=1e-12)
  assert found.dtype == jnp.float32
  # One expert of E has all: mean 1/E, E[x^2] / mean^2 - 1 = E - 1.
  np.testing.assert_allclose(balance.importance(jnp.eye(4)[:1, None], jnp.ones((1, 1), bool)), [3])


def test_importance_gradient():
  weights = jnp.asarray([[[2, 1], [1, 0]], [[1, 1], [2, 2]], [[1, 2], [3, 4]]], jnp.float32)
  mask = jnp.asarray([[True, True], [True, False], [False, False]])
  grad = np.asarray(jax.jit(jax.grad(lambda w: balance.importance(w, mask).sum()))(weights))
  # ((a - b) / (a + b))^2 of sums a = 3, b = 1: 4 b (a - b) / (a + b)^3 and -4 a (a - b) / ...
  np.testing.assert_allclose(grad[0], [[1/8, -3/8]] * 2, rtol=1e-5)
  np.testing.assert_allclose(grad[1:], 0, atol=1e-7)   # even, and padding


def test_gates_are_the_weights_by_expert():
  tokens = token_routing([[2, 0], [1, 0], [0, 1]], [[.6, .4], [.7, .3], [.8, .2]],
                         valid=[[True, True], [True, False], [False, False]])
  found = balance.gates(tokens, 3)
  np.testing.assert_allclose(found, [[[.4, 0, .6], [0, .7, 0], [0, 0, 0]]], rtol=1e-6)


def normal(x):
  """Phi, the standard normal's distribution function."""
  return (1 + math.erf(x / math.sqrt(2))) / 2


def cv_squared(values):
  mean = sum(values) / len(values)
  return sum((v - mean)**2 for v in values) / len(values) / mean**2


# One token: e1 wins, e0 is second, e2 last.
CLEAN, NOISY = [[[0., 1., -1.]]], [[[0.5, 2., -1.]]]


@pytest.mark.parametrize('k, exclude_self, thresholds', [
  (1, True, [2, 0.5, 2]),       # to win, e1 has to beat e0 and the others e1
  (1, False, [2, 2, 2]),        # and here e1 its own lucky draw
  (2, True, [-1, -1, 0.5]),     # to be among two: e0 and e1 have to beat e2
  (2, False, [0.5, 0.5, 0.5]),
  (3, False, [-1, -1, -1]),
])
def test_load(k, exclude_self, thresholds):
  for std in (1.0, 0.5, [0.5, 2.0, 1.0]):   # the last one learnt, for each token and expert
    expected = cv_squared([normal((c - t) / s) for c, t, s in zip(
        CLEAN[0][0], thresholds, np.broadcast_to(std, 3))])
    found = load(jnp.asarray(CLEAN), jnp.asarray(NOISY), jnp.asarray(std), k,
                 jnp.ones((1, 1), bool), exclude_self=exclude_self)
    np.testing.assert_allclose(found, [expected], rtol=2e-5)
    assert found.dtype == jnp.float32


def test_load_sums_over_real_tokens_first():
  clean = jnp.asarray([[CLEAN[0][0], [1., 0., 0.], [9., 0., 5.]]] * 2)
  noisy = jnp.asarray([[NOISY[0][0], [1., 0.5, 0.], [9., 0., 5.]]] * 2)
  mask = jnp.asarray([[True, True, False], [False] * 3])
  # The second token's thresholds at k = 1: e0 has to beat 1/2, the others 1.
  loads = [normal(-2) + normal(0.5), normal(0.5) + normal(-1), normal(-3) + normal(-1)]
  found = load(clean, noisy, 1.0, 1, mask, exclude_self=True)
  np.testing.assert_allclose(found, [cv_squared(loads), 0], rtol=2e-5)


def test_load_of_ties_and_of_all_experts():
  mask, logits = jnp.ones((1, 1), bool), jnp.asarray([[[1., 1., 0.]]])
  # k = 1: e0 and e1 have to beat each other.
  found = load(logits, logits, 1.0, 1, mask, exclude_self=True)
  np.testing.assert_allclose(found, [cv_squared([normal(0), normal(0), normal(-1)])], rtol=2e-5)
  # k = E: every expert is chosen whatever its noise.
  loss = lambda clean: balance.smooth_load(clean, clean, 1.0, 3, mask, exclude_self=True)[0]
  value, grad = jax.value_and_grad(loss)(logits)
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize('exclude_self', [True, False])
def test_load_gradient_pushes_down_the_busy_expert(exclude_self):
  logits = jnp.asarray([[[1., 0.]]])
  loss = lambda l: balance.smooth_load(l, l, 1.0, 1, real(l), exclude_self=exclude_self)[0]
  grad = np.asarray(jax.jit(jax.grad(loss))(logits))[0, 0]
  density = math.exp(-0.5) / math.sqrt(2 * math.pi)   # of the normal at 1
  if exclude_self:   # P = Phi(1), Phi(-1): loss (2 Phi(1) - 1)^2
    expected = 4 * density * (2 * normal(1) - 1)
  else:              # the threshold is l0 itself: P = Phi(0), Phi(l1 - l0), only the second moves
    a, b = normal(0), normal(-1)
    expected = 4 * a * (a - b) / (a + b)**3 * density
  np.testing.assert_allclose(grad, [expected, -expected], rtol=1e-4)


def test_load_gradient_is_finite_when_noise_vanishes():
  clean = jnp.asarray([[[3., -2., 0.]]])

  def loss(clean, std):
    return balance.smooth_load(clean, clean, std, 1, real(clean), exclude_self=True)[0]

  for std in (0.0, 1e-30, 1e-3):
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(clean, jnp.full((1, 1, 3), std))
    np.testing.assert_allclose(value, 2, rtol=1e-5)   # one expert of three has the whole load
    for grad in grads:
      np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_update_bias_moves_one_step_against_the_load():
  found = balance.update_bias(jnp.asarray([0., 0.1, -0.1, 0.2]), jnp.asarray([6., 2., 1., 3.]), .01)
  # The mean is 3: down, up, up, stay.
  np.testing.assert_allclose(found, [-0.01, 0.11, -0.09, 0.2], rtol=1e-6)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(balance.update_bias(found, jnp.zeros(4), 0.01), found)
