"""The MoE layer: a router, a stack of experts, and the path of a token through them.

Dimensions: B batch, L length, G groups, S tokens per group, D model, E experts, C slots.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import sharding
from moejax.config import check, check_choice, fail
from moejax.moe import balance, dispatch, routing

ROUTERS = ('expert_choice', 'top_k')


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """MoE blocks of one stack.

  Attributes:
    layers: which blocks are sparse: 'none', 'every_2' (the 2nd, 4th, ... as in T5), 'last_6', or
      block numbers from 0 such as '1,3'.
    num_experts: E in each of these blocks.
    experts_per_layer: E of each sparse block from the first to the last, in place of num_experts;
      empty: all alike.
    router: 'expert_choice' (encoders, ViT; not causal) or 'top_k' (anywhere).
    k: experts per token, for top_k.
    capacity_factor: slots per expert = capacity_factor * group tokens / E while training.
    eval_capacity_factor: the same in evaluation.
    min_capacity: fewest slots per expert.
    group_size: tokens routed together, whole sequences or images; 0: each one alone.
    renormalize: make a token's weights sum to 1.
    balance_weight: weight of the load-balance loss, for top_k (mean over layers that have it).
    z_weight: weight of the router z-loss (mean over MoE layers).
    dispatch: 'gather' or 'einsum'.
    router_init_std: standard deviation of the router's normal initialisation.
  """
  layers: str = 'none'
  num_experts: int = 8
  experts_per_layer: tuple = ()
  router: str = 'expert_choice'
  k: int = 2
  capacity_factor: float = 2.0
  eval_capacity_factor: float = 2.0
  min_capacity: int = 1
  group_size: int = 0
  renormalize: bool = False
  balance_weight: float = 0.0
  z_weight: float = 0.0
  dispatch: str = 'gather'
  router_init_std: float = 0.02

  def __post_init__(self):
    check_choice('moe.router', self.router, ROUTERS)
    check_choice('moe.dispatch', self.dispatch, dispatch.BY_NAME)
    check(self.num_experts >= 1, 'moe.num_experts', self.num_experts, '>= 1', 'Use 1 or more.')
    check(all(type(e) is int and e >= 1 for e in self.experts_per_layer),
          'moe.experts_per_layer', self.experts_per_layer, 'a tuple of integers >= 1', 'Fix it.')
    for name in ('capacity_factor', 'eval_capacity_factor'):
      check(getattr(self, name) > 0, f'moe.{name}', getattr(self, name), '> 0', 'Usual: 1 to 2.')
    for name in ('balance_weight', 'z_weight', 'router_init_std', 'group_size'):
      check(getattr(self, name) >= 0, f'moe.{name}', getattr(self, name), '>= 0', '0 turns it off.')
    check(self.min_capacity >= 1, 'moe.min_capacity', self.min_capacity, '>= 1', 'Use 1 or more.')
    if self.router == 'top_k':
      fewest = min(self.experts_per_layer or (self.num_experts,))
      check(1 <= self.k <= fewest, 'moe.k', self.k, f'1 to num_experts = {fewest}',
            'A token cannot choose more experts than there are.')
      most = max(self.experts_per_layer or (self.num_experts,))
      check(not (self.k == 1 and self.renormalize and most > 1), 'moe.renormalize', True,
            'False at k = 1', 'A single weight renormalised is the constant 1: the router would '
            'get no gradient and never learn.')
    else:
      check(self.balance_weight == 0, 'moe.balance_weight', self.balance_weight,
            '0 for expert_choice', 'Expert choice is balanced by construction.')

  def sparse_layers(self, depth: int, key: str = 'moe') -> dict[int, int]:
    """{block number: E} of a stack of `depth` blocks; ConfigError on a block not in it."""
    layers = self.layers.replace(' ', '')
    found = re.fullmatch(r'none|(every|last)_(\d+)|\d+(?:,\d+)*', layers)
    if not found:
      fail(f'{key}.layers', self.layers, "'none', 'every_2', 'last_6' or '1,3'",
           'Blocks count from 0.')
    kind, n = found.group(1), int(found.group(2) or 0)
    if layers == 'none':
      chosen = []
    elif kind:
      check(1 <= n <= depth, f'{key}.layers', self.layers, f"'{kind}_1' to '{kind}_{depth}'",
            f'The stack has {depth} blocks.')
      chosen = list(range(n - 1, depth, n)) if kind == 'every' else list(range(depth - n, depth))
    else:
      chosen = sorted(int(i) for i in layers.split(','))
      check(len(set(chosen)) == len(chosen) and max(chosen) < depth, f'{key}.layers', self.layers,
            f'different blocks from 0 to {depth - 1}', f'The stack has {depth} blocks.')
    experts = self.experts_per_layer or (self.num_experts,) * len(chosen)
    check(len(experts) == len(chosen), f'{key}.experts_per_layer', self.experts_per_layer,
          f'{len(chosen)} numbers, one per sparse block', 'Or leave it empty and set num_experts.')
    return dict(zip(chosen, experts))

  def rows_per_group(self, length: int, key: str = 'moe') -> int:
    """Sequences of `length` tokens in a routing group; ConfigError unless a whole number."""
    if not self.group_size:
      return 1
    check(self.group_size % length == 0, f'{key}.group_size', self.group_size,
          f'a multiple of the {length} tokens of one sequence or image',
          f'Nearest: {max(1, round(self.group_size / length)) * length}.')
    return self.group_size // length


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

  def __init__(self, config: MoEConfig, num_experts: int, experts: nnx.Module, d_model: int, *,
               rngs: nnx.Rngs):
    self.config = config
    self.num_experts = num_experts
    self.router = Router(d_model, num_experts, config.router_init_std, rngs=rngs)
    self.experts = experts

  def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool, keys: jax.Array | None = None):
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
    rows = self.config.rows_per_group(L)
    check(B % rows == 0, 'batch size (per microbatch)', B,
          f'a multiple of the {rows} sequences of a routing group',
          'Change batch_size or group_size.')
    x = x.reshape(B // rows, rows * L, D)                             # (G, S, D)
    mask = mask.reshape(B // rows, rows * L)
    groups = {'x': x, 'logits': self.router(x), 'mask': mask}
    if keys is not None:
      groups['keys'] = keys[::rows]   # a group's dropout follows its first example

    def run(groups, weights, *, exchange, total):
      slots, aux = self._route(groups['logits'], groups['mask'], train)
      apply = self._apply(groups.get('keys'), slots.index.shape[-1], exchange is not None)
      y = dispatch.BY_NAME[self.config.dispatch](slots, groups['x'], weights, apply, exchange)
      return y, jax.tree.map(total, aux)

    with jax.named_scope('moe'):
      y, aux = sharding.over_groups(run)(groups, self.experts.weights())
    return y.reshape(B, L, D), aux

  def _route(self, logits, mask, train) -> tuple[routing.SlotRouting, dict]:
    """(G, S, E) logits -> slots and aux sums of these groups."""
    config, E = self.config, self.num_experts
    factor = config.capacity_factor if train else config.eval_capacity_factor
    C = routing.capacity(logits.shape[1], E, factor, config.min_capacity)
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
