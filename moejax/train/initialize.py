"""Where a run's first state comes from: fresh parameters, a parent's, or surgery on a parent's.

The one place where checkpoints, surgery and models meet. A parent is the workdir of another run of
moejax; by default its trunk is taken, the last step before its cooldown.
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from moejax import trees
from moejax.checkpoints import orbax
from moejax.config import check, check_choice, renamed
from moejax.surgery import depth_tile, expert_init, upcycle
from moejax.surgery.receipt import Receipt
from moejax.train import files, optimizer
from moejax.train.step import TrainState
from moejax.trees import rules

if TYPE_CHECKING:
  from moejax.train.config import RunConfig

MODES = ('scratch', 'continue', 'upcycle', 'depth_tile')
TRUNK, END = -1, -2   # what InitConfig.step may be in place of a number


# Settings that mean nothing to the other modes: a value other than the default is a mistake there.
USED_BY = {key: ('upcycle',) for key in ('experts', 'copied_experts', 'noise_std',
                                         'reinit_fraction', 'scaling')}
USED_BY |= {'tiling': ('depth_tile',), 'new_head': ('continue', 'upcycle')}


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Start of a run.

  Attributes:
    mode: 'scratch'; 'continue' a parent of the same model; 'upcycle' one of the same depth and
      width in which other layers are sparse, or none; 'depth_tile' one with fewer blocks.
    parent: workdir of the parent run.
    step: which of its checkpoints; -1 is its trunk, the last step before its cooldown, and -2 its
      end, for fine-tuning.
    optimizer: 'carry' the parent's optimizer slots as far as they mean something for the new leaves
      (which of these start from zero instead: see moejax.surgery.expert_init, upcycle), or 'reset'
      all of them to zero.
    experts: 'upcycle': new experts are each a 'copy' of the MLP, all fresh ('random'), copies of it
      in a 'subset', copies with 'noise', or copies with some hidden units drawn anew ('drop').
    copied_experts: 'subset': how many are copies.
    noise_std: 'noise': of each leaf, relative to the standard deviation of its entries.
    reinit_fraction: 'drop': r, of the hidden units.
    scaling: 'upcycle' by copies whose weights do not sum to 1, or that are granular: 'none', or
      scale wo ('output') or the matrices alike ('all') so that the layer starts as the MLP did.
    tiling: 'depth_tile': repeat the whole 'stack' (A B A B) or each 'layer' (A A B B).
    new_head: leave the parent's head and start a fresh one, as for fine-tuning on another task.
  """
  mode: str = 'scratch'
  parent: str = ''
  step: int = TRUNK
  optimizer: str = 'carry'
  experts: str = 'copy'
  copied_experts: int = 0
  noise_std: float = 0.0
  reinit_fraction: float = 0.5
  scaling: str = 'none'
  tiling: str = 'stack'
  new_head: bool = False

  def __post_init__(self):
    check_choice('config.init.mode', self.mode, MODES)
    check_choice('config.init.optimizer', self.optimizer, ('carry', 'reset'))
    check(bool(self.parent) == (self.mode != 'scratch'), 'config.init.parent', self.parent,
          'empty for scratch, otherwise the workdir of a finished run',
          'Set --config.init.parent=DIR, or --config.init.mode.')
    check(self.step >= -2, 'config.init.step', self.step, 'a step, -1 (trunk) or -2 (end)',
          'The steps there are stand in its checkpoints folder.')
    check_choice('config.init.tiling', self.tiling, depth_tile.TILINGS)
    _expert_init(self)
    for key, modes in USED_BY.items():
      value, default = getattr(self, key), InitConfig.__dataclass_fields__[key].default
      check(self.mode in modes or value == default, f'config.init.{key}', value,
            f'{default!r} with mode={self.mode!r}', f'It is a setting of {" and ".join(modes)}.')

  @property
  def settings(self) -> dict:
    """Every setting, for the receipt; those that this mode does not use are left out."""
    return {key: value for key, value in dataclasses.asdict(self).items()
            if self.mode in USED_BY.get(key, MODES)}


@dataclasses.dataclass(frozen=True)
class Parent:
  """A checkpoint to start from: its reader, and config.json and run.json of the run it is of."""
  reader: orbax.Reader
  config: dict
  run: dict


def open_parent(config: InitConfig) -> Parent | None:
  """Opens the parent's checkpoint; None for scratch. Raises ConfigError if it is not there."""
  if config.mode == 'scratch':
    return None
  return open_run(config.parent, 'config.init.parent', config.step)


