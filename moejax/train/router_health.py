"""Warns, once per kind and in one line, of routers that have failed in a known way.

A sparse model whose router has failed still trains, as a worse dense model, and its load may even
be uniform. So this file checks gradients, logits and choices, not load alone. The thresholds are
our own; the comments give their reasons.
"""

import math
import re

from moejax.config import check

# Mean entropy of router probabilities, nats. A top probability of 0.99 leaves 0.056 over two
# experts, and the softmax's gradient p (1 - p) is then 4 % of its largest.
LOW_ENTROPY = 0.05
# Mean of logsumexp(logits)^2. Where logits are 100, tokens rounded to bfloat16 (relative error up
# to 1/256) move one by 0.4, and with it an expert's weight by half.
HIGH_Z = 1e4
# Gradient norm of a router over that of all parameters. Terms that should cancel leave float32's
# rounding, 6e-8 of each; some ten times that is still no signal.
VANISHING = 1e-6
# Fraction of tokens with one expert, whose renormalised weight is the constant 1.
MANY_SINGLE = 0.5
# Experts that are all equal, as right after upcycling, give their router no gradient where weights
# sum to 1. They differ after an update, and the first update of a warm-up has rate 0.
FIRST_STEPS = 2


def check_finite(values: dict, step: int, saved: int | None) -> None:
  """Raises ConfigError if training has diverged: all that follows would be NaN, checkpoints too.

  Args:
    values: metrics of a train window.
    step: its last step.
    saved: step of the last checkpoint, or None.
  """
  for name in ('loss', 'grad_norm'):
    value = values.get(name, 0.0)
    check(math.isfinite(value), f'step {step}: train/{name}', value, 'finite numbers',
          'Training has diverged: lower optimizer.learning_rate, set optimizer.clip_norm, or warm '
          'up longer, in a new workdir. '
          + ('There is no checkpoint yet.' if saved is None else
             f'The last checkpoint is of step {saved}.'))


class Watch:
  """Warns of each kind of failure once in a run.

  Args:
    config: RunConfig.
    first: global step at which the run starts.
  """

  def __init__(self, config, first: int = 0):
    self.config, self.first = config, first
    self._reported = set()

  def lines(self, step: int, values: dict) -> list[str]:
    """Returns warnings of kinds not reported before.

    step: global; values: as of `warnings`.
    """
    by_kind = warnings(values, self.config, step - self.first)
    new = [line for kind, line in by_kind.items() if kind not in self._reported]
    self._reported |= set(by_kind)
    return new


