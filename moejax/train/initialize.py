"""Makes a run's first state: fresh, a parent's, or the result of surgery on a parent's.

Only this file imports checkpoints, surgery and models together. A parent is the workdir of another
run of moejax. The default step is the parent's trunk, the last step before its cooldown.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax import trees
from moejax.checkpoints import orbax
from moejax.config import check, renamed
from moejax.config import path as path_of
from moejax.surgery import expert_init, upcycle
from moejax.surgery.config import END, TRUNK, InitConfig
from moejax.surgery.receipt import Receipt
from moejax.train import optimizer
from moejax.train.config import RunConfig
from moejax.train.parallel import MeshParallel
from moejax.train.step import TrainState
from moejax.train.workdir import read_json
from moejax.trees import rules


@dataclasses.dataclass(frozen=True)
class Parent:
  """A checkpoint of another run: its reader, and that run's config.json and run.json."""
  reader: orbax.Reader
  config: dict
  run: dict


def open_parent(config: InitConfig) -> Parent | None:
  """Opens the parent's checkpoint; None for scratch. Raises ConfigError if there is none."""
  if config.mode == 'scratch':
    return None
  return open_run(config.parent, 'config.init.parent', config.step)


def open_run(path: str, key: str, step: int) -> Parent:
  """Opens a checkpoint of another run.

  Args:
    path: its workdir.
    key: the config key that names it, for messages.
    step: which checkpoint, as InitConfig.step; only with that key the number of a step.

  Raises:
    ConfigError: there is no such run or checkpoint, or its files are damaged.
  """
  directory, is_parent = path_of(key, path), key == 'config.init.parent'
  config = renamed(read_json(directory / 'config.json', key))
  name = {TRUNK: 'trunk_step', END: 'end_step'}.get(step)
  run = read_json(directory / 'run.json', key, needs=(name,) if name else ())
  saved = orbax.finished_steps(directory / orbax.SUBDIR)
  steps = ', '.join(map(str, saved)) or '(none)'
  if name:
    step = run[name]
    check(step in saved, key, path, f'a run that has come to its {name}, {step}',
          f'Its checkpoints are of steps {steps}: let it go on'
          + (', or set config.init.step to one of them.' if name == 'trunk_step' else '.'))
  check(step in saved, 'config.init.step', step, f'{steps}: the checkpoints of {path}',
        f'Choose one of them, {TRUNK} (its trunk) or {END} (its end).')

  def remedy(older: list[int]) -> str:
    again = f'Start that run again after {orbax.set_away(step, older, "it")}.'
    if not older or not is_parent:
      return again
    return f'Set config.init.step={older[-1]}. Or: {again}'
  return Parent(orbax.Reader(directory, step, key, remedy), config, run)


def check_model(config: RunConfig, parent: Parent) -> None:
  """Checks that a run's model computes what its parent's did, sparse layers apart.

  Most of these settings (heads, activations) leave no trace in the shapes of parameters, so surgery
  would not notice that it makes another function.

  Raises:
    ConfigError: naming the first that differs.
  """
  stacks = config.model.stacks().values()
  free = {'dtype', 'dropout_rate', *(stack.moe_key for stack in stacks)}
  if config.init.new_head:
    free |= {'num_classes', 'head'}
  if config.init.mode == 'depth_tile':
    free |= {stack.depth_key for stack in stacks}
  theirs, ours = parent.config.get('model', {}), dataclasses.asdict(config.model)
  for name in (name for name in ours if name in theirs and name not in free):
    check(ours[name] == theirs[name], f'config.model.{name}', ours[name],
          f'{theirs[name]!r}, as in {config.init.parent}',
          'A child computes what its parent did; only its sparse layers may differ.')


def state_shapes(config: RunConfig, model, devices: MeshParallel) -> TrainState:
  """Returns shapes and shardings of the state in single blocks, with an empty window."""
  tree = jax.eval_shape(functools.partial(_fresh, model, config.optimizer), jax.random.key(0))
  tree = devices.with_shardings(tree)
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  small = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=devices.replicated())
  return TrainState(small(jax.ShapeDtypeStruct((), jnp.int32)), tree['params'], tree['opt_state'],
                    small(key), {})


def plan_surgery(config: RunConfig, state: TrainState, parent: Parent) -> rules.Plan:
  """Plans the run's surgery on its parent by shapes alone.

  state: shapes of the run's state, as of `state_shapes`.

  Raises:
    ConfigError: the parent's leaves do not fit; both sides are listed.
  """
  return _plan(config, {'params': state.params, 'opt_state': state.opt_state}, parent)


def first_state(config: RunConfig, model, devices: MeshParallel, parent: Parent | None,
                surgery: rules.Plan | None = None) -> tuple[TrainState, Receipt | None]:
  """Returns the state before this run's first step, on its devices, with an empty window.

  Args:
    config: the run.
    model: models.Model of config.model.
    devices: where the state goes.
    parent: None for a run from scratch.
    surgery: on the parent; None: it is planned here.

  Returns:
    The state and, if there is a parent, the receipt of every leaf.

  Raises:
    ConfigError: the parent's leaves do not fit; both sides are listed.
  """
  param_key, noise_key = jax.random.split(jax.random.key(config.seed))
  if parent is None:
    make = functools.partial(_fresh, model, config.optimizer)
    tree, receipt, step = devices.init(make, param_key), None, 0
  else:
    surgery = surgery or plan_surgery(config, state_shapes(config, model, devices), parent)
    tree, entries = _operate(surgery, parent, lambda paths: _some_params(
        model, param_key, paths, devices))
    step = parent.reader.step
    receipt = Receipt.of(entries, **config.init.settings | {'seed': config.seed, 'step': step})
  put = lambda x: jax.device_put(x, devices.replicated())
  return TrainState(put(jnp.int32(step)), tree['params'], tree['opt_state'],
                    put(jax.random.key_data(noise_key)), {}), receipt


