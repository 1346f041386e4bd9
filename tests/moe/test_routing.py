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
  (2, 4, 1.0, 1, 1),      # 0.5 -> 0, lifted to the minimum
  (64, 8, 1.0, 4, 8),     # 8, above the floor
  (12, 4, 4.0, 1, 12),    # factor E: every token
  (12, 4, 9.0, 1, 12),    # never more than the group
  (7, 1, 1.0, 1, 7),      # one expert takes all
  (1, 64, 1.0, 1, 1),     # decoding one token
])
def test_capacity(tokens, experts, factor, minimum, expected):
  found = routing.expert_capacity(tokens, experts, factor, minimum)
  assert found == expected
  assert type(found) is int


PROBS = np.asarray(ODDS) / np.sum(ODDS, axis=1, keepdims=True)
COLUMNS = [dict(enumerate(PROBS[:, e])) for e in range(3)]
REAL, FLAT = [True] * 4, [[1, 1]] * 5
# t1's probability for expert 1 is exactly 0 in float32; padding must still come after it.
IMPOSSIBLE = [[1, 1], [1, 1e-130], [1, 1e20]]


@pytest.mark.parametrize('odds, mask, capacity, renormalize, expected', [
  # Column 0: 1/6 2/3 1/2 1/5; column 1: 1/3 1/6 1/4 2/5; column 2: 1/2 1/6 1/4 2/5.
  (ODDS, REAL, 2, False, [{1: 2/3, 2: 1/2}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}]),
  # t0 has 1/3 and 1/2 of 5/6; t3 has 2/5 twice; t1 and t2 have one expert each, so 1.
  (ODDS, REAL, 2, True, [{1: 1, 2: 1}, {3: 1/2, 0: 2/5}, {0: 3/5, 3: 1/2}]),
  (ODDS, REAL, 1, False, [{1: 2/3}, {3: 2/5}, {0: 1/2}]),   # nobody takes t2
  (ODDS, REAL, 1, True, [{1: 1}, {3: 1}, {0: 1}]),
  (ODDS, REAL, 4, False, COLUMNS), (ODDS, REAL, 4, True, COLUMNS),   # sums are 1 already
  # Without t1 (2/3, expert 0's favourite) expert 0 takes t2 (1/2) and t3 (1/5).
  (ODDS, [True, False, True, True], 2, False,
   [{2: 1/2, 3: 1/5}, {3: 2/5, 0: 1/3}, {0: 1/2, 3: 2/5}]),
  # t3 now has 1/5, 2/5 and 2/5: already a sum of 1.
  (ODDS, [True, False, True, True], 2, True, [{2: 1, 3: 1/5}, {3: 2/5, 0: 2/5}, {0: 3/5, 3: 2/5}]),
  # Fewer real tokens than slots: all of them, whose sums are 1.
  *((ODDS, [True, False, True, False], 3, renormalize,
     [{0: 1/6, 2: 1/2}, {0: 1/3, 2: 1/4}, {0: 1/2, 2: 1/4}]) for renormalize in (False, True)),
  *((IMPOSSIBLE, [True, True, False], 2, renormalize, [{0: 1/2, 1: 1}, {0: 1/2, 1: 0}])
    for renormalize in (False, True)),
  (ODDS, [False] * 4, 2, True, [{}, {}, {}]),
  # Ties go to the earlier token; equal padding in front changes nothing.
  (FLAT, [True] * 5, 3, False, [{0: 1/2, 1: 1/2, 2: 1/2}] * 2),
  (FLAT, [False, True, False, True, True], 2, False, [{1: 1/2, 3: 1/2}] * 2),
])
def test_expert_choice_with_padding_and_without(odds, mask, capacity, renormalize, expected):
  logits, mask = logs(odds), jnp.asarray([mask])
  slots = routing.expert_choice(logits, mask, capacity, renormalize=renormalize)
  assert_buffers(slots, expected)
  assert slots.index.shape == slots.weight.shape == slots.valid.shape == (1, len(odds[0]), capacity)
  assert (slots.index >= 0).all() and (slots.index < len(odds)).all()   # empty ones too


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


ROUTERS = {
    'expert_choice': lambda l, m: routing.expert_choice(l, m, 2),
    'expert_choice renormalised': lambda l, m: routing.expert_choice(l, m, 3, renormalize=True),
    'softmax': lambda l, m: routing.top_k(l, m, 2),
    'softmax_of_chosen': lambda l, m: routing.top_k(l, m, 2, score='softmax_of_chosen'),
    'sigmoid': lambda l, m: routing.top_k(l, m, 2, score='sigmoid', renormalize=True, scale=2.5),
    'bias': lambda l, m: routing.top_k(l, m, 2, bias=jnp.linspace(-.2, .2, l.shape[-1])),
    'top_p': lambda l, m: routing.top_p(l, m, 0.5, 3, renormalize=True),
    'second': lambda l, m: routing.keep_second(routing.top_k(l, m, 2),
                                               jnp.linspace(0, .9, l.shape[1])[None], 0.5),
}


@pytest.mark.parametrize('name', ROUTERS)
def test_bfloat16_logits_and_padding(name):
  """Computed in float32; what stands at padding changes nothing."""
  rng = np.random.default_rng(0)
  route = jax.jit(ROUTERS[name])
  logits = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.bfloat16)
  mask = jnp.asarray(rng.random((2, 6)) < 0.6)
  low, high = (route(l, mask) for l in (logits, logits.astype(jnp.float32)))
  assert low.weight.dtype == jnp.float32
  jax.tree.map(np.testing.assert_array_equal, low, high)
  other = route(jnp.where(mask[..., None], logits, 1e4 * logits[::-1]), mask)
  for group in range(2):
    if isinstance(low, routing.SlotRouting):
      assert buffers(other, group) == buffers(low, group)
    else:
      assert choices(other, group) == choices(low, group)
      assert [c is not None for c in choices(low, group)] == mask[group].tolist()
