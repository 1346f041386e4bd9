"""Optimizers with one small state per leaf, and groups of leaves with other rates or none.

Every leaf of the parameters has its own moments and its own count (`wi_gate/mu`, `/nu`, `/count`),
so that surgery can carry the state of some leaves and start that of others afresh: a count carried
over fresh zero moments makes Adam's first update 1/sqrt(1 - b2) * (1 - b1) times too large. Leaves
stacked over experts are updated by `jax.vmap` over the expert axis: E stacked experts are E
separate runs.

A group is a regular expression on the paths of leaves ('encoder/layers/01/moe/experts/wi'), as in
big_vision's lr_mults and wd_mults; the usual sets to freeze have names.

E experts, D and F any dimensions of a leaf.
"""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rapidfuzz import fuzz, process

from moejax import trees
from moejax.config import check, check_choice, fail, nearest
from moejax.trees import stacking

Tree = trees.Tree
EXPERTS = re.compile(r'/experts/')  # leaves with a leading expert axis
NO_GRAD = re.compile(r'/no_grad/')  # state among the parameters that the train step itself writes

# Parts of a model that `freeze` takes by name: regular expression, description. all_but_NAME is all
# others. The subsets that ST-MoE fine-tunes (Zoph et al. 2022, section 4.2) are among them.
PARTS = {
    'experts': (r'/experts/', 'routed experts (not shared ones)'),
    'router': (r'/router/', 'routers'),
    'moe': (r'/moe/', 'MoE layers whole: routed and shared experts, routers'),
    'mlp': (r'/mlp/', 'MLPs of the dense layers'),
    'attention': (r'attention/|relative_bias/', 'attention projections and relative biases'),
    'norm': (r'norm/', 'norms'),
    'embedding': (r'embed/', 'token, patch and position embeddings'),
    'head': (r'^head/', 'output head'),
}
ALL_BUT = 'all_but_'
REGEX = 're:'


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
  """The optimizer and the leaves it updates.

  Attributes:
    name: 'adamw' (Loshchilov & Hutter 2019), 'adafactor', or 'sgd'.
    learning_rate: peak of the schedule.
    b1, b2, eps: adamw's moment decays and denominator offset.
    momentum: sgd's; 0 keeps no moments.
    weight_decay: decoupled; a step subtracts lr * weight_decay * param.
    weight_decay_mask: regular expression; leaves whose path it finds are decayed. The default
      takes all but biases, norms and scales.
    groups: ((regex, learning rate multiplier, weight decay multiplier), ...); a leaf belongs to the
      first whose regular expression is found in its path, else its multipliers are 1. It moves by
      lr * rate_mult * (direction + weight_decay * decay_mult * param): unlike big_vision's, the
      decay follows the group's rate too. A rate times 0 is frozen, see `frozen`.
    freeze: leaves that keep their values: '' for none, a part named in PARTS ('experts',
      'router', 'attention', ...), 'all_but_' and such a name, or 're:' and a regular expression.
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
  groups: tuple = ()
  freeze: str = ''
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
    _check_regex('optimizer.weight_decay_mask', self.weight_decay_mask)
    # Plain tuples and floats, so that settings read back from JSON are the same and hashable.
    object.__setattr__(self, 'groups', _checked_groups(self.groups, self.freeze))


def init(config: OptimizerConfig, params: Tree) -> Tree:
  """Returns fresh optimizer state.

  Args:
    config: which optimizer.
    params: nested dict of arrays.

  Returns:
    Nested dict with the paths of params, each leaf replaced by a dict of arrays: `count` int32,
    and mu, nu (adamw), v_row, v_col, v (adafactor; shape (1,) where unused), trace (sgd with
    momentum). A leaf under `/experts/` has the state of one expert with a leading axis E, its count
    (E,). A leaf under `/no_grad/` has only its count, which stays 0. Frozen leaves have state as
    others do, so that freezing changes no shape.
  """
  tx = _transform(config)

  def leaf(path, param):
    if NO_GRAD.search(path):
      return {'count': jnp.zeros((), jnp.int32)}
    return jax.vmap(tx.init)(param) if EXPERTS.search(path) else tx.init(param)

  return trees.map_with_path(leaf, params)


def update(config: OptimizerConfig, grads: Tree, opt_state: Tree, params: Tree,
           lr: jax.Array) -> tuple[Tree, Tree]:
  """Takes one step of the optimizer; pure, for use under jit. Does not clip by global norm.

  Leaves that are frozen or under `/no_grad/` come back unchanged, as does their state. Those of
  stacked blocks (moejax.trees.stacking) are updated block by block.

  Args:
    config: which optimizer.
    grads: nested dict of arrays, like params.
    opt_state: as made by init.
    params: nested dict of arrays.
    lr: () learning rate of this step, before the multipliers of groups.

  Returns:
    (new params, new opt_state), with the shapes and dtypes of the old ones.
  """
  tx = _transform(config)

  def leaf(path, param, grad, state):
    stacked, path = stacking.is_stacked(path), stacking.members(path)[0]
    if untouched(config, path):
      return param, state
    mult = group(config, path)
    decay = config.weight_decay if re.search(config.weight_decay_mask, path) else 0.0
    decay *= mult.weight_decay

    def one(grad, state, param, lr):
      delta, state = tx.update(grad.astype(param.dtype), state, param)
      delta = delta + decay * param if decay else delta
      return (param - lr * delta).astype(param.dtype), state

    if EXPERTS.search(path):
      one = jax.vmap(one, in_axes=(0, 0, 0, None))
    if stacked:
      one = jax.vmap(one, in_axes=(0, 0, 0, None))
    return one(grad, state, param, lr * mult.learning_rate)

  pairs = trees.map_with_path(leaf, params, grads, opt_state)  # a (param, state) at each leaf
  return (trees.map_with_path(lambda _, pair: pair[0], pairs),
          trees.map_with_path(lambda _, pair: pair[1], pairs))


def clip_by_global_norm(grads: Tree, max_norm: float) -> tuple[Tree, jax.Array]:
  """Scales grads so that their global L2 norm is at most max_norm (0: no bound).

  Args:
    grads: tree of arrays, of the leaves that are trained alone: those of `untouched` ones would
      shrink the updates of the others.
    max_norm: the bound.

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
  """The optimizer of a single leaf; its state is a plain dict with a count."""
  init: Callable[[jax.Array], dict[str, jax.Array]]
  update: Callable[[jax.Array, dict[str, jax.Array], jax.Array], tuple[jax.Array, Any]]


