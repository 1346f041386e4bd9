"""The MoE layer: logits, route, dispatch, shared experts.

Dimensions: B batch, L length, G groups, S tokens per group, D model, E experts, C slots.
"""

import jax
from flax import nnx

from moejax import nn, sharding
from moejax.config import check
from moejax.moe import dispatch
from moejax.moe.config import MoEConfig
from moejax.moe.experts import Experts, with_dropout
from moejax.moe.router import Router, RouterKeys, norm_logits, route

NUM_KEYS = 2 + len(RouterKeys._fields)   # expert dropout, one per RouterKeys field, shared experts


class MoELayer(nnx.Module):
  """Sparsely activated replacement of a transformer block's MLP.

  Args:
    config: settings.
    num_experts: E of this layer.
    experts: experts.Experts, or a module with its `weights`, `apply` and `dropout_rate`.
    shared: module (x (B, L, D), keys) -> (B, L, D) for all tokens; None: no shared experts.
    d_model: D.
  """

  def __init__(self, config: MoEConfig, num_experts: int, experts: Experts,
               shared: nnx.Module | None, d_model: int, *, rngs: nnx.Rngs):
    self.config, self.num_experts = config, num_experts
    self.router = None if config.router == 'norm' else Router(
        config, d_model, num_experts, rngs=rngs)
    self.experts, self.shared = experts, shared

  def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool, keys: jax.Array | None = None,
               no_drop: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Routes tokens, runs the experts, combines their outputs.

    Args:
      x: (B, L, D) tokens.
      mask: (B, L) bool, False at padding.
      train: chooses the capacity factor; the router draws random numbers in training only.
      keys: (B,) jax keys, one per example, for dropout and the router's noise; None: neither.
      no_drop: routes each sequence by itself with a slot in every expert for every token, so that
        nothing is dropped and a token's output depends on no other: for decoding.

    Returns:
      y (B, L, D) in x's dtype, for a token without an expert the shared experts' output alone, or
      0; and aux, a dict of float32 sums over groups, see `router.route`.

    Raises:
      ConfigError: B is not a multiple of the sequences of a group.
    """
    B, L, _ = x.shape
    n = 1 if no_drop else self.config.examples_per_group(L)
    check(B % n == 0, 'batch size (per microbatch)', B,
          f'a multiple of the {n} sequences of a routing group',
          'Change batch_size or group_size.')
    G, S = B // n, n * L
    C = S if no_drop else self.config.slots_per_expert(S, self.num_experts, train)
    C = None if self.config.dropless else C
    dropout_keys, *router_keys, shared_keys = nn.split_keys(keys, NUM_KEYS)
    to_groups = lambda a: a.reshape(G, -1, *a.shape[2:])
    groups = {'x': to_groups(x), 'mask': to_groups(mask)}           # (G, S, D), (G, S)
    if self.router is not None:
      with jax.named_scope('router'):
        router_keys = None if keys is None or not train else RouterKeys(*router_keys)
        groups['output'] = jax.tree.map(to_groups, self.router(x, router_keys))
    if keys is not None:
      groups['keys'] = dropout_keys[::n]   # a group's dropout follows its first example

    def route_and_dispatch(groups, weights, *, exchange, total):
      """On one device; exchange and total are those of sharding.over_groups."""
      with jax.named_scope('route'):
        if self.config.router == 'norm':
          apply = exchange(self.experts.apply) if exchange else self.experts.apply
          output = norm_logits(apply, weights, groups['x'], self.num_experts)
        else:
          output = groups['output']
        routing, aux = route(self.config, output, groups['mask'], C)
      with jax.named_scope('dispatch'):
        apply = with_dropout(self.experts, groups.get('keys'), routing,
                             grouped=self.config.dispatch == 'grouped', exchanged=bool(exchange))
        y = dispatch.BY_NAME[self.config.dispatch](routing, groups['x'], weights, apply, exchange)
      return y, jax.tree.map(total, aux)

    y, aux = sharding.over_groups(route_and_dispatch)(groups, self.experts.weights())
    y = y.reshape(x.shape)
    if self.shared is not None:
      with jax.named_scope('shared_experts'):
        y = y + self.shared(x, shared_keys)
    return y, aux
