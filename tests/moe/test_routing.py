"""Capacity, expert choice and what all routers share, against tables worked by hand.

The logits are logs of small integers, so a token's probabilities are those integers over their sum.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import routing

from .tables import ODDS, assert_buffers, buffers, choices, logs, real


@pytest.mark.parametrize('tokens, experts, factor, minimum, expected', [
  (64, 8, 2.0, 1, 16),    # 16 exactly
  (100, 3, 1.0, 1, 33),   # 33.33
  (50, 3, 1.0, 1, 17),    # 16.67
  (10, 4, 1.0, 1, 2),     # 2.5, a half goes to the even neighbour: down
  (14, 4, 1.0, 1, 4),     # 3.5, up
  (6, 4, 1.0, 1, 2),      # 1.5, up
  (8, 4, 1.25, 1, 2),     # 2.5, down
  (18, 4, 1.0, 1, 4),     # 4.5, down
  (2, 4, 1.0, 1, 1),      # 0.5 -> 0, lifted to the minimum
  (16, 8, 1.0, 4, 4),     # 2, lifted to flaxformer's floor
  (64, 8, 1.0, 4, 8),     # 8, above the floor
  (3, 8, 1.0, 4, 3),      # a group of 3 has no 4 tokens to give
  (12, 4, 4.0, 1, 12),    # factor E: every token
  (12, 4, 9.0, 1, 12),    # never more than the group
  (7, 1, 1.0, 1, 7),      # one expert takes all
  (1, 64, 1.0, 1, 1),     # decoding one token
])
def test_capacity(tokens, experts, factor, minimum, expected):
  found = routing.expert_capacity(tokens, experts, factor, minimum)
  assert found == expected
  assert type(found) is int


def test_capacity_minimum_is_one_by_default():
  assert routing.expert_capacity(4, 64, 1.0) == 1


def test_expert_choice_takes_each_experts_most_probable_tokens():
  logits = logs(ODDS)
  slots = routing.expert_choice(logits, real(logits), 2)
  # Column 0: 1/6 2/3 1/2 1/5; column 1: 1/3 1/6 1/4 2/5; column 2: 1/2 1/6 1/4 2/5.
  assert_buffers(slots, [{1: 2/3, 2: 1/2}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}])
  assert slots.index.shape == slots.weight.shape == slots.valid.shape == (1, 3, 2)


def test_expert_choice_leaves_a_token_without_expert():
  logits = logs(ODDS)
  slots = routing.expert_choice(logits, real(logits), 1)
  assert_buffers(slots, [{1: 2/3}, {3: 2/5}, {0: 1/2}])  # nobody takes t2


def test_expert_choice_renormalized():
  logits = logs(ODDS)
  slots = routing.expert_choice(logits, real(logits), 2, renormalize=True)
  # t0 has 1/3 and 1/2 of 5/6; t3 has 2/5 twice; t1 and t2 have one expert each, so 1.
  assert_buffers(slots, [{1: 1, 2: 1}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}])


def test_expert_choice_renormalized_leaves_the_unchosen_at_zero():
  logits = logs(ODDS)
  slots = routing.expert_choice(logits, real(logits), 1, renormalize=True)
  assert_buffers(slots, [{1: 1}, {3: 1}, {0: 1}])
  assert np.isfinite(slots.weight).all()


def test_expert_choice_with_capacity_of_the_whole_group():
  logits = logs(ODDS)
  probs = np.asarray(ODDS) / np.sum(ODDS, axis=1, keepdims=True)
  slots = routing.expert_choice(logits, real(logits), 4)
  assert_buffers(slots, [dict(enumerate(probs[:, e])) for e in range(3)])
  slots = routing.expert_choice(logits, real(logits), 4, renormalize=True)  # sums are 1 already
  assert_buffers(slots, [dict(enumerate(probs[:, e])) for e in range(3)])


def test_expert_choice_passes_over_padding():
  logits = logs(ODDS)
  mask = jnp.asarray([[True, False, True, True]])
  # Without t1 (2/3, expert 0's favourite) expert 0 takes t2 (1/2) and t3 (1/5).
  slots = routing.expert_choice(logits, mask, 2)
  assert_buffers(slots, [{2: 1/2, 3: 1/5}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}])
  # t3 now has 1/5, 2/5 and 2/5: already a sum of 1.
  slots = routing.expert_choice(logits, mask, 2, renormalize=True)
  assert_buffers(slots, [{2: 1, 3: 1/5}, {3: 2/5, 0: 2/5}, {0: 3/5, 3: 2/5}])


@pytest.mark.parametrize('renormalize', [False, True])
def test_expert_choice_with_fewer_real_tokens_than_capacity(renormalize):
  logits = logs(ODDS)
  mask = jnp.asarray([[True, False, True, False]])
  slots = routing.expert_choice(logits, mask, 3, renormalize=renormalize)
  assert_buffers(slots, [{0: 1/6, 2: 1/2}, {0: 1/3, 2: 1/4}, {0: 1/2, 2: 1/4}])
  assert slots.valid.sum() == 6
  assert (slots.index >= 0).all() and (slots.index < 4).all()  # an empty slot still reads in range


def test_expert_choice_ranks_an_impossible_real_token_before_padding():
  # t1's probability for expert 1 is exactly 0 in float32; padding must still come after it.
  logits = jnp.asarray([[[0., 0.], [0., -300.], [0., 50.]]])
  mask = jnp.asarray([[True, True, False]])
  slots = routing.expert_choice(logits, mask, 2)
  assert_buffers(slots, [{0: 1/2, 1: 1}, {0: 1/2, 1: 0}])
  slots = routing.expert_choice(logits, mask, 2, renormalize=True)
  assert_buffers(slots, [{0: 1/2, 1: 1}, {0: 1/2, 1: 0}])


def test_expert_choice_of_a_group_of_padding():
  logits = logs([ODDS, ODDS])
  mask = jnp.asarray([[False] * 4, [True] * 4])
  slots = routing.expert_choice(logits, mask, 2, renormalize=True)
  assert_buffers(slots, [{}, {}, {}], group=0)
  assert_buffers(slots, [{1: 1, 2: 1}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}], group=1)
  assert np.isfinite(slots.weight).all()


def test_expert_choice_gives_a_tie_to_the_earlier_token():
  logits = jnp.zeros((1, 5, 2))
  slots = routing.expert_choice(logits, real(logits), 3)
  assert_buffers(slots, [{0: 1/2, 1: 1/2, 2: 1/2}] * 2)
  mask = jnp.asarray([[False, True, False, True, True]])  # equal padding in front changes nothing
  slots = routing.expert_choice(logits, mask, 2)
  assert_buffers(slots, [{1: 1/2, 3: 1/2}] * 2)


def test_expert_choice_groups_do_not_compete():
  logits = logs([ODDS, ODDS[::-1]])
  slots = routing.expert_choice(logits, real(logits), 2, renormalize=True)
  assert_buffers(slots, [{1: 1, 2: 1}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}], group=0)
  assert_buffers(slots, [{2: 1, 1: 1}, {0: 1/2, 3: 2/5}, {3: 3/5, 0: 1/2}], group=1)


def test_expert_choice_of_one_expert():
  logits = jnp.asarray([[[3.], [-2.], [7.]]])
  for renormalize in (False, True):
    slots = routing.expert_choice(logits, real(logits), 3, renormalize=renormalize)
    assert_buffers(slots, [{0: 1, 1: 1, 2: 1}])


def weight_of(slots, token, expert):
  """Sum of the weights with which `expert` holds `token` of group 0, differentiable."""
  here = (slots.index[0, expert] == token) & slots.valid[0, expert]
  return jnp.sum(jnp.where(here, slots.weight[0, expert], 0.0))


def test_expert_choice_weight_carries_the_routers_gradient():
  logits = logs(ODDS)

  def grad(token, expert, renormalize):
    def weight(logits):
      slots = routing.expert_choice(logits, real(logits), 2, renormalize=renormalize)
      return weight_of(slots, token, expert)
    return np.asarray(jax.jit(jax.grad(weight))(logits))[0]

  # Softmax: dp1/dl1 = 1/3 * 2/3, dp1/dl0 = -1/3 * 1/6, dp1/dl2 = -1/3 * 1/2.
  found = grad(token=0, expert=1, renormalize=False)
  np.testing.assert_allclose(found[0], [-1/18, 2/9, -1/6], rtol=1e-5)
  np.testing.assert_array_equal(found[1:], 0)
  # Renormalised, t0 weighs e1 by p1 / (p1 + p2) = 2/5: a softmax over e1 and e2 only.
  found = grad(token=0, expert=1, renormalize=True)
  np.testing.assert_allclose(found[0], [0, 6/25, -6/25], rtol=1e-5, atol=1e-7)
  # A token of a single expert has weight 1 whatever the router says: no gradient.
  found = grad(token=2, expert=0, renormalize=True)
  np.testing.assert_allclose(found, 0, atol=1e-7)


def test_expert_choice_gradient_is_finite_where_probability_underflows():
  logits = jnp.asarray([[[0., 0.], [0., -300.], [0., 50.]]])
  mask = jnp.asarray([[True, True, False]])

  def total(logits):
    weight = routing.expert_choice(logits, mask, 2, renormalize=True).weight
    return jnp.sum(weight * jnp.arange(4.0).reshape(weight.shape))

  grad = np.asarray(jax.jit(jax.grad(total))(logits))
  assert np.isfinite(grad).all()
  np.testing.assert_array_equal(grad[0, 2], 0)  # padding


@pytest.mark.parametrize('router', ['expert_choice', 'top_k'])
def test_routers_compute_in_float32_from_bfloat16_logits(router):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 4)), jnp.bfloat16)
  route = getattr(routing, router)
  low, high = (route(l, real(logits), 2) for l in (logits, logits.astype(jnp.float32)))
  assert low.weight.dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, low, high)


@pytest.mark.parametrize('router', ['expert_choice', 'top_k'])
@pytest.mark.parametrize('renormalize', [False, True])
def test_padding_logits_change_nothing(router, renormalize):
  rng = np.random.default_rng(5)
  logits = rng.normal(size=(2, 8, 4)).astype(np.float32)
  mask = rng.random((2, 8)) < 0.6
  other = np.where(mask[..., None], logits, 1e4 * rng.normal(size=logits.shape)).astype(np.float32)
  route = getattr(routing, router)
  show = buffers if router == 'expert_choice' else choices
  found = [route(jnp.asarray(l), jnp.asarray(mask), 3, renormalize=renormalize)
           for l in (logits, other)]
  for group in range(2):
    assert show(found[0], group) == show(found[1], group)


@pytest.mark.parametrize('router', ['expert_choice', 'top_k'])
def test_routers_run_under_jit_and_do_not_see_a_shift_of_all_logits(router):
  rng = np.random.default_rng(6)
  logits = jnp.asarray(rng.normal(size=(2, 8, 4)), jnp.float32)
  route = jax.jit(getattr(routing, router), static_argnums=2, static_argnames='renormalize')
  found = route(logits, real(logits), 2, renormalize=True)
  assert len(jax.tree.leaves(found)) == 3
  eager = getattr(routing, router)(logits + 100.0, real(logits), 2, renormalize=True)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(eager), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4)
