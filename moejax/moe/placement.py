"""Placement: choices of tokens -> slots of experts, in order of priority.

Dimensions: G groups, S tokens per group, E experts, C slots per expert and group, K choices of a
token.
"""

import jax
import jax.numpy as jnp

from moejax.moe.routing import SlotRouting, TokenRouting, save_under_remat


def place(choices: TokenRouting, num_experts: int, capacity: int, *, order: str = 'choice',
          priority: jax.Array | None = None) -> SlotRouting:
  """Fills each expert's C slots in order of priority; choices past the last slot are dropped.

  Four tokens t0 to t3 and two experts a and b with three slots each, as an example:

    token          t0     t1     t2     t3
    first choice   b .6   b .7   a .8   a .9
    second choice  a .4   a .3   b .2   b .1

    order     priority       slots of a    dropped by a   slots of b    dropped by b
    'choice'  None           t2 t3 t0      t1             t0 t1 t2      t3
    'choice'  first weight   t3 t2 t1      t0             t1 t0 t3      t2
    'token'   None           t0 t1 t2      t3             t0 t1 t2      t3
    'token'   first weight   t3 t2 t1      t0             t3 t2 t1      t0

  Causality. With order 'choice' all first choices are placed before any second choice (GShard,
  flaxformer, vmoe). While capacity binds, first choices are causal among themselves; a second
  choice is not, since a later token's first choice can take its slot. With order 'token' all
  choices of a token are placed before those of the next, and no later token can take its slot. A
  priority other than the sequence is never causal while capacity binds. With C = S nothing is
  dropped, and everything is causal.

  Args:
    choices: TokenRouting of G groups, S tokens, K choices; only valid ones take slots.
    num_experts: E.
    capacity: C, 1 <= C <= S.
    order: 'choice' or 'token', see above.
    priority: (G, S), tokens with the largest are served first and ties in sequence: batch-
      prioritised routing (Riquelme et al. 2021) passes each token's largest probability. None: in
      sequence.

  Returns:
    SlotRouting; the slots of an expert hold its choices in order of priority.
  """
  G, S, K = choices.expert.shape
  E, C = num_experts, capacity
  token = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (G, S))
  if priority is not None:
    token = jnp.argsort(-jax.lax.stop_gradient(priority), axis=1).astype(jnp.int32)   # stable
  # Flattens choices to ids token * K + choice, in order of priority.
  choice = jnp.arange(K, dtype=jnp.int32)
  ids = {'choice': token[:, None] * K + choice[:, None],            # (G, K, S)
         'token': token[..., None] * K + choice}[order].reshape(G, K * S)
  expert = jnp.where(choices.valid, choices.expert, E).reshape(G, S * K)   # invalid ones sort last
  # A stable sort by expert keeps that order within each expert, whose ids are now adjacent.
  expert, ids = map(save_under_remat, jax.lax.sort_key_val(
      jnp.take_along_axis(expert, ids, axis=1), ids, is_stable=True))
  count = (expert[:, None] == jnp.arange(E)[:, None]).sum(-1, keepdims=True)      # (G, E, 1)
  start = jnp.cumsum(count, axis=1) - count
  slot = jnp.arange(C)                                              # (C,)
  valid = slot < count                                              # (G, E, C)
  at = jnp.minimum(start + slot, K * S - 1).reshape(G, E * C)       # in the sorted ids
  served = jnp.take_along_axis(ids, at, axis=1)                     # (G, E*C) in [0, K*S)
  weight = jnp.take_along_axis(choices.weight.reshape(G, S * K), served, axis=1)
  index = (served // K).reshape(G, E, C)
  return SlotRouting(index, jnp.where(valid, weight.reshape(G, E, C), 0.0), valid)
