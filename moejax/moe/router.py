"""Router: tokens -> logits. route: logits -> choices, placement, losses, telemetry.

Dimensions: B batch, L length, G groups, S tokens per group, D model, E experts, C slots, K choices.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import nn
from moejax.moe import balance, placement, routing, telemetry
from moejax.moe.config import MoEConfig


class RouterOutput(NamedTuple):
  """What a routing is made from.

  Router returns the shapes below. `route` takes the same numbers by groups: layer.py reshapes every
  field from (B, L, ...) to (G, S, ...).

  Attributes:
    logits: (B, L, E) float32.
    clean: (B, L, E) float32, the logits before noise; None without noise.
    std: (B, L, E) float32, standard deviation of that noise; None without noise.
    uniform: (B, L) float32 in [0, 1), for routing.keep_second; None: second choices are all kept.
    bias: (B, 1, E) float32 without gradient, the balancing bias once per example so that all fields
      split over devices alike, by groups (G, B/G, E); None without bias balancing.
  """
  logits: jax.Array
  clean: jax.Array | None = None
  std: jax.Array | None = None
  uniform: jax.Array | None = None
  bias: jax.Array | None = None


class RouterKeys(NamedTuple):
  """(B,) keys for each random draw of a router."""
  noise: jax.Array
  jitter: jax.Array
  second: jax.Array


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

  def __call__(self, x: jax.Array, keys: RouterKeys | None) -> RouterOutput:
    """Logits of tokens x (B, L, D); without keys (in evaluation) nothing random happens."""
    config = self.config
    x = x.astype(jnp.float32)
    if keys and config.jitter:
      x = x * nn.draw_per_example(lambda key, shape: jax.random.uniform(
          key, shape, minval=1 - config.jitter, maxval=1 + config.jitter), keys.jitter, x.shape)
    logits = _dot(x, self.kernel[...])
    output = RouterOutput(logits)
    if keys and (config.learned_noise or config.noise_std):
      std = (jax.nn.softplus(_dot(x, self.noise_kernel[...])) if config.learned_noise
             else jnp.full_like(logits, config.noise_std / logits.shape[-1]))
      noise = nn.draw_per_example(jax.random.normal, keys.noise, logits.shape)
      output = RouterOutput(logits + std * noise, logits, std)
    if keys and config.second_threshold:
      output = output._replace(
          uniform=nn.draw_per_example(jax.random.uniform, keys.second, x.shape[:2]))
    if config.bias_rate:
      bias = jax.lax.stop_gradient(self.no_grad['bias'][...])
      output = output._replace(bias=jnp.broadcast_to(bias, (len(x), 1, *bias.shape)))
    return output


def norm_logits(apply: Callable, weights: dict, x: jax.Array, num_experts: int) -> RouterOutput:
  """Log of the norm of every expert's output for every token (Lo et al. 2024, section 5).

  Their softmax gives an expert its share of the norms. For router='norm', which has no Router.

  Args:
    apply: the experts, (weights, (E, N, D)) -> (E, N, D).
    weights: expert weights; those of this device where apply exchanges buffers.
    x: (G, S, D).
    num_experts: E.

  Returns:
    RouterOutput with logits (G, S, E) alone.
  """
  G, S, D = x.shape
  out = apply(weights, jnp.broadcast_to(x.reshape(1, G * S, D), (num_experts, G * S, D)))
  squares = jnp.square(out.astype(jnp.float32)).sum(-1)             # (E, G*S)
  return RouterOutput(0.5 * jnp.log(squares + 1e-30).T.reshape(G, S, num_experts))


def route(config: MoEConfig, output: RouterOutput, mask: jax.Array, capacity: int | None
          ) -> tuple[routing.SlotRouting | routing.TokenRouting, dict[str, jax.Array]]:
  """Chooses experts by the config's rule and places the choices; and the losses and telemetry.

  Args:
    config: MoEConfig.
    output: RouterOutput by groups.
    mask: (G, S) bool, False at padding.
    capacity: C, slots per expert and group; None: token choice without a capacity.

  Returns:
    The routing that dispatch takes: SlotRouting, or without a capacity TokenRouting. And aux, a
    dict of float32 sums over groups: `telemetry.sums`; for token choice 'asked' (E,), the choices
    per expert before any drop, for balance.update_bias; for each of `losses` its value under its
    name and, if it has a weight, the weighted value under the name + '_loss'. Divide by 'tokens'
    for means.
  """
  E = output.logits.shape[-1]
  probs = routing.probabilities(output.logits, config.score)        # (G, S, E)
  choices = placed = choose(config, output, mask, capacity)
  if config.token_choice:
    if capacity is not None:
      priority = probs.max(-1) if config.batch_priority else None
      placed = placement.place(choices, E, capacity, order=config.order, priority=priority)
    asked = telemetry.choices_per_expert(choices, E).sum(0)         # (E,)
    aux = telemetry.sums(placed, probs, mask, asked.sum()) | {'asked': asked}
  else:
    aux = telemetry.sums(placed, probs, mask)
  for name, (loss_weight, value) in losses(config, output, probs, choices, mask).items():
    aux[name] = jax.lax.stop_gradient(value)
    if loss_weight:   # a loss without weight must not count in the mean over layers
      aux[f'{name}_loss'] = loss_weight * value
  return placed, aux


def choose(config: MoEConfig, output: RouterOutput, mask: jax.Array, capacity: int | None
           ) -> routing.SlotRouting | routing.TokenRouting:
  """The choices by the config's rule, before any placement; arguments are those of `route`."""
  options = {'renormalize': config.renormalize, 'scale': config.weight_scale}
  match config.router:
    case 'expert_choice':
      return routing.expert_choice(output.logits, mask, capacity, renormalize=config.renormalize)
    case 'top_p':
      return routing.top_p(output.logits, mask, config.p, config.k, **options)
    case 'top_k' | 'norm':
      bias = None if output.bias is None else output.bias[:, :1]    # (G, 1, E)
      choices = routing.top_k(output.logits, mask, config.k, score=config.score, bias=bias,
                              **options)
      if output.uniform is not None:
        choices = routing.keep_second(choices, output.uniform, config.second_threshold)
      return choices
  raise ValueError(f'router.choose has no case for router={config.router!r}: add one')


