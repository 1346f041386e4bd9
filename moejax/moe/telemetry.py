"""Telemetry: loads of experts, drops, entropy, as sums that add up over groups and devices.

Dimensions: G groups, S tokens per group, E experts, K choices of a token.
"""

import jax
import jax.numpy as jnp

from moejax.moe.routing import SlotRouting, TokenRouting


def choices_per_expert(choices: TokenRouting, num_experts: int) -> jax.Array:
  """(G, E) float32 number of valid choices of each expert."""
  one_hot = jax.nn.one_hot(choices.expert, num_experts)             # (G, S, K, E)
  return (one_hot * choices.valid[..., None]).sum((1, 2))


def entropy(probs: jax.Array) -> jax.Array:
  """Entropy in nats over the last axis, with 0 log 0 = 0: (..., E) -> (...)."""
  return -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(-1)


def sums(routing: SlotRouting | TokenRouting, probs: jax.Array, mask: jax.Array,
         num_choices: jax.Array | None = None) -> dict[str, jax.Array]:
  """Counts and entropy of a routing, as float32 sums over all groups, without gradient.

  Args:
    routing: the slots after capacity; the choices where nothing is dropped.
    probs: (G, S, E) float32 router probabilities.
    mask: (G, S) bool, False at padding.
    num_choices: scalar, valid choices before any drop; None: the assignments of `routing` (expert
      choice, or no capacity).

  Returns:
    dict of scalars 'tokens' (real ones), 'assigned' (num_choices), 'dropped' (choices without a
    slot), 'unchosen' (real tokens without an expert: none chose it, or all its choices were
    dropped), 'single' (real tokens with exactly one), 'entropy' (of probs, nats, summed over real
    tokens), and of 'load' (E,), assignments per expert.
  """
  G, S, E = probs.shape
  valid = routing.valid.astype(jnp.float32)
  if isinstance(routing, TokenRouting):
    experts = valid.sum(2)                                          # (G, S), experts of a token
    load = choices_per_expert(routing, E).sum(0)
  else:
    experts = jnp.zeros((G, S)).at[jnp.arange(G)[:, None, None], routing.index].add(valid)
    load = valid.sum((0, 2))
  assignments = valid.sum()
  if num_choices is None:
    num_choices = assignments
  return jax.lax.stop_gradient({
      'tokens': mask.sum(dtype=jnp.float32),
      'load': load,
      'assigned': num_choices,
      'dropped': num_choices - assignments,
      'unchosen': (mask & (experts == 0)).sum(dtype=jnp.float32),
      'single': (mask & (experts == 1)).sum(dtype=jnp.float32),
      'entropy': jnp.where(mask, entropy(probs), 0.0).sum(1).sum(),   # by group, then over groups
  })