def warnings(values: dict, config, steps: int) -> dict[str, str]:
  """Returns what is wrong with the routers of a train window or an evaluation.

  Args:
    values: of metrics.summarize. Router gradient norms are judged only beside 'grad_norm'.
    config: RunConfig; `model`, `optimizer.clip_norm`, `schedule.warmup_steps`, `steps` are read.
    steps: that this run has taken up to the end of the window.

  Returns:
    {kind: one line}: 'collapse', 'zero_gradient', 'saturation', 'single'; empty if all is well.
    Layers of one expert have nothing to route and are left out, and so are routers without
    gradient norm (frozen, or without parameters) from 'zero_gradient'.
  """
  layers = _layers(values, config.model)
  kinds = {'collapse': collapse, 'saturation': saturation, 'single': single}
  # A run shorter than two warm-ups is judged from its middle on.
  if steps > max(FIRST_STEPS, min(config.schedule.warmup_steps, config.steps // 2)):
    kinds['zero_gradient'] = lambda layer: zero_gradient(
        layer, values.get('grad_norm', 0.0), config.optimizer.clip_norm)
  by_kind = {}
  for kind, judge in kinds.items():
    faults = {name: fault for name, layer in layers.items() if (fault := judge(layer))}
    if faults:
      where = '; '.join(f'{name}: {fault}' for name, fault in faults.items())
      by_kind[kind] = f'warning: {TITLES[kind]} in {where}. {REMEDIES[kind]}'
  return by_kind


TITLES = {'collapse': 'router collapse', 'zero_gradient': 'no router gradient',
          'saturation': 'saturated router logits', 'single': 'single-expert tokens'}
REMEDIES = {
    'collapse':
        'Most of what the experts hold goes unused. Raise moe.balance_weight (usual: 0.01) or set '
        'moe.bias_rate (top_k), or moe.router_init_std (expert_choice: equal logits); for norms of '
        "copies, which are equal, start with init.experts='noise' or 'drop'.",
    'zero_gradient':
        'The router cannot learn, however even its load. Its weights must multiply what different '
        'experts return, and must not be a constant (k = 1 renormalised).',
    'saturation':
        'Choices are all or nothing: gradients vanish and rounding decides. Set moe.z_weight '
        '(usual: 0.001), or lower the learning rate or moe.router_init_std.',
    'single':
        'Renormalised, the weight of one expert is the constant 1, and these tokens teach the '
        'router nothing (Komatsuzaki et al. 2023, B.7). Raise moe.capacity_factor (top_p: moe.p) '
        'or set moe.renormalize=False.',
}


def collapse(layer: dict) -> str:
  """Describes collapse: half of the experts dead, one with nearly all tokens, or all with the same.

  One expert has too many where more tokens choose it than halfway from an even share, k / E, to all
  of them; half of all tokens if E is large. Expert choice loads all experts equally, but they may
  pick the same tokens: halfway from picking at random, which reaches 1 - (1 - q)^E of the tokens if
  each expert picks a fraction q, to all picking the same q.

  Returns '' if there is none; so do the functions below.
  """
  E, k = layer['num_experts'], layer['experts_per_token']
  if layer['dead_experts'] >= E / 2:
    return f'{layer["dead_experts"]:.0f} of {E} experts got no token'
  if 'max_violation' in layer:
    busiest = (layer['max_violation'] + 1) * k / E
    if busiest > (1 + k / E) / 2:
      return f'one of {E} experts is asked for by {busiest:.0%} of tokens'
  elif not layer['moe'].token_choice:
    q, reached = k / E, 1 - layer['unchosen']
    if reached < (q + 1 - (1 - q) ** E) / 2:
      return f'{E} experts together pick {reached:.0%} of tokens, each picks {q:.0%}'
  return ''


def zero_gradient(layer: dict, grad_norm: float, clip_norm: float) -> str:
  """Describes a router gradient of 0, or of rounding noise beside the whole gradient.

  Auxiliary losses have a gradient too, which may hide that the task has none.

  Args:
    layer: metrics; its router_grad_norm is that after clipping.
    grad_norm: of all parameters, before clipping; 0: unknown, or no parameter has a gradient.
    clip_norm: bound on it, 0 for none.
  """
  if not grad_norm or 'router_grad_norm' not in layer:
    return ''
  total = min(grad_norm, clip_norm or grad_norm)
  norm = layer['router_grad_norm']
  return f'gradient norm {norm:.2g} of {total:.2g} in all' if norm < VANISHING * total else ''


def saturation(layer: dict) -> str:
  """Describes huge logits, or a softmax with all its probability on one expert."""
  if layer['z'] > HIGH_Z:
    return f'logsumexp of the logits is {layer["z"] ** 0.5:.0f} (root mean square)'
  if layer['moe'].score != 'sigmoid' and layer['entropy'] < LOW_ENTROPY:
    return f'entropy {layer["entropy"]:.2g} nats'
  return ''


def single(layer: dict) -> str:
  """Describes that most tokens have one expert, where weights are made to sum to 1.

  Top-k renormalises before it drops: if one of two is dropped, the other keeps its gradient.
  """
  moe = layer['moe']
  if moe.renormalize and moe.router in ('expert_choice', 'top_p') and layer['single'] > MANY_SINGLE:
    return f'{layer["single"]:.0%} of tokens'
  return ''


def _layers(values: dict, model) -> dict[str, dict]:
  """{'encoder/01': metrics of the layer, its settings 'moe' and 'num_experts'}, if it has two."""
  layers, stacks = {}, model.stacks()
  for key, value in values.items():
    match = re.fullmatch(r'moe/(\w+)/(\d+)/(\w+)', key)
    if match:
      stack, number, metric = match.groups()
      layers.setdefault((stack, number), {})[metric] = value
  for (stack, number), layer in layers.items():
    layer['moe'] = stacks[stack].moe
    layer['num_experts'] = stacks[stack].sparse[int(number)]
  return {'/'.join(name): layer for name, layer in layers.items() if layer['num_experts'] > 1}