def _transform(config: OptimizerConfig) -> _LeafTransform:
  """Returns (grad, state, param) -> (direction to be multiplied by -lr, state), of one leaf."""
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
  """Chains tx and the stateless transforms `after`; the state of tx, a NamedTuple, as a dict."""
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


@dataclasses.dataclass(frozen=True)
class Group:
  """Multipliers of the learning rate and the weight decay of a leaf."""
  learning_rate: float = 1.0
  weight_decay: float = 1.0


def _checked_groups(groups: tuple, freeze: str) -> tuple:
  """Returns groups as ((regex, rate multiplier, decay multiplier), ...) of plain types.

  Raises:
    ConfigError: an entry of another form, a multiplier below 0, a regular expression that does not
      compile, or a `freeze` that is neither '', a name in PARTS, all_but_NAME, nor 're:...'.
  """
  form = "(regex, learning rate multiplier, weight decay multiplier), as in (('^head/', 10, 1),)"
  number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  for i, entry in enumerate(groups):
    ok = (isinstance(entry, list | tuple) and len(entry) == 3 and isinstance(entry[0], str)
          and all(map(number, entry[1:])))
    check(ok, f'optimizer.groups[{i}]', entry, form, 'Every group is one such triple.')
    check(min(entry[1:]) >= 0, f'optimizer.groups[{i}]', entry, 'multipliers of 0 or more',
          'A multiplier of 0 freezes the leaves.')
    _check_regex(f'optimizer.groups[{i}]', entry[0])
  if freeze.startswith(REGEX):
    _check_regex('optimizer.freeze', freeze.removeprefix(REGEX))
  elif freeze and freeze.removeprefix(ALL_BUT) not in PARTS:
    known = ', '.join(f'{name} ({meaning})' for name, (_, meaning) in PARTS.items())
    near = nearest(freeze, [*PARTS, *(ALL_BUT + name for name in PARTS)])
    fail('optimizer.freeze', freeze,
         f"'' (nothing), '{REGEX}REGEX', or NAME or {ALL_BUT}NAME with NAME one of {known}",
         f'Did you mean {near!r}?' if near else 'Choose one of these.')
  return tuple((regex, float(rate), float(decay)) for regex, rate, decay in groups)


