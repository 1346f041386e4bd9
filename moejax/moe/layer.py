"""The MoE layer: a router, a stack of experts, and the path of a token through them.

Dimensions: B batch, L length, G groups, S tokens per group, D model, E experts, C slots.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import sharding
from moejax.config import check
from moejax.moe import balance, dispatch, routing
from moejax.moe.settings import MoEConfig


class Router(nnx.Module):
  """Linear map to one logit per expert, in float32 whatever the compute dtype."""

  def __init__(self, d_model: int, num_experts: int, std: float, *, rngs: nnx.Rngs):
    self.kernel = nnx.Param(
        jax.random.normal(rngs.params(), (d_model, num_experts), jnp.float32) * std)

  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., E) float32."""
    return jnp.dot(x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST)


class MoELayer(nnx.Module):
  """Sparsely activated replacement of a transformer block's MLP.

  `experts` is any module with stacked `weights() -> {name: (E, ...)}` and
  `apply(weights, (E, N, D), drop) -> (E, N, D)`, where `drop` (None: no dropout) maps hidden
  activations (E, N, F) to the same shape.
  """

  def __init__(self, config: MoEConfig, num_experts: int, experts: nnx.Module,
               shared: nnx.Module | None, d_model: int, *, rngs: nnx.Rngs):
    self.config = config
    self.num_experts = num_experts
    self.router = Router(d_model, num_experts, config.router_init_std, rngs=rngs)
    self.experts = experts
    self.has_shared = shared is not None
    if self.has_shared:
      self.shared = shared

  def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool, keys: jax.Array | None = None,
               no_drop: bool = False):
    """Routes, runs the experts, combines.

    Args:
      x: (B, L, D) tokens.
      mask: (B, L) bool, False at padding.
      train: chooses the capacity factor.
      keys: (B,) jax keys, one per example, for dropout inside the experts; None: no dropout.

    Returns:
      y (B, L, D) in x's dtype, 0 for a token in no expert; and aux, a dict of float32 sums over
      groups: `balance.telemetry`, 'balance' (load-balance loss times real tokens, top_k only) and
      'z' (router z), and the two times their weights as 'balance_loss' and 'z_loss'. Divide by
      'tokens' for means.

    Raises:
      ConfigError: B is not a multiple of the group's sequences.
    """
    B, L, D = x.shape
    rows = 1 if no_drop else self.config.rows_per_group(L)
    check(B % rows == 0, 'batch size (per microbatch)', B,
          f'a multiple of the {rows} sequences of a routing group',
          'Change batch_size or group_size.')
    x = x.reshape(B // rows, rows * L, D)                             # (G, S, D)
    mask = mask.reshape(B // rows, rows * L)
    groups = {'x': x, 'logits': self.router(x), 'mask': mask}
    if keys is not None:
      groups['keys'] = keys[::rows]   # a group's dropout follows its first example

    def run(groups, weights, *, exchange, total):
      slots, aux = self._route(groups['logits'], groups['mask'], train, no_drop)
      apply = self._apply(groups.get('keys'), slots.index.shape[-1], exchange is not None)
      y = dispatch.BY_NAME[self.config.dispatch](slots, groups['x'], weights, apply, exchange)
      return y, jax.tree.map(total, aux)

    with jax.named_scope('moe'):
      y, aux = sharding.over_groups(run)(groups, self.experts.weights())
    y = y.reshape(B, L, D)
    if self.has_shared:
      y = y + self.shared(x.reshape(B, L, D), None)
    return y, aux

  def _route(self, logits, mask, train, no_drop) -> tuple[routing.SlotRouting, dict]:
    """(G, S, E) logits -> slots and aux sums of these groups."""
    config, E = self.config, self.num_experts
    factor = config.capacity_factor if train else config.eval_capacity_factor
    S = logits.shape[1]
    C = S if no_drop else routing.capacity(S, E, factor, config.min_capacity)
    probs = routing.probabilities(logits)
    z = balance.router_z(logits, mask).sum()
    aux = {'z': jax.lax.stop_gradient(z), 'z_loss': config.z_weight * z}
    if config.router == 'expert_choice':
      slots = routing.expert_choice(logits, mask, C, renormalize=config.renormalize)
      return slots, aux | balance.telemetry(slots, probs, mask, k=0)
    chosen = routing.top_k(logits, mask, config.k, renormalize=config.renormalize)
    slots = routing.place(chosen, E, C)
    uneven = (balance.load_balance(probs, chosen, mask) * mask.sum(1)).sum()
    aux |= {'balance': jax.lax.stop_gradient(uneven),
            'balance_loss': config.balance_weight * uneven}
    return slots, aux | balance.telemetry(slots, probs, mask, k=config.k)

  def _apply(self, keys, C: int, exchanged: bool) -> Callable:
    """The experts as (weights, (E, N, D)) -> (E, N, D), dropout drawn per group and expert."""
    if keys is None or not self.experts.dropout_rate:
      return self.experts.apply
    first = 0
    if exchanged:   # the buffers here come from all devices along `expert`, in their order
      keys = jax.lax.all_gather(keys, 'expert', tiled=True)
      first = jax.lax.axis_index('expert')

    def apply(weights, x):
      E = x.shape[0]
      experts = first * E + jnp.arange(E)
      fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
      return self.experts.apply(weights, x, Drop(fold(keys, experts), C, self.experts.dropout_rate))
    return apply


@dataclasses.dataclass(frozen=True)
class Drop:
  """Dropout of (E, N, F) hidden activations, N = groups * C: one key per expert and group."""
  keys: jax.Array   # (E, G)
  capacity: int
  rate: float

  def __call__(self, h: jax.Array) -> jax.Array:
    E, N, F = h.shape
    # Flat draws: XLA's CPU compiler takes several times longer over several dimensions.
    draw = lambda key: jax.random.bernoulli(key, 1 - self.rate, (self.capacity * F,))
    keep = jax.vmap(jax.vmap(draw))(self.keys).reshape(E, N, F)       # (E, G, C*F)
    return jnp.where(keep, h / (1 - self.rate), 0).astype(h.dtype)
