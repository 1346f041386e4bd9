"""Routers by which tokens choose experts, against tables worked by hand.

The logits are logs of small integers, so a token's probabilities are those integers over their sum,
and the sigmoid of log(o) is o / (1 + o).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import routing

from .tables import ODDS, assert_choices, choices, logs, real

# Ties (t1, t2 second; t3 first) go to the expert of lower number.
TOP_2 = [[(2, 1/2), (1, 1/3)], [(0, 2/3), (1, 1/6)], [(0, 1/2), (1, 1/4)], [(1, 2/5), (2, 2/5)]]
# 1/2 and 1/3 of 5/6; 2/3 and 1/6 of 5/6; 1/2 and 1/4 of 3/4; 2/5 twice. Of the odds: 3 and 2 of 5;
# 4 and 1 of 5; 2 and 1 of 3; 2 and 2 of 4.
TOP_2_TO_ONE = [[(2, 3/5), (1, 2/5)], [(0, 4/5), (1, 1/5)], [(0, 2/3), (1, 1/3)],
                [(1, 1/2), (2, 1/2)]]
ALL = [[(2, 1/2), (1, 1/3), (0, 1/6)], [(0, 2/3), (1, 1/6), (2, 1/6)],
       [(0, 1/2), (1, 1/4), (2, 1/4)], [(1, 2/5), (2, 2/5), (0, 1/5)]]
# Sigmoids, token by token: 1/2 2/3 3/4, 4/5 1/2 1/2, 2/3 1/2 1/2, 1/2 2/3 2/3.
SIGMOID = [[(2, 3/4), (1, 2/3)], [(0, 4/5), (1, 1/2)], [(0, 2/3), (1, 1/2)], [(1, 2/3), (2, 2/3)]]
# Over 17/12, 13/10, 7/6 and 4/3.
SIGMOID_TO_ONE = [[(2, 9/17), (1, 8/17)], [(0, 8/13), (1, 5/13)], [(0, 4/7), (1, 3/7)],
                  [(1, 1/2), (2, 1/2)]]
# Softmax less 1/4 at expert 2: t0 1/6 1/3 1/4, t1 2/3 1/6 <0, t2 1/2 1/4 0, t3 1/5 2/5 3/20.
# Sigmoids less 1/3 at expert 2: t0 1/2 2/3 5/12, t1 4/5 1/2 1/6, t2 2/3 1/2 1/6, t3 1/2 2/3 1/3.
QUARTER, THIRD, OF_CHOSEN = [0, 0, -1/4], [0, 0, -1/3], dict(score='softmax_of_chosen')
TO_ONE, BY_SIGMOID = dict(renormalize=True), dict(score='sigmoid')


@pytest.mark.parametrize('published, k, settings, expected', [
  ('Switch: the raw probability', 1, {}, [c[:1] for c in TOP_2]),
  ('V-MoE, Grok-1, DeepSeekMoE-16B: raw, best k', 2, {}, TOP_2),
  ('GShard: over the two', 2, TO_ONE, TOP_2_TO_ONE),
  ('Mixtral: softmax of the two logits', 2, OF_CHOSEN, TOP_2_TO_ONE),
  ('its sum is 1 already', 2, OF_CHOSEN | TO_ONE, TOP_2_TO_ONE),
  ('all experts: the softmax', 3, {}, ALL), ('all, renormalised', 3, TO_ONE, ALL),
  ('all chosen', 3, OF_CHOSEN, ALL),
  ('sigmoid: each expert alone', 2, BY_SIGMOID, SIGMOID),
  ('sigmoid, renormalised', 2, BY_SIGMOID | TO_ONE, SIGMOID_TO_ONE),
  ('scaled', 1, dict(scale=3.0), [[(2, 3/2)], [(0, 2)], [(0, 3/2)], [(1, 6/5)]]),
  ('scaled, last of all', 2, BY_SIGMOID | TO_ONE | dict(scale=2.5),
   [[(e, 2.5 * w) for e, w in token] for token in SIGMOID_TO_ONE]),
  ('a bias chooses and does not weigh', 2, dict(bias=QUARTER),
   [[(1, 1/3), (2, 1/2)], [(0, 2/3), (1, 1/6)], [(0, 1/2), (1, 1/4)], [(1, 2/5), (0, 1/5)]]),
  ('bias, renormalised', 2, dict(bias=QUARTER) | TO_ONE,
   [[(1, 2/5), (2, 3/5)], [(0, 4/5), (1, 1/5)], [(0, 2/3), (1, 1/3)], [(1, 2/3), (0, 1/3)]]),
  ('Loss-free balancing', 2, dict(bias=THIRD) | BY_SIGMOID,
   [[(1, 2/3), (0, 1/2)], [(0, 4/5), (1, 1/2)], [(0, 2/3), (1, 1/2)], [(1, 2/3), (0, 1/2)]]),
  ('DeepSeek-V3', 2, dict(bias=THIRD, scale=2.5) | BY_SIGMOID | TO_ONE,
   [[(1, 10/7), (0, 15/14)], [(0, 20/13), (1, 25/26)], [(0, 10/7), (1, 15/14)],
    [(1, 10/7), (0, 15/14)]]),
  ('a bias common to all experts', 2, dict(bias=[7, 7, 7]), TOP_2),
], ids=str)
def test_top_k(published, k, settings, expected):
  logits = logs(ODDS)
  if 'bias' in settings:
    settings = settings | {'bias': jnp.asarray(settings['bias'], jnp.float32)}
  tokens = routing.top_k(logits, real(logits), k, **settings)
  assert_choices(tokens, expected)
  assert tokens.expert.shape == tokens.weight.shape == tokens.valid.shape == (1, 4, k)


@pytest.mark.parametrize('renormalize', [False, True])
def test_top_k_at_padding(renormalize):
  logits = logs([ODDS, ODDS])
  mask = jnp.asarray([[True, False, True, False], [False] * 4])
  tokens = routing.top_k(logits, mask, 3, renormalize=renormalize)
  assert_choices(tokens, [[(2, 1/2), (1, 1/3), (0, 1/6)], None,
                          [(0, 1/2), (1, 1/4), (2, 1/4)], None], group=0)
  assert_choices(tokens, [None] * 4, group=1)
  assert (tokens.expert >= 0).all() and (tokens.expert < 3).all()


@pytest.mark.parametrize('renormalize', [False, True])
def test_sigmoid_scores_that_underflow(renormalize):
  logits = jnp.full((1, 1, 3), -200.0)

  def weights(logits):
    return routing.top_k(logits, real(logits), 2, score='sigmoid', renormalize=renormalize).weight

  np.testing.assert_allclose(weights(logits)[0, 0], [1/2, 1/2] if renormalize else [0, 0])
  grad = jax.jit(jax.grad(lambda l: weights(l)[0, 0, 0]))(logits)
  # a / (a + b) of two equal sigmoids, each of logarithmic slope 1: 1/4 and -1/4.
  np.testing.assert_allclose(grad[0, 0], [1/4, -1/4, 0] if renormalize else [0, 0, 0], atol=1e-7)


def test_probabilities_sum_to_one_for_every_score():
  logits = logs(ODDS)
  softmax = np.asarray(ODDS) / np.sum(ODDS, axis=1, keepdims=True)
  for score in ('softmax', 'softmax_of_chosen'):
    np.testing.assert_allclose(routing.probabilities(logits, score)[0], softmax, rtol=1e-6)
  # Over 23/12, 9/5, 5/3 and 11/6.
  np.testing.assert_allclose(
      routing.probabilities(logits, 'sigmoid')[0],
      [[6/23, 8/23, 9/23], [4/9, 5/18, 5/18], [2/5, 3/10, 3/10], [3/11, 4/11, 4/11]], rtol=1e-6)
  low = routing.probabilities(jnp.full((1, 1, 4), -200.0, jnp.bfloat16), 'sigmoid')
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low[0, 0], [1/4] * 4)


@pytest.mark.parametrize('k, settings, expected', [
  (1, {}, [-1/12, -1/6, 1/4]),            # p2 = 1/2: (-1/2 * 1/6, -1/2 * 1/3, 1/2 * 1/2)
  (2, TO_ONE, [0, -6/25, 6/25]),          # p2 / (p1 + p2) = 3/5, a softmax over two: 3/5 * 2/5
  (2, OF_CHOSEN, [0, -6/25, 6/25]),
  (1, BY_SIGMOID, [0, 0, 3/16]),          # 3/4 of its own logit: 3/4 * 1/4
  # s2 / (s1 + s2) = 9/17: 9/17 * 8/17 times the logarithmic slopes 1 - 3/4 and -(1 - 2/3).
  (2, BY_SIGMOID | TO_ONE, [0, -24/289, 18/289]),
  # Dead routers, which configs refuse: a single weight is constant.
  (1, TO_ONE, [0, 0, 0]), (1, OF_CHOSEN, [0, 0, 0]), (1, BY_SIGMOID | TO_ONE, [0, 0, 0]),
], ids=str)
def test_the_first_weight_has_the_gradient_of_its_score(k, settings, expected):
  logits = logs(ODDS)
  weight = lambda l: routing.top_k(l, real(l), k, **settings).weight[0, 0, 0]
  grad = np.asarray(jax.jit(jax.grad(weight))(logits))[0]
  np.testing.assert_allclose(grad[0], expected, rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(grad[1:], 0)


@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('score', list(routing.SCORES))
def test_bias_gets_no_gradient_and_takes_none_from_the_router(score, renormalize):
  logits = logs(ODDS)

  def total(logits, bias):
    tokens = routing.top_k(logits, real(logits), 2, score=score, renormalize=renormalize, bias=bias)
    return jnp.sum(tokens.weight ** 2), choices_key(tokens)

  grad = jax.jit(jax.grad(total, (0, 1), has_aux=True))
  (small, of_bias), same = grad(logits, jnp.asarray([1e-3, 0, 0]))
  (none, _), chosen = grad(logits, jnp.zeros(3))
  np.testing.assert_array_equal(of_bias, 0)
  np.testing.assert_array_equal(same, chosen)   # a bias too small to change a choice
  np.testing.assert_array_equal(small, none)
  assert np.abs(none).max() > 0.01


def choices_key(tokens):
  """(G, S, E) bool, who chose whom, as an array for use under jit."""
  return jax.nn.one_hot(tokens.expert, 3, dtype=bool).any(2)


def test_bias_that_chooses_experts_of_probability_zero():
  logits, bias = jnp.asarray([[[0.0, -200.0, -200.0]]]), jnp.asarray([-2.0, 0.0, 0.0])
  tokens = routing.top_k(logits, real(logits), 2, bias=bias, renormalize=True)
  assert_choices(tokens, [[(1, 1/2), (2, 1/2)]])


def test_a_misspelt_score_is_an_error():
  logits = logs(ODDS)
  with pytest.raises(KeyError, match='sofmax'):
    routing.top_k(logits, real(logits), 2, score='sofmax')


@pytest.mark.parametrize('p, k, expected', [
  # Sorted probabilities: t0 1/2 1/3 1/6, t1 2/3 1/6 1/6, t2 1/2 1/4 1/4, t3 2/5 2/5 1/5.
  (1e-6, 3, [[2], [0], [0], [1]]),                        # never fewer than one
  (0.45, 3, [[2], [0], [0], [1, 2]]),
  (0.60, 3, [[2, 1], [0], [0, 1], [1, 2]]),               # sums 5/6, 2/3, 3/4, 4/5
  (0.78, 3, [[2, 1], [0, 1], [0, 1, 2], [1, 2]]),         # sums 5/6, 5/6, 1, 4/5
  (0.90, 3, [[2, 1, 0], [0, 1, 2], [0, 1, 2], [1, 2, 0]]),
  (0.90, 2, [[2, 1], [0, 1], [0, 1], [1, 2]]),            # at most k
  (0.90, 1, [[2], [0], [0], [1]]),
])
def test_top_p(p, k, expected):
  logits = logs(ODDS)
  probs = np.asarray(ODDS) / np.sum(ODDS, axis=1, keepdims=True)
  tokens = routing.top_p(logits, real(logits), p, k)
  assert tokens.expert.shape == tokens.weight.shape == tokens.valid.shape == (1, 4, k)
  assert_choices(tokens, [[(e, probs[t, e]) for e in row] for t, row in enumerate(expected)])
  tokens = routing.top_p(logits, real(logits), p, k, renormalize=True, scale=3.0)
  assert_choices(tokens, [[(e, 3 * probs[t, e] / probs[t, row].sum()) for e in row]
                          for t, row in enumerate(expected)])


@pytest.mark.parametrize('p, experts', [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_stops_as_soon_as_p_is_reached(p, experts):
  logits = jnp.zeros((1, 1, 4))   # sums 1/4, 1/2, 3/4 and 1 are exact in float32
  assert_choices(routing.top_p(logits, real(logits), p, 4), [[(e, 1/4) for e in range(experts)]])


def test_top_p_at_padding():
  logits, mask = logs(ODDS), jnp.asarray([[True, False, False, True]])
  tokens = routing.top_p(logits, mask, 0.6, 3, renormalize=True)
  assert_choices(tokens, [[(2, 3/5), (1, 2/5)], None, None, [(1, 1/2), (2, 1/2)]])


def test_top_p_gradient_ends_at_the_last_valid_choice():
  logits = logs(ODDS)

  def grad(token, choice, renormalize=False):
    weight = lambda l: routing.top_p(l, real(l), 0.6, 3, renormalize=renormalize).weight
    return np.asarray(jax.jit(jax.grad(lambda l: weight(l)[0, token, choice]))(logits))[0]

  # p1 = 1/3 of t0: -1/3 * 1/6, 1/3 * 2/3, -1/3 * 1/2; renormalised, a softmax over e1 and e2.
  np.testing.assert_allclose(grad(0, 1)[0], [-1/18, 2/9, -1/6], rtol=1e-5)
  np.testing.assert_allclose(grad(0, 1, True)[0], [0, 6/25, -6/25], rtol=1e-5, atol=1e-7)
  np.testing.assert_array_equal(grad(0, 2), 0)                 # refused
  np.testing.assert_allclose(grad(1, 0, True), 0, atol=1e-7)   # a single expert has weight 1
  assert np.abs(grad(1, 0)).max() > 0.1


# Second choices have 2/5, 1/5, 1/3 and 1/2 of the two weights.
@pytest.mark.parametrize('renormalize', [False, True])
@pytest.mark.parametrize('threshold, uniform, kept', [
  (0.5, [0.79, 0.41, 0.66, 0.99], [True, False, True, True]),    # keeps 4/5, 2/5, 2/3 and 1
  (0.5, [0.81, 0.39, 0.67, 0.0], [False, True, False, True]),
  (0.2, [0.99] * 4, [True] * 4),                                 # all have 1/5 or more
  (1.0, [0.41, 0.19, 0.34, 0.49], [False, True, False, True]),
  (0.0, [0.99] * 4, [True] * 4),
])
def test_keep_second(threshold, uniform, kept, renormalize):
  logits = logs(ODDS)
  tokens = routing.top_k(logits, real(logits), 2, renormalize=renormalize)
  found = jax.jit(routing.keep_second)(tokens, jnp.asarray([uniform]), threshold)
  # The first choice keeps its weight, renormalised over two or not, whatever became of the second.
  assert_choices(found, [row if keep else row[:1]
                         for row, keep in zip(choices(tokens), kept, strict=True)])
  assert found.expert.shape == (1, 4, 2)


def test_keep_second_at_padding_and_its_gradient():
  logits, mask = logs(ODDS), jnp.asarray([[True, True, False, True]])
  uniform = jnp.full((1, 4), 0.5)

  def weights(logits):
    tokens = routing.top_k(logits, mask, 2)
    return routing.keep_second(tokens, uniform, 0.5).weight

  np.testing.assert_allclose(weights(logits)[0], [[1/2, 1/3], [2/3, 0], [0, 0], [2/5, 2/5]],
                             rtol=1e-6)
  grad = np.asarray(jax.jit(jax.grad(lambda l: weights(l)[..., 1].sum()))(logits))[0]
  np.testing.assert_allclose(grad[0], [-1/18, 2/9, -1/6], rtol=1e-5)
  np.testing.assert_array_equal(grad[1:3], 0)   # refused, padding