def first_params(config: RunConfig, model, devices: MeshParallel, parent: Parent) -> dict:
  """Returns the parameters of `first_state` alone, to evaluate a surgery that is not trained.

  No optimizer state is read or made. Raises ConfigError as `first_state` does.
  """
  param_key, _ = jax.random.split(jax.random.key(config.seed))
  surgery = _plan(config, {'params': devices.with_shardings(model.shapes)}, parent)
  return _operate(surgery, parent, lambda paths: _some_params(
      model, param_key, paths, devices))[0]['params']


def parent_params(parent: Parent, model, devices: MeshParallel) -> dict:
  """Returns the parent's own parameters, such as to compare the two functions at step 0.

  model: of the parent's config. Raises ConfigError if its leaves are not the checkpoint's.
  """
  shapes = trees.flatten({'params': devices.with_shardings(model.shapes)})
  source = {p: s for p, s in parent.reader.shapes.items() if p.startswith('params/')}
  surgery = rules.plan([rules.copy('.+')], source, shapes)
  return _operate(surgery, parent, lambda paths: {})[0]['params']


def _fresh(model, config: optimizer.OptimizerConfig, key: jax.Array) -> dict:
  params = model.init(key)
  return {'params': params, 'opt_state': optimizer.init(config, params)}


def _plan(config: RunConfig, target: dict, parent: Parent) -> rules.Plan:
  """The rules of the run's kind of surgery, checked against its parent and the target's shapes."""
  source = {p: s for p, s in parent.reader.shapes.items() if p.split('/')[0] in target}
  shapes, init = trees.flatten(target), config.init
  if init.mode == 'depth_tile':
    table = upcycle.depth_tile_rules(source, shapes, init.optimizer, init.tiling)
  elif init.mode == 'continue':
    table = upcycle.continue_rules(source, shapes, init.optimizer, new_head=init.new_head)
  else:
    table = upcycle.upcycle_rules(source, shapes, init.optimizer, expert_settings(config),
                                  new_head=init.new_head)
  return rules.plan(table, source, shapes)


def expert_settings(config: RunConfig) -> expert_init.ExpertInit:
  """Returns how new experts start, with what surgery must know of the model's routers."""
  model = config.model
  gates = {name: gate for name, stack in model.stacks().items()
           if (gate := _gate(stack.moe, f'config.model.{stack.moe_key}.k'))}
  return config.init.expert_init(seed=config.seed, gates=gates,
                                 squared=model.activation == 'squared_relu')


def _gate(moe, key: str) -> expert_init.Gate | None:
  """The weights of a token at step 0; None for routers that promise no sum.

  key: the config key of k.
  """
  if moe.router == 'expert_choice':
    return expert_init.Gate(moe.capacity_factor, False, 'softmax', moe.renormalize)
  if moe.router == 'top_k':
    return expert_init.Gate(moe.k, True, moe.score, moe.renormalize, moe.weight_scale, key)
  return None


def _operate(surgery: rules.Plan, parent: Parent, fresh_params: Callable[[set[str]], dict]
             ) -> tuple[dict, list[rules.Entry]]:
  """Does a planned surgery, leaf by leaf, straight into the target's shardings.

  fresh_params: paths 'params/...' -> {path: its fresh value}.
  """
  shapes = surgery.target_shapes
  fresh = fresh_params({path for path in surgery.fresh if path.startswith('params/')})
  flat, entries = rules.apply(
      surgery, read=parent.reader.read,
      make_fresh=upcycle.fresh_values(shapes, fresh.__getitem__),
      place=lambda path, make, shape, dtype: jax.make_array_from_callback(
          shape, shapes[path].sharding, make))
  return trees.unflatten(flat), entries


def _some_params(model, key: jax.Array, paths: set[str], devices: MeshParallel) -> dict:
  """{path: value} of some parameters 'params/...' of a fresh model; others are not computed.

  Experts, which may be most of a model, stay on their devices; the rest are numpy arrays.
  """
  def pick(wanted):
    def init(key):
      params = trees.flatten({'params': model.init(key)})
      return trees.unflatten({p: params[p] for p in wanted})
    return init
  experts = {p for p in paths if '/experts/' in p}
  split = trees.flatten(devices.init(pick(experts), key)) if experts else {}
  whole = jax.device_get(jax.jit(pick(paths - experts))(key))
  return {p: _Shards(leaf) for p, leaf in split.items()} | trees.flatten(whole)


@dataclasses.dataclass(frozen=True)
class _Shards:
  """An array on devices that can be indexed by the slices that its own devices hold."""
  array: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  @property
  def dtype(self) -> jnp.dtype:
    return self.array.dtype

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    return next(np.asarray(shard.data) for shard in self.array.addressable_shards
                if shard.index == index)
