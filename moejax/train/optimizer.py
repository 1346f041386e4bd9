"""Optimizers with one small state per leaf, and learning rates that read the global step.

Every leaf of the parameters has its own slots and its own count (`wi_gate/mu`, `/nu`, `/count`),
so that surgery can carry some leaves' state and start others afresh: a count carried over fresh
zero slots makes Adam's first update 1/sqrt(1 - b2) * (1 - b1) times too large. Leaves stacked over
experts are updated by `jax.vmap` over the expert axis: E stacked experts are E separate runs.

E experts, D and F any dimensions of a leaf.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax import trees
from moejax.config import check, check_choice

Tree = trees.Tree
EXPERTS = re.compile(r'/experts/')  # leaves with a leading expert axis


def _check_above_zero(key: str, value: float) -> None:
  check(value > 0, key, value, 'above 0', 'Set a positive number.')


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
  """Adafactor (Shazeer & Stern 2018) without momentum; the defaults are T5's.

  Attributes:
    min_dim_size_to_factor: second moments are factored where two dimensions are at least this.
    decay_rate: exponent c of the second-moment decay 1 - t^-c, t counting the leaf's own updates.
    clipping_threshold: upper bound on an update's root mean square.
    multiply_by_parameter_scale: scale updates by the leaf's root mean square.
    eps: added to squared gradients.
    min_scale: lower bound of the parameter scale.
  """
  min_dim_size_to_factor: int = 128
  decay_rate: float = 0.8
  clipping_threshold: float = 1.0
  multiply_by_parameter_scale: bool = True
  eps: float = 1e-30
  min_scale: float = 1e-3

  def __post_init__(self):
    for key in ('min_dim_size_to_factor', 'decay_rate', 'clipping_threshold', 'eps'):
      _check_above_zero(f'optimizer.adafactor.{key}', getattr(self, key))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """What updates the parameters.

  Attributes:
    name: 'adamw' (Loshchilov & Hutter 2019), 'adafactor', or 'sgd'.
    learning_rate: peak of the schedule.
    b1, b2, eps: adamw's moment decays and denominator offset.
    momentum: sgd's; 0 keeps no slots.
    weight_decay: decoupled; a step subtracts lr * weight_decay * param.
    weight_decay_mask: regular expression; leaves whose path it finds are decayed. The default
      takes all but biases, norms and scales.
    clip_norm: bound on the global gradient norm; 0 is off. Applied by `clip_by_global_norm`.
    adafactor: its own settings.
  """
  name: str = 'adamw'
  learning_rate: float = 1e-3
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  momentum: float = 0.0
  weight_decay: float = 0.0
  weight_decay_mask: str = r'^(?!.*(bias|norm|scale))'
  clip_norm: float = 1.0
  adafactor: AdafactorConfig = AdafactorConfig()

  def __post_init__(self):
    check_choice('optimizer.name', self.name, ('adamw', 'adafactor', 'sgd'))
    _check_above_zero('optimizer.learning_rate', self.learning_rate)
    _check_above_zero('optimizer.eps', self.eps)
    for key in ('b1', 'b2', 'momentum'):
      value = getattr(self, key)
      check(0 <= value < 1, f'optimizer.{key}', value, '0 <= x < 1',
            'It is the weight of the past in a moving average.')
    for key in ('weight_decay', 'clip_norm'):
      value = getattr(self, key)
      check(value >= 0, f'optimizer.{key}', value, '0 (off) or more', 'Set 0 to turn it off.')
    try:
      re.compile(self.weight_decay_mask)
    except re.error as error:
      check(False, 'optimizer.weight_decay_mask', self.weight_decay_mask, 'a regular expression',
            f'It does not compile: {error}.')


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
  """Shape of the learning rate over global steps t.

  Attributes:
    name: with peak = optimizer.learning_rate and w = min(1, t / warmup_steps),
      'rsqrt': peak * min(w, sqrt(timescale / t)): flat from warm-up until t = timescale, then
        falling as 1/sqrt(t). peak 0.01, timescale 10000 is T5's 1/sqrt(max(t, 10000)), and
        timescale = warmup_steps is big_vision's form.
      'constant': peak * w.
      'cosine': from peak to peak * final_fraction at the run's end; warm-up and cosine count from
        the run's first step, so a continuation warms up again.
    warmup_steps: length of the linear warm-up from 0.
    timescale: rsqrt only, see above.
    cooldown_steps: the last steps of the run, over which the rate falls linearly from the
      schedule's value to cooldown_to times it. rsqrt and constant only.
    cooldown_to: fraction left at the run's end.
    final_fraction: cosine only, see above.
  """
  name: str = 'rsqrt'
  warmup_steps: int = 200
  timescale: int = 1000
  cooldown_steps: int = 0
  cooldown_to: float = 0.0
  final_fraction: float = 0.0

  def __post_init__(self):
    check_choice('schedule.name', self.name, ('rsqrt', 'cosine', 'constant'))
    for key in ('warmup_steps', 'cooldown_steps'):
      value = getattr(self, key)
      check(value >= 0, f'schedule.{key}', value, '0 or more', 'It is a number of steps.')
    _check_above_zero('schedule.timescale', self.timescale)
    for key in ('cooldown_to', 'final_fraction'):
      value = getattr(self, key)
      check(0 <= value <= 1, f'schedule.{key}', value, '0 <= x <= 1',
            'It is a fraction of the rate.')
    check(self.name != 'cosine' or self.cooldown_steps == 0, 'schedule.cooldown_steps',
          self.cooldown_steps, '0 with cosine',
          'A cosine cools down by itself; set schedule.final_fraction instead.')


def schedule(config: ScheduleConfig, learning_rate: float, *, start_step: int,
             end_step: int) -> Callable[[jax.Array], jax.Array]:
  """Learning rate as a function of the global step.

  rsqrt and constant depend on start_step in nothing: a run that continues a trunk at start_step
  follows the trunk's curve until its own cooldown begins.

  Args:
    config: the curve.
    learning_rate: its peak.
    start_step: global step at which this run starts (the trunk's, or 0).
    end_step: global step at which this run ends; the cooldown is measured back from here.

  Returns:
    fn(step) -> () float32. `step` counts the updates made so far (TrainState.step), so the first
    update of a warm-up has rate 0 and the value at end_step is never used by an update.

  Raises:
    ConfigError: end_step not after start_step, or a cooldown that starts before start_step.
  """
  check(end_step > start_step, 'train.steps', end_step - start_step, 'at least 1',
        f'The run would go from step {start_step} to {end_step}.')
  check(config.cooldown_steps <= end_step - start_step, 'schedule.cooldown_steps',
        config.cooldown_steps, f'at most the {end_step - start_step} steps of this run',
        'A longer cooldown would start this run below the rate its parent was trained at.')

  def fn(step):
    t = jnp.asarray(step, jnp.float32)
    if config.name == 'cosine':
      t = t - start_step
    factor = jnp.minimum(1.0, t / config.warmup_steps) if config.warmup_steps else 1.0
    if config.name == 'rsqrt':
      factor = jnp.minimum(factor, jnp.sqrt(config.timescale / jnp.maximum(t, 1.0)))
    elif config.name == 'cosine':
      length = max(end_step - start_step - config.warmup_steps, 1)
      progress = jnp.clip((t - config.warmup_steps) / length, 0.0, 1.0)
      low = config.final_fraction
      factor = factor * (low + (1.0 - low) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
    if config.cooldown_steps:
      left = jnp.clip((end_step - t) / config.cooldown_steps, 0.0, 1.0)
      factor = factor * (config.cooldown_to + (1.0 - config.cooldown_to) * left)
    return jnp.asarray(learning_rate * factor, jnp.float32)

  return fn


def init(config: OptimizerConfig, params: Tree) -> Tree:
  """Fresh optimizer state.

  Args:
    config: which optimizer.
    params: nested dict of arrays.

  Returns:
    Nested dict with the paths of params, each leaf replaced by a dict of arrays: `count` int32,
    and mu, nu (adamw), v_row, v_col, v (adafactor; shape (1,) where unused), trace (sgd with
    momentum). A leaf under `/experts/` has the slots of one expert with a leading axis E, count
    (E,) too.
  """
  tx = _slots(config)

  def leaf(path, param):
    return jax.vmap(tx.init)(param) if EXPERTS.search(path) else tx.init(param)

  return trees.map_with_path(leaf, params)


def update(config: OptimizerConfig, grads: Tree, opt_state: Tree, params: Tree,
           lr: jax.Array) -> tuple[Tree, Tree]:
  """One step of the optimizer; pure, for use under jit. Does not clip by global norm.

  Args:
    config: which optimizer.
    grads: nested dict of arrays, like params.
    opt_state: as made by init.
    params: nested dict of arrays.
    lr: () learning rate of this step.

  Returns:
    (new params, new opt_state), shapes and dtypes as they came.
  """
  tx = _slots(config)

  def leaf(path, param, grad, state):
    decay = config.weight_decay if re.search(config.weight_decay_mask, path) else 0.0

    def one(grad, state, param, lr):
      delta, state = tx.update(grad.astype(param.dtype), state, param)
      delta = delta + decay * param if decay else delta
      return (param - lr * delta).astype(param.dtype), state

    if EXPERTS.search(path):
      one = jax.vmap(one, in_axes=(0, 0, 0, None))
    return one(grad, state, param, lr)

  pairs = trees.map_with_path(leaf, params, grads, opt_state)  # a (param, state) at each leaf
  return (trees.map_with_path(lambda _, pair: pair[0], pairs),
          trees.map_with_path(lambda _, pair: pair[1], pairs))


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
  """Scales grads so that their global L2 norm is at most max_norm (0: no bound).

  Returns:
    (grads, () float32 norm before clipping).
  """
  norm = optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
  if not max_norm:
    return grads, norm
  scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
  return jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads), norm


@dataclasses.dataclass(frozen=True)
class _LeafTransform:
  """An optimizer of a single leaf whose state is a plain dict with a count."""
  init: Callable[[jax.Array], dict[str, jax.Array]]
  update: Callable[[jax.Array, dict[str, jax.Array], jax.Array], tuple[jax.Array, Any]]


def _slots(config: OptimizerConfig) -> _LeafTransform:
  """(grad, state, param) -> (direction to be multiplied by -lr, state), for one leaf."""
  if config.name == 'adamw':
    return _as_dict(optax.scale_by_adam(config.b1, config.b2, config.eps), optax.ScaleByAdamState)
  if config.name == 'adafactor':
    a = config.adafactor
    after = [optax.clip_by_block_rms(a.clipping_threshold)]
    if a.multiply_by_parameter_scale:
      after.append(optax.scale_by_param_block_rms(a.min_scale))
    factored = optax.scale_by_factored_rms(
        decay_rate=a.decay_rate, min_dim_size_to_factor=a.min_dim_size_to_factor, epsilon=a.eps)
    return _as_dict(factored, optax.FactoredState, *after)
  if config.momentum:
    return _as_dict(optax.trace(config.momentum), optax.TraceState)
  return _as_dict(optax.identity(), optax.EmptyState)


def _as_dict(tx: optax.GradientTransformation, state_type: type,
             *after: optax.GradientTransformation) -> _LeafTransform:
  """tx, then the stateless transforms `after`, with tx's NamedTuple state as a dict."""
  counts = 'count' in state_type._fields

  def init_leaf(param):
    state = tx.init(param)._asdict()
    return state if counts else state | {'count': jnp.zeros((), jnp.int32)}

  def update_leaf(grad, state, param):
    fields = {k: state[k] for k in state_type._fields}
    delta, new = tx.update(grad, state_type(**fields), param)
    for stateless in after:
      delta, _ = stateless.update(delta, optax.EmptyState(), param)
    new = new._asdict()
    return delta, new if counts else new | {'count': state['count'] + 1}

  return _LeafTransform(init_leaf, update_leaf)