def _check_regex(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as error:
    fail(key, pattern, 'a regular expression', f'It does not compile: {error}.')


def group(config: OptimizerConfig, path: str) -> Group:
  """Returns the first of config.groups whose regular expression is found in path, else 1 and 1.

  path: of a parameter; for a stacked one (trees/stacking.py) that of its first block counts, since
    all its blocks agree (`check_stacked`).
  """
  path = stacking.members(path)[0]
  for regex, learning_rate, weight_decay in config.groups:
    if re.search(regex, path):
      return Group(learning_rate, weight_decay)
  return Group()


def frozen(config: OptimizerConfig, path: str) -> bool:
  """Whether a leaf is frozen, by `freeze` or by a learning rate multiplier of 0.

  A frozen leaf keeps its value and its optimizer state bit for bit, is not decayed, and is not in
  the global gradient norm; its state is there to be carried, or thawed, later.
  """
  path = stacking.members(path)[0]
  return _matches(config.freeze, path) or group(config, path).learning_rate == 0


def untouched(config: OptimizerConfig, path: str) -> bool:
  """Whether the optimizer does not change a leaf: it is frozen, or state without gradient."""
  return bool(NO_GRAD.search(path)) or frozen(config, path)


def _matches(freeze: str, path: str) -> bool:
  """Whether path is in the set that `freeze` names."""
  if not freeze:
    return False
  if freeze.startswith(REGEX):
    return bool(re.search(freeze.removeprefix(REGEX), path))
  regex, _ = PARTS[freeze.removeprefix(ALL_BUT)]
  return bool(re.search(regex, path)) != freeze.startswith(ALL_BUT)


def check_groups(config: OptimizerConfig, paths: Collection[str]) -> None:
  """Checks that every group, and the frozen set, has leaves. paths: of all parameters.

  Raises:
    ConfigError: a pattern that no leaf matches, naming the nearest leaves; a group all of whose
      leaves belong to earlier groups; or nothing left to train.
  """
  trainable = [path for path in paths if not NO_GRAD.search(path)]
  if config.freeze:
    part = config.freeze.removeprefix(ALL_BUT)
    regex = PARTS[part][0] if part in PARTS else part.removeprefix(REGEX)
    _check_found('optimizer.freeze', config.freeze, regex, trainable)
  taken = set()
  for i, (regex, *_) in enumerate(config.groups):
    found = _check_found(f'optimizer.groups[{i}]', regex, regex, trainable)
    check(not found <= taken, f'optimizer.groups[{i}]', regex,
          'a pattern with leaves that no earlier group has',
          'The first match wins: put the narrower pattern first.')
    taken |= found
  check(any(not frozen(config, path) for path in trainable), 'optimizer.freeze', config.freeze,
        'a set that leaves something to train', 'With optimizer.groups, every leaf is frozen.')


def check_stacked(config: OptimizerConfig, param_paths: Collection[str]) -> None:
  """Checks that the optimizer treats all blocks of a scan equally.

  param_paths: paths of all parameters, some of them stacked. Raises ConfigError where a group, the
    frozen set or the decay mask tells blocks of one scan apart.
  """
  treated = lambda path: (group(config, path), untouched(config, path),
                          bool(re.search(config.weight_decay_mask, path)))
  for path in param_paths:
    first, *others = stacking.members(path)
    for other in others:
      check(treated(other) == treated(first), 'config.execution.scan', True,
            f'False, since the optimizer treats {first} and {other} differently',
            'Blocks that run in one scan share groups, freeze and weight_decay_mask.')


def _check_found(key: str, given: str, regex: str, paths: Collection[str]) -> set[str]:
  """Returns the paths in which regex is found. Raises ConfigError if there is none."""
  found = {path for path in paths if re.search(regex, path)}
  word = re.sub(r'[^\w/]', '', regex).strip('/')
  near = process.extract(word, paths, scorer=fuzz.partial_ratio, limit=3)
  check(bool(found), key, given, f'what matches a leaf ({regex!r} matches none)',
        'Nearest leaves: ' + ', '.join(path for path, *_ in near) + '.')
  return found
