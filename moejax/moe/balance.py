"""Auxiliary losses that keep routers healthy, and the telemetry that shows whether they are.

Everything is float32 and comes as sums over groups, never as means: sums can be added over groups,
devices, microbatches and eval batches, and the mean is formed once, from totals.

Dimensions: G groups, S tokens per group, E experts, C slots, K choices.
"""

import jax
import jax.numpy as jnp

from moejax.moe.routing import SlotRouting, TokenRouting


def load_balance(probs: jax.Array, routing: TokenRouting, mask: jax.Array) -> jax.Array:
  """Load-balance loss of each group: E * sum_e f_e p_e (Shazeer 2017; Switch eq. 4-6).

  f_e is the fraction of the group's assignments that go to expert e (sums to 1 for any K, before
  any drop), p_e the mean probability of e over real tokens. Balanced value 1, worst E. flaxformer's
  f sums to K, so its loss weight w is K * w here; GShard's f counts first choices only. The
  gradient flows through p alone.

  Args:
    probs: (G, S, E) float32, the softmax the router took its weights from (not softmaxed again).
    routing: TokenRouting before placement.
    mask: (G, S) bool, False at padding.

  Returns:
    (G,) float32; 0 for a group of padding only.
  """
  E = probs.shape[-1]
  f = (jax.nn.one_hot(routing.expert, E) * routing.valid[..., None]).sum((1, 2))   # (G, E)
  f = f / jnp.maximum(f.sum(-1, keepdims=True), 1)
  p = jnp.where(mask[..., None], probs, 0.0).sum(1)                                # (G, E)
  p = p / jnp.maximum(mask.sum(1), 1)[:, None]
  return E * (f * p).sum(-1)


def router_z(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over each group's real tokens of logsumexp(logits)^2 (ST-MoE eq. 5); (G,) float32.

  Divide the total by the number of real tokens for the loss.
  """
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)         # (G, S)
  return jnp.where(mask, z**2, 0.0).sum(1)


def telemetry(slots: SlotRouting, probs: jax.Array, mask: jax.Array, k: int) -> dict:
  """What became of the tokens, as float32 sums over all groups.

  Args:
    slots: the routing after capacity.
    probs: (G, S, E) float32 router probabilities.
    mask: (G, S) bool, False at padding.
    k: experts each token asked for; 0 for expert choice, where tokens do not ask.

  Returns:
    dict of scalars 'tokens' (real ones), 'assigned' (assignments asked for: k per token; for expert
    choice the filled slots), 'dropped' (asked for and not placed), 'unchosen' (real tokens without
    any expert), 'single' (with exactly one), 'entropy' (of probs, nats, summed over real tokens),
    and 'load' (E,), filled slots per expert.
  """
  G, S, _ = probs.shape
  valid = slots.valid.astype(jnp.float32)
  experts = jnp.zeros((G, S)).at[jnp.arange(G)[:, None, None], slots.index].add(valid)
  tokens, placed = mask.sum(dtype=jnp.float32), valid.sum()
  assigned = k * tokens if k else placed
  entropy = -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(-1)   # (G, S)
  return jax.lax.stop_gradient({
      'tokens': tokens,
      'load': valid.sum((0, 2)),
      'assigned': assigned,
      'dropped': assigned - placed,
      'unchosen': (mask & (experts == 0)).sum(dtype=jnp.float32),
      'single': (mask & (experts == 1)).sum(dtype=jnp.float32),
      'entropy': jnp.where(mask, entropy, 0.0).sum(),
  })
