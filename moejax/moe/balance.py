"""Auxiliary losses that keep experts busy, and the bias that balances without a loss.

Losses take a mask (G, S) bool, False at padding, and return (G,) float32, 0 for a group of padding
only. They are of two kinds: sums over the group's real tokens (router_z, entropy_penalty), and one
normalised value (the others), which router.losses multiplies by the group's real tokens. Both then
add up over groups, devices, microbatches and eval batches; the mean is formed once, from totals.

Dimensions: G groups, S tokens per group, E experts, K choices of a token.
"""

import jax
import jax.numpy as jnp

from moejax.moe.routing import TokenRouting
from moejax.moe.telemetry import choices_per_expert, entropy


def load_balance(probs: jax.Array, choices: TokenRouting, mask: jax.Array, *,
                 first_only: bool = False) -> jax.Array:
  """Load-balance loss of each group: E * sum_e f_e p_e (Switch eq. 4-6).

  f_e is the fraction of the group's choices that name expert e (sums to 1 for any K, before any
  drop), p_e the mean probability of e over real tokens. Balanced value 1, worst E. flaxformer's
  f sums to K, so its loss weight w is K * w here. The gradient flows through p alone.

  Args:
    probs: (G, S, E) float32 probabilities, as from routing.probabilities.
    choices: TokenRouting before placement.
    mask: (G, S).
    first_only: f_e counts first choices only, as GShard, Mesh TensorFlow and vmoe do.
  """
  E = probs.shape[-1]
  if first_only:
    choices = jax.tree.map(lambda a: a[..., :1], choices)
  f = choices_per_expert(choices, E)                                # (G, E)
  f = f / jnp.maximum(f.sum(-1, keepdims=True), 1)
  p = jnp.where(mask[..., None], probs, 0.0).sum(1)                 # (G, E)
  p = p / jnp.maximum(mask.sum(1), 1)[:, None]
  return E * (f * p).sum(-1)


def router_z(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Router z-loss of logits (G, S, E): sum over tokens of logsumexp(logits)^2 (ST-MoE eq. 5)."""
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)         # (G, S)
  return jnp.where(mask, z**2, 0.0).sum(1)


def entropy_penalty(probs: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over tokens of the entropy in nats of probs (G, S, E) (Huang et al. 2024, 2403.07652).

  As a loss it keeps probabilities of top-p routing from going flat, which would make every token
  use every expert.
  """
  return jnp.where(mask, entropy(probs), 0.0).sum(1)


def gates(choices: TokenRouting, num_experts: int) -> jax.Array:
  """(G, S, E) float32 weight of each expert for each token, 0 where not chosen."""
  one_hot = jax.nn.one_hot(choices.expert, num_experts)             # (G, S, K, E)
  return (one_hot * choices.weight[..., None]).sum(2)


def importance(shares: jax.Array, mask: jax.Array) -> jax.Array:
  """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6-7).

  0 if all experts have equal sums, E - 1 if one expert has everything. It does not count tokens:
  `smooth_load` does.

  Args:
    shares: (G, S, E) float32: Shazeer's are the sparse `gates`, V-MoE's the softmax over all
      experts, before noise.
    mask: (G, S).
  """
  return _cv_squared(jnp.where(mask[..., None], shares, 0.0).sum(1))


def smooth_load(clean: jax.Array, noisy: jax.Array, std: jax.Array | float, k: int,
                mask: jax.Array, *, exclude_self: bool) -> jax.Array:
  """Squared coefficient of variation of experts' expected loads (Shazeer et al. 2017, eq. 8-11).

  The number of tokens that choose an expert has no gradient. The probability that a fresh noise
  draw makes the expert chosen has a gradient: Phi((clean - threshold) / std), where the threshold
  is the value that the expert's noisy logit must exceed.

  Args:
    clean: (G, S, E) logits before noise.
    noisy: (G, S, E) logits of which the router took the k largest.
    std: > 0, standard deviation of the noise; a number (V-MoE: noise_std / E) or (G, S, E)
      (Shazeer: softplus of a learned map of the token).
    k: experts per token, 1 <= k <= E.
    mask: (G, S).
    exclude_self: the threshold is the k-th largest of the other experts' noisy logits (Shazeer;
      at k = E there is no threshold and every probability is 1); else the k-th largest of all,
      this expert's own old draw among them (vmoe).
  """
  E = clean.shape[-1]
  clean, noisy = clean.astype(jnp.float32), noisy.astype(jnp.float32)
  if exclude_self and k == E:
    chosen = jnp.ones_like(clean)
  else:
    top = jax.lax.top_k(noisy, k + exclude_self)[0]                 # (G, S, k or k + 1)
    kth, last = top[..., k - 1:k], top[..., -1:]                    # last: kth, or the one after it
    threshold = jnp.where(noisy >= kth, last, kth)                  # (G, S, E)
    # A softplus far below float32's useful range is 0, and would lead to 0/0 or 0 * inf.
    std = jnp.maximum(std, 1e-6)
    chosen = jax.scipy.stats.norm.cdf((clean - threshold) / std)
  return _cv_squared(jnp.where(mask[..., None], chosen, 0.0).sum(1))


def update_bias(bias: jax.Array, asked: jax.Array, rate: float) -> jax.Array:
  """The router's bias after a step: up by rate if underloaded, else down (2408.15664, algorithm 1).

  Args:
    bias: (E,) float32 that was added to the scores where experts are chosen.
    asked: (E,) choices per expert of the whole batch (of all devices) that used this bias. Only
      later batches may see the result: within the batch it would leak later tokens.
    rate: step in units of score, >= 0 (1e-3 is usual).

  Returns:
    (E,) float32; an expert at exactly the mean load keeps its bias.
  """
  # Compares sums, not means: a rounded division could move an expert that is exactly at the mean.
  return bias + rate * jnp.sign(asked.sum() - asked.size * asked)


def _cv_squared(total: jax.Array) -> jax.Array:
  """(G, E) -> (G,): variance over squared mean, 0 where all are 0."""
  mean = total.mean(-1, keepdims=True)
  return jnp.var(total / jnp.where(mean > 0, mean, 1.0), axis=-1)