def losses(config: MoEConfig, output: RouterOutput, probs: jax.Array,
           choices: routing.TokenRouting | routing.SlotRouting, mask: jax.Array
           ) -> dict[str, tuple[float, jax.Array]]:
  """{name: (loss weight, value)} of auxiliary losses; a value is a scalar sum over real tokens.

  Those with a weight, and whatever their weight 'z' and, for token choice, 'balance', which show
  the health of any router. Arguments are those of `route` and what it derives from them.
  """
  E = probs.shape[-1]
  over_tokens = lambda value: (value * mask.sum(1)).sum()           # (G,) means over tokens -> sum
  values = {'z': (config.z_weight, balance.router_z(output.logits, mask).sum())}
  if not config.token_choice:
    return values
  values['balance'] = (config.balance_weight, over_tokens(balance.load_balance(
      probs, choices, mask, first_only=config.balance_counts == 'first')))
  if config.importance_weight:
    # Shazeer sums the weights that are used, V-MoE the noiseless probabilities of all experts.
    clean = output.logits if output.clean is None else output.clean
    gates = (balance.gates(choices, E) if config.learned_noise
             else routing.probabilities(clean, config.score))
    values['importance'] = (config.importance_weight,
                            over_tokens(balance.importance(gates, mask)))
  if config.load_weight and output.clean is not None:
    values['smooth_load'] = (config.load_weight, over_tokens(balance.smooth_load(
        output.clean, output.logits, output.std, config.k, mask,
        exclude_self=config.learned_noise)))
  if config.entropy_weight:
    values['entropy_penalty'] = (config.entropy_weight,
                                 balance.entropy_penalty(probs, mask).sum())
  return values


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """(..., D) @ (D, E) in full float32: a TPU would round the operands to bfloat16."""
  flat = jnp.dot(x.reshape(-1, x.shape[-1]), kernel, precision=jax.lax.Precision.HIGHEST)
  return flat.reshape(*x.shape[:-1], -1)
