"""Experts: MLPs stacked on a leading axis, and dropout of their hidden activations.

Dropout is drawn per routing group and in the layout of the dispatch: for every slot of a buffer, or
for every row of an assignment. A group's draws do not depend on the number of devices.

Dimensions: G groups, D model, F ffn, E experts, C slots, N inputs of an expert, P rows.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax import nn
from moejax.moe.grouped_matmul import RowLayout
from moejax.moe.routing import SlotRouting, TokenRouting

EXPERT_MATMULS = 'expert_matmuls'   # name of their outputs in the policies of models/scan.py


class Experts(nn.MLPParams):
  """E MLPs of one form; parameters named as those of a dense MLP, with a leading E.

  `weights()` is inherited from nn.MLPParams.
  """

  @property
  def dropout_rate(self) -> float:
    return self.spec.dropout_rate

  def apply(self, weights: dict[str, jax.Array], x: jax.Array,
            drop: Callable[[jax.Array], jax.Array] | None = None,
            layout: RowLayout | None = None) -> jax.Array:
    """Runs inputs through their experts.

    Args:
      weights: as from `weights()`, or a slice of its expert axis.
      x: (E, N, D), N inputs of each expert; or with a layout (P, D).
      drop: applied to the hidden activations, (E, N, F) or (P, F); None: no dropout.
      layout: which expert each row of x belongs to.

    Returns:
      The shape and dtype of x.
    """
    def project(name, h):
      kernel, bias = weights[name].astype(h.dtype), weights.get(f'{name}_bias')
      y = h @ kernel if layout is None else layout.gmm(h, kernel)
      y = checkpoint_name(y, EXPERT_MATMULS)
      if bias is None:
        return y
      return y + (bias.astype(h.dtype)[:, None] if layout is None else layout.expand(bias, h.dtype))
    return nn.mlp(self.spec, project, x, drop)


def with_dropout(experts: Experts, keys: jax.Array | None, routing: SlotRouting | TokenRouting, *,
                 grouped: bool, exchanged: bool) -> Callable:
  """experts.apply as a dispatch calls it, with dropout of the hidden activations.

  Args:
    experts: Experts.
    keys: (G,) jax keys, one per local routing group; None: no dropout.
    routing: the routing that is dispatched.
    grouped: whether the dispatch is 'grouped', which passes a layout.
    exchanged: whether buffers come from all devices along the mesh axis `expert`.
  """
  rate = experts.dropout_rate
  if keys is None or not rate:
    return experts.apply
  if grouped:
    per_group = routing.valid[0].size
    return lambda weights, x, layout: experts.apply(
        weights, x, functools.partial(_drop_rows, keys, layout, per_group, rate), layout)
  device = 0
  if exchanged:   # buffers of all devices along `expert` follow one another in that order
    keys = jax.lax.all_gather(keys, 'expert', tiled=True)
    device = jax.lax.axis_index('expert')

  def apply(weights, x):
    local_E = x.shape[0]
    numbers = device * local_E + jnp.arange(local_E)                # of the experts of this device
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    drop = functools.partial(_drop_slots, fold(keys, numbers), routing.index.shape[-1], rate)
    return experts.apply(weights, x, drop)
  return apply


def _drop_slots(keys: jax.Array, capacity: int, rate: float, h: jax.Array) -> jax.Array:
  """Dropout of h (E, N, F), N = G * C, by one key per expert and group, (E, G)."""
  E, N, F = h.shape
  # Flat draws: XLA's CPU compiler takes several times longer over several dimensions.
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, (capacity * F,))
  keep = jax.vmap(jax.vmap(draw))(keys).reshape(E, N, F)            # (E, G, C*F)
  return jnp.where(keep, h / (1 - rate), 0).astype(h.dtype)


def _drop_rows(keys: jax.Array, layout: RowLayout, per_group: int, rate: float, h: jax.Array
               ) -> jax.Array:
  """Dropout of h (P, F), one row per assignment, by one key per group, (G,); per_group = N / G."""
  F = h.shape[1]
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, (per_group * F,))
  keep = jax.vmap(draw)(keys).reshape(-1, F)[layout.assignment]     # (N, F) -> (P, F)
  return jnp.where(keep, h / (1 - rate), 0).astype(h.dtype)
