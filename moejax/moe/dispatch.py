"""Dispatch: tokens to their experts, and the experts' outputs back.

Every function here has one signature and computes

  y[g, s] = sum over assignments (e, weight) of token s in group g of weight * expert_e(x[g, s])

`reference` is this definition as a loop; the others equal it in value and in every gradient, and
differ in cost. `gather` and `einsum` fill every expert's buffer up to its capacity and then run all
experts as one batched matmul. `grouped` has no capacity and drops nothing: it sorts assignments by
expert into the rows of one buffer and runs grouped matmuls. None of them sees a logit.

Experts are a pair: `weights`, a dict of arrays with a leading E, and
`apply(weights, x, layout=None)`, which runs x (E, N, D) through them; with a
grouped_matmul.RowLayout, x is (P, D) and the layout gives each row's expert.

Dimensions: G groups, S tokens per group, D model, E experts, C slots per expert and group, K
choices of a token, N assignments, P rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import check
from moejax.moe.grouped_matmul import sort_by_expert
from moejax.moe.routing import SlotRouting, TokenRouting

Apply = Callable[..., jax.Array]


def reference(routing: SlotRouting | TokenRouting, x: jax.Array, weights: dict,
              apply: Apply) -> jax.Array:
  """The definition, as a Python loop over slots or choices; the other functions must equal it."""
  y = jnp.zeros_like(x)
  by_slot = isinstance(routing, SlotRouting)
  named = routing.index if by_slot else routing.expert              # (G, E, C) or (G, S, K)
  for g, i, j in np.ndindex(named.shape):
    s, e = (named[g, i, j], i) if by_slot else (i, named[g, i, j])
    weight, valid = routing.weight[g, i, j], routing.valid[g, i, j]
    expert = jax.tree.map(lambda w, e=e: w[e][None], weights)
    token = jnp.where(valid, x[g, s], 0)                            # an empty slot reads nothing
    out = apply(expert, token[None, None])[0, 0]                    # (D,)
    y = y.at[g, s].add(jnp.where(valid, weight, 0.0).astype(x.dtype) * out)
  return y


def gather(routing: SlotRouting, x: jax.Array, weights: dict, apply: Apply,
           exchange: Callable | None = None) -> jax.Array:
  """Gathers tokens into buffers by index and scatter-adds the weighted outputs back.

  No FLOPs besides the experts' own; memory linear in tokens.

  Args:
    routing: SlotRouting.
    x: (G, S, D) tokens.
    weights: expert weights, each (E, ...).
    apply: the experts, (weights, (E, G*C, D)) -> (E, G*C, D).
    exchange: wraps `apply` to carry buffers to the devices that hold the experts and back, see
      sharding.exchange; None where every device holds all experts.

  Returns:
    (G, S, D) in x's dtype; 0 for tokens in no slot.

  Raises:
    TypeError: routing is a TokenRouting.
  """
  _check_slots(routing)
  G, S, D = x.shape
  _, E, C = routing.index.shape
  index = routing.index.reshape(G, E * C)
  wide = jnp.promote_types(x.dtype, jnp.float32)   # for sums over slots, here and in gradients
  buffers = jnp.take_along_axis(x.astype(wide), index[..., None], axis=1).astype(x.dtype)
  buffers = jnp.where(routing.valid.reshape(G, E * C, 1), buffers, 0)
  out = _run_experts(buffers.reshape(G, E, C, D), weights, apply, exchange)
  # Equal to out * weight[..., None], but with a gradient that XLA on CPU sums quickly at G = 1.
  out = jnp.einsum('GECD,GEC->GECD', out, routing.weight.astype(out.dtype))
  group = jnp.arange(G)[:, None]
  out = out.reshape(G, E * C, D).astype(wide)
  return jnp.zeros(x.shape, wide).at[group, index].add(out).astype(x.dtype)


def einsum(routing: SlotRouting, x: jax.Array, weights: dict, apply: Apply,
           exchange: Callable | None = None) -> jax.Array:
  """Multiplies by one-hot tensors that send tokens and combine outputs (GShard, algorithm 1).

  Matmuls only, which suits a TPU (Shazeer et al. 2018), at 4*S*E*C*D extra FLOPs per group:
  quadratic in the group size. Arguments, result and errors are those of `gather`.
  """
  _check_slots(routing)
  S = x.shape[1]
  one_hot = jax.nn.one_hot(routing.index, S, axis=1, dtype=x.dtype)     # (G, S, E, C)
  one_hot = one_hot * routing.valid[:, None].astype(x.dtype)
  buffers = jnp.einsum('GSEC,GSD->GECD', one_hot, x)
  out = _run_experts(buffers, weights, apply, exchange)
  combine = one_hot * routing.weight[:, None].astype(x.dtype)
  return jnp.einsum('GSEC,GECD->GSD', combine, out)


def grouped(routing: SlotRouting | TokenRouting, x: jax.Array, weights: dict, apply: Apply,
            exchange: Callable | None = None) -> jax.Array:
  """Sorts assignments by expert into rows and runs one grouped matmul per weight: dropless.

  Every valid choice of a token is computed, however many tokens an expert gets (MegaBlocks, Gale et
  al. 2022); of a SlotRouting every valid slot. Memory linear in assignments; FLOPs: those of the
  assignments, plus less than one block of padding per expert.

  Args:
    routing: TokenRouting or SlotRouting.
    x: (G, S, D) tokens.
    weights: expert weights, each (E, ...).
    apply: the experts, (weights, (P, D), layout=RowLayout) -> (P, D). It must treat each row by
      itself; rows that are not `layout.valid` are ignored.
    exchange: must be None.

  Returns:
    (G, S, D) in x's dtype; 0 for tokens without a valid choice.

  Raises:
    ConfigError: experts are spread over devices.
  """
  check(exchange is None, 'moe.dispatch', 'grouped',
        "'gather' or 'einsum' where config.mesh.expert > 1",
        'Set config.mesh.expert = 1: without a capacity the number of rows that one device sends '
        'another has no fixed size.')
  G, S, D = x.shape
  E = jax.tree.leaves(weights)[0].shape[0]
  expert, token = _flat_assignments(routing, G, S)                  # (N,) each
  layout = sort_by_expert(expert, routing.valid.reshape(-1), E)
  token = token[layout.assignment]                                  # (P,) in [0, G*S)
  wide = jnp.promote_types(x.dtype, jnp.float32)   # for sums, as in `gather`
  buffer = x.reshape(G * S, D).astype(wide)[token].astype(x.dtype)
  buffer = jnp.where(layout.valid[:, None], buffer, 0)
  out = apply(weights, buffer, layout=layout)
  weight = routing.weight.reshape(-1)[layout.assignment].astype(out.dtype)
  keep = lambda rows: jnp.where(layout.valid[:, None], rows, 0)
  out = keep(keep(out) * weight[:, None])   # mask before and after the product: 0 * NaN is NaN
  y = jnp.zeros((G * S, D), wide).at[token].add(out.astype(wide))
  return y.astype(x.dtype).reshape(G, S, D)


BY_NAME = {'gather': gather, 'einsum': einsum, 'grouped': grouped}


def _check_slots(routing):
  if not isinstance(routing, SlotRouting):
    raise TypeError(f'this dispatch takes a SlotRouting, got {type(routing).__name__}: call '
                    'placement.place to give choices slots, or use dispatch.grouped')


def _run_experts(buffers, weights, apply, exchange):
  """(G, E, C, D) buffers through their experts, with the expert axis first for the matmuls."""
  G, E, C, D = buffers.shape
  apply = apply if exchange is None else exchange(apply)
  out = apply(weights, buffers.swapaxes(0, 1).reshape(E, G * C, D))
  return out.reshape(E, G, C, D).swapaxes(0, 1)


def _flat_assignments(routing, G, S):
  """Expert and token (in [0, G*S)) of all N slots or choices, each (N,), in the routing's order."""
  named = routing.index if isinstance(routing, SlotRouting) else routing.expert
  group, middle, _ = (jax.lax.broadcasted_iota(jnp.int32, named.shape, i) for i in range(3))
  if isinstance(routing, SlotRouting):
    return middle.reshape(-1), (group * S + named).reshape(-1)
  return named.reshape(-1), (group * S + middle).reshape(-1)