def open_run(path: str, key: str, step: int) -> Parent:
  """Opens a checkpoint of another run.

  Args:
    path: its workdir.
    key: what named it, for messages.
    step: which checkpoint, as InitConfig.step, which alone may be a number.

  Raises:
    ConfigError: there is no such run or checkpoint, or its files are damaged.
  """
  directory = pathlib.Path(path)
  its = renamed(files.read_json(directory / 'config.json', key))
  which = {TRUNK: 'trunk_step', END: 'end_step'}.get(step)
  run = files.read_json(directory / 'run.json', key, needs=(which,) if which else ())
  there = orbax.finished_steps(directory / orbax.SUBDIR)
  steps = ', '.join(map(str, there)) or '(none)'
  if which:
    step = run[which]
    check(step in there, key, path, f'a run that has come to its {which}, {step}',
          f'Its checkpoints are of steps {steps}: let it go on'
          + (', or set config.init.step to one of them.' if which == 'trunk_step' else '.'))
  check(step in there, 'config.init.step', step, f'{steps}: the checkpoints of {path}',
        f'Choose one of them, {TRUNK} (its trunk) or {END} (its end).')
  def remedy(older: list[int]) -> str:
    again = f'Start that run again after {orbax.set_away(step, older, "it")}.'
    return f'Set config.init.step={older[-1]}. Or: {again}' if older and free else again
  free = key == 'config.init.parent'   # to start from another step
  return Parent(orbax.Reader(directory, step, key, remedy), its, run)


def check_model(config: 'RunConfig', parent: Parent) -> None:
  """Checks that a run's model computes what its parent's did, sparse layers apart.

  Most of what these settings say (heads, activations) leaves no trace in the shapes of parameters,
  and surgery on them would take another function for the parent's.

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


def state_shapes(config: 'RunConfig', model, parallel) -> TrainState:
  """The state's shapes and shardings, with an empty window; nothing is computed."""
  make = functools.partial(_params_and_slots, model, config.optimizer)
  tree = jax.eval_shape(make, jax.random.key(0))
  tree = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
                      tree, parallel.shardings(tree))
  key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  small = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=parallel.replicated())
  return TrainState(small(jax.ShapeDtypeStruct((), jnp.int32)), tree['params'], tree['opt_state'],
                    small(key), {})


def first_state(config: 'RunConfig', model, parallel, parent: Parent | None
                ) -> tuple[TrainState, Receipt | None]:
  """The state before this run's first step, placed on its devices, with an empty window.

  Returns:
    The state and, if there is a parent, the receipt of every leaf.

  Raises:
    ConfigError: the parent's leaves do not fit; both sides are listed.
  """
  param_key, noise_key = jax.random.split(jax.random.key(config.seed))
  make = functools.partial(_params_and_slots, model, config.optimizer)
  if parent is None:
    tree, receipt, step = parallel.init(make, param_key), None, 0
  else:
    target = state_shapes(config, model, parallel)
    target = {'params': target.params, 'opt_state': target.opt_state}
    tree, receipt = _from_parent(config, target, parent, lambda paths: _some_params(
        model, param_key, paths, parallel))
    step = parent.reader.step
  put = lambda x: jax.device_put(x, parallel.replicated())
  state = TrainState(put(jnp.int32(step)), tree['params'], tree['opt_state'],
                     put(jax.random.key_data(noise_key)), {})
  return state, receipt


def first_params(config: 'RunConfig', model, parallel, parent: Parent) -> dict:
  """The parameters of `first_state` alone, for evaluating a surgery that nobody will train.

  No optimizer slot is read or made. Raises ConfigError as it does.
  """
  param_key, _ = jax.random.split(jax.random.key(config.seed))
  tree, _ = _from_parent(config, {'params': param_shapes(model, parallel)}, parent,
                         lambda paths: _some_params(model, param_key, paths, parallel))
  return tree['params']


def param_shapes(model, parallel) -> dict:
  """The parameters' shapes and shardings."""
  return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
                      model.shapes, parallel.shardings(model.shapes))


def _params_and_slots(model, config, key) -> dict:
  params = model.init(key)
  return {'params': params, 'opt_state': optimizer.init(config, params)}


