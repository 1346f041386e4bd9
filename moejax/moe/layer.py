"""The MoE layer: a router, a stack of experts, and the path of a token through them.

Dimensions: B batch, L length, G groups, S tokens per group, D model, F ffn, E experts, C slots,
K choices.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import sharding
from moejax.config import check
from moejax.moe import balance, dispatch, grouped_matmul, routing
from moejax.moe.config import MoEConfig

PLACES = 5  # where a layer draws: experts' dropout, noise, jitter, second choices, shared's dropout


class Router(nnx.Module):
  """Linear map to one logit per expert, in float32 whatever the compute dtype.

  Parameters: kernel (D, E); with learned noise noise_kernel (D, E); with bias balancing
  no_grad/bias (E,), which no gradient reaches: the train step moves it (balance.update_bias).
  """

  def __init__(self, config: MoEConfig, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
    shape = (d_model, num_experts)
    draw = jax.random.normal(rngs.params(), shape, jnp.float32)
    self.kernel = nnx.Param(draw * config.router_init_std)
    self.config = config
    if config.learned_noise:   # as Shazeer et al. 2017, who start at softplus(0) = 0.69
      self.noise_kernel = nnx.Param(jnp.zeros(shape, jnp.float32))
    if config.bias_rate:
      self.no_grad = nnx.Dict({'bias': nnx.Param(jnp.zeros((num_experts,), jnp.float32))})

  def __call__(self, x: jax.Array, train: bool, noise_keys, jitter_keys) -> dict[str, jax.Array]:
    """Logits of tokens, and what made them.

    Args:
      x: (B, L, D); float32 from here on.
      train: whether there may be noise and jitter.
      noise_keys, jitter_keys: (B,) keys, one per example, or None for neither.

    Returns:
      'logits' (B, L, E) float32; with noise also 'clean', the logits before it, and 'std', its
      standard deviation, alike; with bias balancing 'bias' (B, 1, E), without gradient.
    """
    config = self.config
    x = x.astype(jnp.float32)
    if train and config.jitter and jitter_keys is not None:
      x = x * _per_example(jitter_keys, x.shape, lambda key, n: jax.random.uniform(
          key, n, minval=1 - config.jitter, maxval=1 + config.jitter))
    logits = _dot(x, self.kernel[...])
    out = {'logits': logits}
    if train and noise_keys is not None and (config.learned_noise or config.noise_std):
      std = (jax.nn.softplus(_dot(x, self.noise_kernel[...])) if config.learned_noise
             else jnp.full_like(logits, config.noise_std / logits.shape[-1]))
      noise = _per_example(noise_keys, logits.shape, jax.random.normal)
      out = {'logits': logits + std * noise, 'clean': logits, 'std': std}
    if config.bias_rate:
      bias = jax.lax.stop_gradient(self.no_grad['bias'][...])
      out['bias'] = jnp.broadcast_to(bias, (len(x), 1, *bias.shape))
    return out


class MoELayer(nnx.Module):
  """Sparsely activated replacement of a transformer block's MLP.

  `experts` is any module with stacked `weights() -> {name: (E, ...)}` and
  `apply(weights, x, drop=None, rows=None) -> x's shape`: x is (E, N, D), or (P, D) with `rows`
  saying which expert each row belongs to (see dispatch.grouped); `drop` (None: no dropout) maps
  hidden activations to the same shape, at the rate `dropout_rate`. `shared` is a module (B, L, D),
  keys -> (B, L, D), or None.
  """

  def __init__(self, config: MoEConfig, num_experts: int, experts: nnx.Module,
               shared: nnx.Module | None, d_model: int, *, rngs: nnx.Rngs):
    self.config = config
    self.num_experts = num_experts
    self.has_router = config.router != 'norm'
    if self.has_router:
      self.router = Router(config, d_model, num_experts, rngs=rngs)
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
      train: chooses the capacity factor; without it there is no noise.
      keys: (B,) jax keys, one per example, for dropout and the router's noise; None: neither.
      no_drop: routes each sequence by itself with a slot in every expert for every token, so that
        nothing is dropped and what a token gets depends on no other: for decoding.

    Returns:
      y (B, L, D) in x's dtype, 0 for a token in no expert (but for the shared ones); and aux, a
      dict of float32 sums over groups: `balance.telemetry`; for token choice 'asked' (E,), the
      assignments before any drop; for each of `losses` its value times real tokens under its name
      and, if it has a weight, times that under the name + '_loss'. Divide by 'tokens' for means.

    Raises:
      ConfigError: B is not a multiple of the group's sequences.
    """
    B, L, D = x.shape
    rows = 1 if no_drop else self.config.examples_per_group(L)
    check(B % rows == 0, 'batch size (per microbatch)', B,
          f'a multiple of the {rows} sequences of a routing group',
          'Change batch_size or group_size.')
    drop_keys, noise_keys, jitter_keys, second_keys, shared_keys = _split(keys)
    group = lambda a: a.reshape(B // rows, rows * a.shape[1], *a.shape[2:])
    groups = {'x': group(x), 'mask': group(mask)}                     # (G, S, D), (G, S)
    if self.has_router:
      routed = self.router(x, train, noise_keys, jitter_keys)
      if 'bias' in routed:
        groups['bias'] = routed.pop('bias')[::rows]                   # (G, 1, E)
      groups |= {name: group(a) for name, a in routed.items()}
    if train and self.config.second_threshold and second_keys is not None:
      groups['uniform'] = group(_per_example(second_keys, (B, L), jax.random.uniform))
    if keys is not None:
      groups['keys'] = drop_keys[::rows]   # a group's dropout follows its first example

    def run(groups, weights, *, exchange, total):
      if not self.has_router:
        groups = groups | {'logits': self._log_norms(groups['x'], weights, exchange)}
      chosen, aux = self._route(groups, train, no_drop)
      apply = self._apply(groups.get('keys'), chosen, exchange is not None)
      y = dispatch.BY_NAME[self.config.dispatch](chosen, groups['x'], weights, apply, exchange)
      return y, jax.tree.map(total, aux)

    with jax.named_scope('moe'):
      y, aux = sharding.over_groups(run)(groups, self.experts.weights())
    y = y.reshape(B, L, D)
    if self.has_shared:
      with jax.named_scope('shared_experts'):
        y = y + self.shared(x, shared_keys)
    return y, aux

  def _route(self, groups: dict, train: bool, no_drop: bool):
    """(G, S, E) logits -> what dispatch takes, and aux sums of these groups."""
    config, E = self.config, self.num_experts
    logits, mask = groups['logits'], groups['mask']
    S = logits.shape[1]
    factor = config.capacity_factor if train else config.eval_capacity_factor
    C = S if no_drop else routing.expert_capacity(S, E, factor, config.min_capacity)
    probs = routing.probabilities(logits, config.score)
    if config.token_choice:
      wanted = self._choose(groups)
      chosen = wanted
      if config.dispatch != 'grouped':
        priority = probs.max(-1) if config.batch_priority else None
        chosen = routing.place(wanted, E, C, order=config.order, priority=priority)
      asked = balance.asked(wanted, E)
      aux = balance.telemetry(chosen, probs, mask, asked.sum()) | {'asked': asked}
    else:
      wanted = chosen = routing.expert_choice(logits, mask, C, renormalize=config.renormalize)
      aux = balance.telemetry(chosen, probs, mask)
    for name, (weight, value) in self.losses(groups, probs, wanted).items():
      aux[name] = jax.lax.stop_gradient(value)
      if weight:   # else the layer is none of those that the mean is over
        aux[f'{name}_loss'] = weight * value
    return chosen, aux

  def _choose(self, groups: dict) -> routing.TokenRouting:
    """Token choice by the config's rule."""
    config, logits, mask = self.config, groups['logits'], groups['mask']
    weights = {'renormalize': config.renormalize, 'scale': config.weight_scale}
    if config.router == 'top_p':
      return routing.top_p(logits, mask, config.p, config.k, **weights)
    wanted = routing.top_k(logits, mask, config.k, score=config.score, bias=groups.get('bias'),
                           **weights)
    if 'uniform' in groups:
      wanted = routing.keep_second(wanted, groups['uniform'], config.second_threshold)
    return wanted

  def losses(self, groups: dict, probs: jax.Array, wanted) -> dict[str, tuple]:
    """{name: (weight, value times real tokens)} of the auxiliary losses there are.

    Telling ones are measured whatever their weight: 'z', and for token choice 'balance'.
    """
    config, mask, E = self.config, groups['mask'], self.num_experts
    over_groups = lambda value: (value * mask.sum(1)).sum()   # groups count by their real tokens
    found = {'z': (config.z_weight, balance.router_z(groups['logits'], mask).sum())}
    if not config.token_choice:
      return found
    found['balance'] = (config.balance_weight, over_groups(balance.load_balance(
        probs, wanted, mask, first_only=config.balance_counts == 'first')))
    if config.importance_weight:
      # Shazeer sums the weights that are used, V-MoE the noiseless probabilities of all experts.
      weights = (balance.gates(wanted, E) if config.learned_noise
                 else routing.probabilities(groups.get('clean', groups['logits']), config.score))
      found['importance'] = (config.importance_weight,
                             over_groups(balance.importance(weights, mask)))
    if config.load_weight and 'clean' in groups:
      found['smooth_load'] = (config.load_weight, over_groups(balance.load(
          groups['clean'], groups['logits'], groups['std'], config.k, mask,
          exclude_self=config.learned_noise)))
    if config.entropy_weight:
      found['entropy_penalty'] = (config.entropy_weight,
                                  balance.entropy_penalty(probs, mask).sum())
    return found

  def _log_norms(self, x: jax.Array, weights: dict, exchange) -> jax.Array:
    """(G, S, E) log of the norm of every expert's output for every token (Lo et al. 2024).

    As logits they make a softmax in which an expert's probability is its share of the norms.
    """
    G, S, D = x.shape
    run = self.experts.apply if exchange is None else exchange(self.experts.apply)
    out = run(weights, jnp.broadcast_to(x.reshape(1, G * S, D), (self.num_experts, G * S, D)))
    squares = jnp.square(out.astype(jnp.float32)).sum(-1)             # (E, G*S)
    return 0.5 * jnp.log(squares + 1e-30).T.reshape(G, S, self.num_experts)

  def _apply(self, keys, chosen, exchanged: bool) -> Callable:
    """The experts as dispatch wants them, with dropout by group keys (G,) if there are any."""
    if keys is None or not self.experts.dropout_rate:
      return self.experts.apply
    rate = self.experts.dropout_rate
    if self.config.dispatch == 'grouped':
      per_group = chosen.valid[0].size
      return lambda weights, x, rows: self.experts.apply(
          weights, x, DropRows(keys, rows, per_group, rate), rows=rows)
    first = 0
    if exchanged:   # the buffers here come from all devices along `expert`, in their order
      keys = jax.lax.all_gather(keys, 'expert', tiled=True)
      first = jax.lax.axis_index('expert')

    def apply(weights, x):
      E = x.shape[0]
      experts = first * E + jnp.arange(E)
      fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
      drop = Drop(fold(keys, experts), chosen.index.shape[-1], rate)
      return self.experts.apply(weights, x, drop)
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


@dataclasses.dataclass(frozen=True)
class DropRows:
  """Dropout of (P, F) hidden activations, one row per assignment: one key per group."""
  keys: jax.Array   # (G,)
  rows: grouped_matmul.Rows
  per_group: int    # assignments of a group, N / G
  rate: float

  def __call__(self, h: jax.Array) -> jax.Array:
    F = h.shape[1]
    draw = lambda key: jax.random.bernoulli(key, 1 - self.rate, (self.per_group * F,))
    keep = jax.vmap(draw)(self.keys).reshape(-1, F)[self.rows.order]  # (P, F)
    return jnp.where(keep, h / (1 - self.rate), 0).astype(h.dtype)


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """(..., D) @ (D, E) in full float32: a TPU would round the operands to bfloat16."""
  rows = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, precision=jax.lax.Precision.HIGHEST)
  return rows.reshape(*x.shape[:-1], -1)


def _split(keys: jax.Array | None) -> list:
  """PLACES keys for each example, each (B,); or None for each."""
  if keys is None:
    return [None] * PLACES
  return list(jax.vmap(lambda key: jax.random.split(key, PLACES))(keys).T)


def _per_example(keys: jax.Array, shape: tuple, draw: Callable) -> jax.Array:
  """draw(key, (n,)) for each example, as an array of `shape` = (B, ...)."""
  n = 1
  for size in shape[1:]:
    n *= size
  return jax.vmap(lambda key: draw(key, (n,)))(keys).reshape(shape)
