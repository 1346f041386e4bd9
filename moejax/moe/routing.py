"""Routers: pure functions from logits to a routing.

A router says which token meets which expert and with what weight; it knows nothing of how tokens
are moved (that is dispatch). There are two ways to say it:

- SlotRouting: each expert has a buffer of C slots and names the token in each slot.
- TokenRouting: each token names its K experts.

Expert choice gives the first directly. Token choice gives the second, and `place` turns it into the
first by filling the buffers in order of priority; what does not fit is dropped.

Dimensions: G groups, S tokens per group, E experts, C slots per expert and group, K choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class SlotRouting(NamedTuple):
  """Each expert's buffer names its tokens.

  Attributes:
    index: (G, E, C) int32 in [0, S), the token's position in its group; means nothing if not valid.
    weight: (G, E, C) float32, factor of the expert's output for that token; 0 where not valid.
    valid: (G, E, C) bool, False at empty slots.
  """
  index: jax.Array
  weight: jax.Array
  valid: jax.Array


class TokenRouting(NamedTuple):
  """Each token names its experts, best first.

  Attributes:
    expert: (G, S, K) int32.
    weight: (G, S, K) float32, factor of that expert's output; 0 where not valid.
    valid: (G, S, K) bool, False at padding.
  """
  expert: jax.Array
  weight: jax.Array
  valid: jax.Array


def capacity(tokens: int, num_experts: int, factor: float, minimum: int = 1) -> int:
  """Slots per expert and group: factor * S / E, rounded half to even, within [minimum, S].

  No K in the formula: a factor of 2 gives every token two slots on average whichever the router
  (flaxformer's convention; vmoe multiplies by K). Padding counts as tokens.
  """
  return min(max(round(factor * tokens / num_experts), minimum), tokens)


def probabilities(logits: jax.Array) -> jax.Array:
  """softmax over experts, (G, S, E) float32 whatever the dtype of the logits."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def expert_choice(logits: jax.Array, mask: jax.Array, capacity: int, *,
                  renormalize: bool = False) -> SlotRouting:
  """Each expert picks its top tokens (Zhou et al. 2022, eq. 1-2).

  Perfectly balanced, so there is no auxiliary loss; but a token's experts depend on the tokens
  after it, so it is not causal and has no place in a decoder.

  Args:
    logits: (G, S, E) router logits.
    mask: (G, S) bool, False at padding: never chosen before a real token, never valid.
    capacity: C, slots per expert and group, 1 <= C <= S.
    renormalize: divide a token's weights by their sum, so that an upcycled model keeps its
      parent's function (Komatsuzaki et al. 2023, B.7). A token nobody chose stays at 0; a token
      with a single expert has weight 1 and gives its router no gradient.

  Returns:
    SlotRouting with C = capacity.
  """
  G, S, E = logits.shape
  probs = jnp.where(mask[..., None], probabilities(logits), -1.0)   # padding ranks last
  weight, index = jax.lax.top_k(probs.swapaxes(1, 2), capacity)     # (G, E, C)
  valid = weight >= 0
  weight = jnp.where(valid, weight, 0.0)
  if renormalize:
    group = jnp.arange(G)[:, None, None]
    total = jnp.zeros((G, S)).at[group, index].add(weight)          # (G, S)
    total = jnp.where(total > 0, total, 1.0)[group, index]          # (G, E, C)
    weight = weight / total
  return SlotRouting(index, weight, valid)


def top_k(logits: jax.Array, mask: jax.Array, k: int, *, renormalize: bool = False) -> TokenRouting:
  """Each token picks its k most probable experts (Shazeer et al. 2017; Switch at k=1).

  Args:
    logits: (G, S, E) router logits; ties go to the expert with the lower number.
    mask: (G, S) bool, False at padding.
    k: experts per token, 1 <= k <= E.
    renormalize: divide a token's k weights by their sum, which equals a softmax over the k chosen
      logits (Mixtral). At k=1 the weight is then constant and the router never learns.

  Returns:
    TokenRouting with K = k, best expert first.
  """
  weight, expert = jax.lax.top_k(probabilities(logits), k)          # (G, S, K)
  if renormalize:
    weight = weight / weight.sum(-1, keepdims=True)
  valid = jnp.broadcast_to(mask[..., None], expert.shape)
  return TokenRouting(expert, jnp.where(valid, weight, 0.0), valid)


def place(routing: TokenRouting, num_experts: int, capacity: int) -> SlotRouting:
  """Fills each expert's C slots in order of priority; assignments past the last slot are dropped.

  All first choices come before any second choice, each in sequence order (GShard, flaxformer). When
  slots run out, a token's second choice is thus lost to a later token's first choice: under a
  binding capacity the layer is causal only within one order of choice. With C = S nothing is lost
  and it is causal.

  Args:
    routing: TokenRouting of G groups, S tokens, K choices.
    num_experts: E.
    capacity: C, 1 <= C <= S.

  Returns:
    SlotRouting; slots of expert e are its assignments in order of priority.
  """
  G, S, K = routing.expert.shape
  E, C = num_experts, capacity
  by_choice = lambda a: a.swapaxes(1, 2).reshape(G, K * S)          # first choices first
  expert = by_choice(jnp.where(routing.valid, routing.expert, E))   # padding queues last
  # A stable sort by expert keeps the priority within each expert, so its queue is one run.
  expert, order = jax.lax.sort_key_val(
      expert, jnp.broadcast_to(jnp.arange(K * S, dtype=jnp.int32), (G, K * S)), is_stable=True)
  count = (expert[:, None] == jnp.arange(E)[:, None]).sum(-1, keepdims=True)      # (G, E, 1)
  start = jnp.cumsum(count, axis=1) - count
  slot = jnp.arange(C)                                              # (C,)
  valid = slot < count                                              # (G, E, C)
  queue = jnp.minimum(start + slot, K * S - 1).reshape(G, E * C)
  chosen = jnp.take_along_axis(order, queue, axis=1)                # (G, E*C) in [0, K*S)
  weight = jnp.take_along_axis(by_choice(routing.weight), chosen, axis=1).reshape(G, E, C)
  index = (chosen % S).reshape(G, E, C).astype(jnp.int32)
  return SlotRouting(index, jnp.where(valid, weight, 0.0), valid)
