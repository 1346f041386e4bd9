"""Where a published implementation is claimed to be matched, what it computes, worked by hand.

flaxformer: flaxformer/architectures/moe/{routing,moe_layers}.py; vmoe: vmoe/nn/routing.py and
vmoe/moe.py; Mesh TensorFlow: mesh_tensorflow/transformer/moe.py. G groups, S tokens per group,
E experts, K choices, C slots.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import balance, placement, routing

from .tables import ODDS, assert_buffers, logs, real

# Probabilities, token by token: 3/5 2/5, 2/3 1/3, 1/5 4/5, 3/4 1/4.
CROWDED = [[3, 2], [2, 1], [1, 4], [3, 1]]


@pytest.mark.parametrize('order, prioritised, capacity, expected', [
  # flaxformer and vmoe: tokens by their largest probability, but every first choice before any
  # second. e0's first choices t3 t1 t0, e1's t2; then second choices in order t2 t3 t1 t0.
  ('choice', True, 1, [{3: 3/4}, {2: 4/5}]),
  ('choice', True, 2, [{3: 3/4, 1: 2/3}, {2: 4/5, 3: 1/4}]),
  ('choice', True, 3, [{3: 3/4, 1: 2/3, 0: 3/5}, {2: 4/5, 3: 1/4, 1: 1/3}]),
  # Without priority e0's first choices t0 t1 (t3 is late), e1's t2; t0's second choice takes e1's
  # last slot.
  ('choice', False, 2, [{0: 3/5, 1: 2/3}, {2: 4/5, 0: 2/5}]),
  # Token order is neither's: t2 comes too late for its own expert.
  ('token', False, 2, [{0: 3/5, 1: 2/3}, {0: 2/5, 1: 1/3}]),
])
def test_order_of_flaxformer_and_vmoe(order, prioritised, capacity, expected):
  logits = logs(CROWDED)
  priority = routing.probabilities(logits).max(-1) if prioritised else None
  tokens = routing.top_k(logits, real(logits), 2)
  assert_buffers(placement.place(tokens, 2, capacity, order=order, priority=priority), expected)


@pytest.mark.parametrize('tokens, experts, factor, slots', [
  (4096, 64, 1.0, 64),
  (4096, 32, 2.0, 256),
  (100, 8, 1.25, 16),   # 15.625
  (18, 4, 1.0, 4),      # 4.5: half to even
  (22, 4, 1.0, 6),      # 5.5
  (26, 4, 1.0, 6),      # 6.5
  (16, 8, 1.0, 4),      # 2, but never fewer than 4
  (4, 64, 1.0, 4),      # 1/16
  (3, 8, 1.0, 3),       # flaxformer: 4, one of them always empty
])
def test_capacity_of_flaxformer(tokens, experts, factor, slots):
  """round(factor * S / E) with K nowhere, and min_expert_capacity 4."""
  assert routing.expert_capacity(tokens, experts, factor, minimum=4) == slots


@pytest.mark.parametrize('tokens, experts, k, factor, slots, rounded', [
  (1568, 32, 2, 1.05, 104, 103),   # 102.9 -> 103 -> 104: 8 images of 14 x 14 patches
  (392, 8, 2, 1.05, 104, 103),
  (392, 8, 2, 4.0, 392, 392),
  (50, 8, 1, 1.0, 8, 6),           # 6.25 -> 7 -> 8
  (16, 8, 2, 1.0, 4, 4),
  (9, 8, 1, 1.0, 4, 1),            # 1.125 -> 2 -> 4
])
def test_capacity_of_vmoe(tokens, experts, k, factor, slots, rounded):
  """vmoe: factor * S * K / E, up to a whole number, up to a multiple of 4; ours says so as C E / S.

  With K times vmoe's factor ours is vmoe's but for the rounding.
  """
  assert routing.expert_capacity(tokens, experts, k * factor) == rounded
  assert routing.expert_capacity(tokens, experts, slots * experts / tokens) == slots


# Column sums of ODDS' probabilities: 92/60, 69/60, 79/60; first choices e2 e0 e0 e1.
def test_auxiliary_loss_of_flaxformer_is_k_times_ours():
  logits = logs(ODDS)
  probs = routing.probabilities(logits)
  tokens = routing.top_k(logits, real(logits), 2)
  # Tokens that chose each expert, of 4: e0 2, e1 4, e2 2. flaxformer: E^2 mean_e(frac_e p_e)
  # = 3 * (1/2 * 92 + 1 * 69 + 1/2 * 79) / 240 = 309/160.
  ours = balance.load_balance(probs, tokens, real(logits))
  np.testing.assert_allclose(2 * ours, [309/160], rtol=1e-6)


def flaxformer_loss(probs, expert, mask):
  """Its formula for one group: E^2 * mean over e of (share of tokens) * (mean probability).

  Padding has no expert and no probability but counts in both means.
  """
  S, E = probs.shape
  chosen = np.zeros((S, E))
  for s in range(S):
    chosen[s, expert[s]] = mask[s]
  return E**2 * np.mean(chosen.mean(0) * (probs * mask[:, None]).mean(0))


@pytest.mark.parametrize('k', [1, 2, 4])
def test_auxiliary_loss_of_flaxformer_shrinks_with_padding_and_ours_does_not(k):
  rng = np.random.default_rng(k)
  logits = jnp.asarray(rng.normal(size=(2, 12, 4)), jnp.float32)
  mask = np.arange(12) < np.array([[12], [7]])
  probs, tokens = routing.probabilities(logits), routing.top_k(logits, jnp.asarray(mask), k)
  ours = balance.load_balance(probs, tokens, jnp.asarray(mask))
  for g in range(2):
    theirs = flaxformer_loss(*(np.asarray(a[g]) for a in (probs, tokens.expert)), mask[g])
    np.testing.assert_allclose(theirs, k * mask[g].mean()**2 * ours[g], rtol=1e-5)


def test_gshard_loss_of_vmoe_counts_first_choices():
  logits = logs(ODDS)
  probs = routing.probabilities(logits)
  tokens = routing.top_k(logits, real(logits), 2)
  # E^2 mean_e(f_e p_e) = 3 * (1/2 * 92 + 1/4 * 69 + 1/4 * 79) / 240 = 83/80. The paper has no E^2.
  found = balance.load_balance(probs, tokens, real(logits), first_only=True)
  np.testing.assert_allclose(found, [83/80], rtol=1e-6)


def test_importance_loss_of_vmoe_is_of_the_whole_softmax():
  logits = logs(ODDS)
  # Sums 92, 69, 79 (sixtieths), mean 80: (12^2 + 11^2 + 1^2) / 3 / 80^2.
  found = balance.importance(routing.probabilities(logits), real(logits))
  np.testing.assert_allclose(found, [133/9600], rtol=1e-5)


def test_importance_loss_of_shazeer_is_of_the_gates():
  logits = logs(ODDS)
  tokens = routing.top_k(logits, real(logits), 2, score='softmax_of_chosen')
  # e0 4/5 + 2/3 = 88/60, e1 2/5 + 1/5 + 1/3 + 1/2 = 86/60, e2 3/5 + 1/2 = 66/60; mean 80.
  found = balance.importance(balance.gates(tokens, 3), real(logits))
  np.testing.assert_allclose(found, [(8**2 + 6**2 + 14**2) / 3 / 80**2], rtol=1e-5)


def test_load_loss_of_vmoe():
  """Noise of 1/E; the threshold is the k-th largest noisy logit, whoever has it."""
  clean = jnp.asarray([[[1, 1/2, 0, -1/2], [0, 1/4, 1/2, 3/4]]])
  noisy = jnp.asarray([[[3/4, 1/2, 1/4, -1/2], [1/4, 1/4, 1/2, 3/4]]])
  # k = 2: both thresholds are 1/2; in units of 1/4: 2 0 -2 -4 and -2 -1 0 1.
  one, two, four = 0.8413447, 0.9772499, 0.9999683   # Phi
  loads = np.array([1.0, 0.5 + (1 - one), (1 - two) + 0.5, (1 - four) + one])
  found = balance.smooth_load(clean, noisy, 1/4, 2, real(clean), exclude_self=False)
  np.testing.assert_allclose(found, [loads.var() / loads.mean()**2], rtol=1e-5)
  # Shazeer's thresholds: 1/4 1/4 1/2 1/2 and 1/2 1/2 1/4 1/4, so 3 1 -2 -4 and -2 -1 1 2.
  three = 0.9986501
  loads = np.array([three + (1 - two), one + (1 - one), (1 - two) + one, (1 - four) + two])
  found = balance.smooth_load(clean, noisy, 1/4, 2, real(clean), exclude_self=True)
  np.testing.assert_allclose(found, [loads.var() / loads.mean()**2], rtol=1e-5)


@pytest.mark.parametrize('threshold, keeps', [
  (0.5, lambda g2, u: 2 * g2 > u),          # GShard, algorithm 1
  (0.2, lambda g2, u: u < g2 / 0.2),        # Mesh TensorFlow, policy 'random'
])
def test_second_expert_of_gshard_and_of_mesh_tensorflow(threshold, keeps):
  odds = [[8, 1, 1], [4, 1, 1], [3, 2, 1], [9, 1, 1], [20, 1, 1]]   # g2: 1/9 1/5 2/5 1/10 1/21
  g2 = np.array([1/9, 1/5, 2/5, 1/10, 1/21])
  logits = logs(odds)
  tokens = routing.top_k(logits, real(logits), 2, renormalize=True)
  np.testing.assert_allclose(tokens.weight[0, :, 1], g2, rtol=1e-5)
  seen = set()
  for u in (0.03, 0.15, 0.37, 0.73, 0.98):
    found = routing.keep_second(tokens, jnp.full((1, 5), u), threshold)
    np.testing.assert_array_equal(found.valid[0, :, 1], keeps(g2, u))
    np.testing.assert_array_equal(found.weight[0, :, 0], tokens.weight[0, :, 0])   # of both
    seen |= set(found.valid[0, :, 1].tolist())
  assert seen == {True, False}
  even = routing.top_k(jnp.zeros((1, 1, 2)), jnp.ones((1, 1), bool), 2)
  refused = routing.keep_second(even, jnp.full((1, 1), 0.5), 1.0)   # 1/2 is not more than 1/2
  assert not refused.valid[0, 0, 1]
