"""Dispatch: moves tokens to their experts and the experts' outputs back.

Every function here has one signature and computes the same thing,

  y[g, s] = sum over slots (e, c) of group g holding token s of weight[g, e, c] * expert_e(x[g, s])

and differs only in how. None sees a logit. `gather` and `einsum` fill every expert's buffer up to a
capacity: `apply(weights, x)` then runs all experts on them, weights being a dict of arrays with a
leading E and x (E, N, D), one batched matmul for all experts. `grouped` has no capacity and drops
nothing: `apply(weights, x, rows=rows)` gets x (P, D), one row per assignment, sorted by expert, and
multiplies with `rows.matmul` (see grouped.Rows). `exchange` moves buffers between devices when
experts live on several (see sharding.exchange).

Dimensions: G groups, S tokens per group, D model, E experts, C slots per expert and group, P rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax import config as config_lib
from moejax.moe.grouped_matmul import by_expert
from moejax.moe.routing import SlotRouting, TokenRouting

Apply = Callable[..., jax.Array]


def gather(routing: SlotRouting, x: jax.Array, weights: dict, apply: Apply,
           exchange: Callable | None = None) -> jax.Array:
  """Gathers tokens into buffers by index and scatter-adds the weighted outputs back.

  No FLOPs besides the experts' own; memory linear in tokens.

  Args:
    routing: SlotRouting.
    x: (G, S, D) tokens.
    weights: expert weights, each (E, ...).
    apply: the experts, (weights, (E, N, D)) -> (E, N, D).
    exchange: wraps `run` to move buffers across devices; None on one device.

  Returns:
    (G, S, D) in x's dtype; 0 for tokens in no slot.
  """
  G, S, D = x.shape
  _, E, C = routing.index.shape
  index = routing.index.reshape(G, E * C)
  wide = jnp.promote_types(x.dtype, jnp.float32)   # of the sums over slots, there and in gradients
  buffers = jnp.take_along_axis(x.astype(wide), index[..., None], axis=1).astype(x.dtype)
  buffers = jnp.where(routing.valid.reshape(G, E * C, 1), buffers, 0)
  out = _run(buffers.reshape(G, E, C, D), weights, apply, exchange)
  # A product alike, but its gradient is the einsum over D that XLA on CPU sums quickly at G = 1.
  out = jnp.einsum('GECD,GEC->GECD', out, routing.weight.astype(out.dtype))
  group = jnp.arange(G)[:, None]
  out = out.reshape(G, E * C, D).astype(wide)
  return jnp.zeros(x.shape, wide).at[group, index].add(out).astype(x.dtype)


def einsum(routing: SlotRouting, x: jax.Array, weights: dict, apply: Apply,
           exchange: Callable | None = None) -> jax.Array:
  """One-hot dispatch and combine tensors (Shazeer et al. 2018; GShard Algorithm 1).

  Matmuls only, which suits a TPU, at 4*S*E*C*D extra FLOPs per group: quadratic in the group size.
  Same arguments and result as `gather`.
  """
  S = x.shape[1]
  hot = jax.nn.one_hot(routing.index, S, axis=1, dtype=x.dtype)     # (G, S, E, C)
  hot = hot * routing.valid[:, None].astype(x.dtype)
  buffers = jnp.einsum('GSEC,GSD->GECD', hot, x)
  out = _run(buffers, weights, apply, exchange)
  combine = hot * routing.weight[:, None].astype(x.dtype)
  return jnp.einsum('GSEC,GECD->GSD', combine, out)


def grouped(routing: SlotRouting | TokenRouting, x: jax.Array, weights: dict, apply: Apply,
            exchange: Callable | None = None) -> jax.Array:
  """One row per assignment, sorted by expert, and one grouped matmul per weight: dropless.

  Every valid choice of a token is computed, however many tokens an expert gets (MegaBlocks, Gale et
  al. 2022); of a SlotRouting every valid slot. Memory linear in assignments; FLOPs those of the
  assignments, and of less than a block of padding per expert.

  Args:
    routing: TokenRouting, or SlotRouting as the others.
    x: (G, S, D) tokens.
    weights: expert weights, each (E, ...).
    apply: the experts, (weights, (P, D), rows=grouped.Rows) -> (P, D); what they do with rows that
      are not `rows.valid` has no effect and no gradient, as long as it stays in its row.
    exchange: None; there is no other way.

  Returns:
    (G, S, D) in x's dtype; 0 for tokens of no valid choice.

  Raises:
    ConfigError: experts are spread over devices.
  """
  config_lib.check(exchange is None, 'moe.dispatch', 'grouped',
                   "'gather' or 'einsum' where config.mesh.expert > 1",
                   'Set config.mesh.expert = 1: without a capacity the number of rows that one '
                   'device sends another has no fixed size.')
  G, S, D = x.shape
  E = jax.tree.leaves(weights)[0].shape[0]
  expert, token = _flat_assignments(routing, G, S)                  # (N,) each
  rows = by_expert(expert, routing.valid.reshape(-1), E)
  token = token[rows.order]                                         # (P,) in [0, G*S)
  wide = jnp.promote_types(x.dtype, jnp.float32)   # of sums, as in `gather`
  buffer = x.reshape(G * S, D).astype(wide)[token].astype(x.dtype)
  buffer = jnp.where(rows.valid[:, None], buffer, 0)
  out = apply(weights, buffer, rows=rows)
  weight = routing.weight.reshape(-1)[rows.order].astype(out.dtype)
  keep = lambda rows_: jnp.where(rows.valid[:, None], rows_, 0)
  out = keep(keep(out) * weight[:, None])   # (P, D); twice: 0 times what is no number is none
  y = jnp.zeros((G * S, D), wide).at[token].add(out.astype(wide))
  return y.astype(x.dtype).reshape(G, S, D)


def reference(routing: SlotRouting | TokenRouting, x: jax.Array, weights: dict,
              apply: Apply) -> jax.Array:
  """The definition, as a Python loop over slots (or choices): what the rest must equal."""
  y = jnp.zeros_like(x)
  for g, s, e, weight, valid in _assignments(routing):
    expert = jax.tree.map(lambda w, e=e: w[e][None], weights)
    token = jnp.where(valid, x[g, s], 0)                            # an empty slot reads nothing
    out = apply(expert, token[None, None])[0, 0]                    # (D,)
    y = y.at[g, s].add(jnp.where(valid, weight, 0.0).astype(x.dtype) * out)
  return y


BY_NAME = {'gather': gather, 'einsum': einsum, 'grouped': grouped}


def _run(buffers, weights, apply, exchange):
  """(G, E, C, D) buffers through their experts, with the expert axis first for the matmuls."""
  G, E, C, D = buffers.shape
  run = apply if exchange is None else exchange(apply)
  out = run(weights, buffers.swapaxes(0, 1).reshape(E, G * C, D))
  return out.reshape(E, G, C, D).swapaxes(0, 1)


def _flat_assignments(routing, G, S):
  """Expert and token (in [0, G*S)) of all N slots or choices, each (N,), in the routing's order."""
  named = routing.index if isinstance(routing, SlotRouting) else routing.expert
  group, middle, _ = (jax.lax.broadcasted_iota(jnp.int32, named.shape, i) for i in range(3))
  if isinstance(routing, SlotRouting):
    return middle.reshape(-1), (group * S + named).reshape(-1)
  return named.reshape(-1), (group * S + middle).reshape(-1)


def _assignments(routing):
  """(group, token, expert, weight, valid) of every slot or choice."""
  by_slot = isinstance(routing, SlotRouting)
  named = routing.index if by_slot else routing.expert
  for g, a, b in np.ndindex(named.shape):
    token, expert = (named[g, a, b], a) if by_slot else (a, named[g, a, b])
    yield g, token, expert, routing.weight[g, a, b], routing.valid[g, a, b]