def _some_params(model, key, paths, parallel) -> dict:
  """The leaves 'params/...' at `paths` of a fresh model, computing no others.

  Experts, which may be most of a model, come as the devices hold them; the rest as numpy arrays.
  """
  def pick(wanted):
    def init(key):
      params = trees.flatten({'params': model.init(key)})
      return trees.unflatten({p: params[p] for p in wanted})
    return init
  experts = {p for p in paths if '/experts/' in p}
  held = trees.flatten(parallel.init(pick(experts), key)) if experts else {}
  rest = jax.device_get(jax.jit(pick(paths - experts))(key))
  return {p: _OnDevices(leaf) for p, leaf in held.items()} | trees.flatten(rest)


@dataclasses.dataclass(frozen=True)
class _OnDevices:
  """An array of which each device's slice can be had, and no other."""
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


def _expert_init(config: InitConfig, run: 'RunConfig | None' = None) -> expert_init.ExpertInit:
  """The surgery's settings for new experts; without a run only to be checked. ConfigError."""
  own = {key: getattr(config, key) for key in ('experts', 'copied_experts', 'noise_std',
                                               'reinit_fraction', 'scaling')}
  if run is None:
    return expert_init.ExpertInit(**own)
  model = run.model
  gates = {name: gate for name, stack in model.stacks().items()
           if (gate := _gate(stack.moe, f'config.model.{stack.moe_key}.k'))}
  return expert_init.ExpertInit(**own, seed=run.seed, gates=gates,
                                squared=model.activation == 'squared_relu')


def _gate(moe, key: str = 'moe.k') -> expert_init.Gate | None:
  """What a token's weights sum to at step 0; None for routers that promise nothing. key: of k."""
  if moe.router == 'expert_choice':
    return expert_init.Gate(moe.capacity_factor, False, 'softmax', moe.renormalize)
  if moe.router == 'top_k':
    return expert_init.Gate(moe.k, True, moe.score, moe.renormalize, moe.weight_scale, key)
  return None


def _table(config: 'RunConfig', source: dict, shapes: dict) -> list[rules.Rule]:
  """The rules of the run's kind of surgery."""
  init = config.init
  if init.mode == 'depth_tile':
    return upcycle.depth_tile_rules(source, shapes, init.optimizer, init.tiling)
  if init.mode == 'continue':
    return upcycle.continue_rules(source, shapes, init.optimizer, new_head=init.new_head)
  return upcycle.upcycle_rules(source, shapes, init.optimizer, _expert_init(init, config),
                               new_head=init.new_head)


def check_surgery(config: 'RunConfig', state: TrainState, parent: Parent) -> None:
  """Checks by shapes alone what `first_state` would raise of a parent.

  state: shapes of the state, with single blocks.
  """
  _plan(config, {'params': state.params, 'opt_state': state.opt_state}, parent)


def _plan(config: 'RunConfig', target: dict, parent: Parent) -> rules.Plan:
  """The run's surgery on its parent."""
  source = {p: s for p, s in parent.reader.shapes.items() if p.split('/')[0] in target}
  shapes = trees.flatten(target)
  return rules.plan(_table(config, source, shapes), source, shapes)


def _from_parent(config: 'RunConfig', target: dict, parent: Parent, fresh_params):
  """Surgery, leaf by leaf, straight into the target's shardings."""
  plan = _plan(config, target, parent)
  shapes = plan.target_shapes
  fresh = fresh_params({path for path in plan.fresh if path.startswith('params/')})
  place = lambda path, make, shape, dtype: jax.make_array_from_callback(
      shape, shapes[path].sharding, make)
  flat, entries = rules.apply(
      plan, read=parent.reader.read,
      make_fresh=upcycle.fresh_values(shapes, fresh.__getitem__), place=place)
  tree = trees.map_with_path(lambda path, _: flat[path], target)
  about = config.init.settings | {'seed': config.seed, 'step': parent.reader.step}
  return tree, Receipt.of(entries, **about)


def parent_params(parent: Parent, model, parallel) -> dict:
  """The parent's own parameters, for comparing the two functions at step 0.

  model: of the parent's config. Raises ConfigError if its leaves are not the checkpoint's.
  """
  flat = trees.flatten({'params': param_shapes(model, parallel)})
  place = lambda path, make, shape, dtype: jax.make_array_from_callback(
      shape, flat[path].sharding, make)
  source = {p: s for p, s in parent.reader.shapes.items() if p.startswith('params/')}
  plan = rules.plan([rules.copy('.+')], source, flat)
  read, _ = rules.apply(plan, parent.reader.read, None, place)
  return trees.unflatten(read)['params']
