"""Where a run's first state comes from: fresh parameters, a parent's, or surgery on a parent's.

The one place where checkpoints, surgery and models meet. A parent is the workdir of another run of
moejax; by default its trunk is taken, the last step before its cooldown.
"""

import dataclasses
import functools
import json
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from moejax import trees
from moejax.checkpoints import native
from moejax.config import check, check_choice, fail
from moejax.surgery import rules, upcycle
from moejax.surgery.receipt import Receipt
from moejax.train import optimizer
from moejax.train.step import TrainState

if TYPE_CHECKING:
  from moejax.train.settings import RunConfig

MODES = ('scratch', 'continue', 'upcycle')


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Start of a run.

  Attributes:
    mode: 'scratch'; 'continue' a parent of the same model; 'upcycle' a dense (or less sparse) one.
    parent: workdir of the parent run.
    step: which of its checkpoints; -1 is its trunk, the last step before its cooldown.
    optimizer: 'carry' the parent's optimizer slots (tiled over experts) or 'reset' them to zero.
  """
  mode: str = 'scratch'
  parent: str = ''
  step: int = -1
  optimizer: str = 'carry'

  def __post_init__(self):
    check_choice('config.init.mode', self.mode, MODES)
    check_choice('config.init.optimizer', self.optimizer, ('carry', 'reset'))
    check(bool(self.parent) == (self.mode != 'scratch'), 'config.init.parent', self.parent,
          'the workdir of a finished run for continue and upcycle, empty for scratch',
          'Set --config.init.parent=DIR, or --config.init.mode.')


@dataclasses.dataclass(frozen=True)
class Parent:
  """A checkpoint to start from: its reader, and config.json and run.json of the run it is of."""
  reader: native.Reader
  config: dict
  run: dict


def open_parent(config: InitConfig) -> Parent | None:
  """Opens the parent's checkpoint; None for scratch. Raises ConfigError if it is not there."""
  if config.mode == 'scratch':
    return None
  directory = pathlib.Path(config.parent)
  facts = {}
  for name in ('config.json', 'run.json'):
    path = directory / name
    if not path.exists():
      fail('config.init.parent', config.parent, f'the workdir of a run ({name} in it)',
           'Train the parent first, or correct the path.')
    facts[name] = json.loads(path.read_text())
  step = facts['run.json']['trunk_step'] if config.step < 0 else config.step
  return Parent(native.Reader(directory, step), facts['config.json'], facts['run.json'])


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
    tree, receipt = _from_parent(config.init, target, parent, lambda paths: _some_params(
        model, param_key, paths))
    step = parent.reader.step
  put = lambda x: jax.device_put(x, parallel.replicated())
  state = TrainState(put(jnp.int32(step)), tree['params'], tree['opt_state'],
                     put(jax.random.key_data(noise_key)), {})
  return state, receipt


def _params_and_slots(model, config, key) -> dict:
  params = model.init(key)
  return {'params': params, 'opt_state': optimizer.init(config, params)}


def _some_params(model, key, paths) -> dict:
  """The leaves 'params/...' at `paths` of a fresh model, computing no others."""
  pick = lambda key: {p: leaf for p, leaf in trees.flatten({'params': model.init(key)}).items()
                      if p in paths}
  return jax.device_get(jax.jit(pick)(key))


def _from_parent(config: InitConfig, target: dict, parent: Parent, fresh_params):
  """Surgery, leaf by leaf, straight into the target's shardings."""
  source = {p: s for p, s in parent.reader.shapes.items()
            if p.startswith(('params/', 'opt_state/'))}
  shapes = trees.flatten(target)
  make_rules = upcycle.upcycle_rules if config.mode == 'upcycle' else upcycle.continue_rules
  table = make_rules(source, shapes, optimizer=config.optimizer)
  fresh = fresh_params({s.target for s in rules.plan(table, source, shapes)
                        if s.rule.kind == 'fresh' and s.target.startswith('params/')})
  place = lambda path, make, shape, dtype: jax.make_array_from_callback(
      shape, shapes[path].sharding, make)
  flat, entries = rules.apply(
      table, source, shapes, read=parent.reader.read,
      make_fresh=upcycle.fresh_values(shapes, fresh.__getitem__), place=place)
  tree = trees.map_with_path(lambda path, _: flat[path], target)
  return tree, Receipt.of(entries, mode=config.mode, parent=config.parent,
                          step=parent.reader.step, optimizer=config.optimizer)


def parent_params(parent: Parent, model, parallel) -> dict:
  """The parent's own parameters, for comparing the two functions at step 0.

  model: of the parent's config. Raises ConfigError if its leaves are not the checkpoint's.
  """
  shapes = model.shapes
  flat = trees.flatten({'params': jax.tree.map(
      lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
      shapes, parallel.shardings(shapes))})
  place = lambda path, make, shape, dtype: jax.make_array_from_callback(
      shape, flat[path].sharding, make)
  source = {p: s for p, s in parent.reader.shapes.items() if p.startswith('params/')}
  read, _ = rules.apply([rules.copy('.+')], source, flat, parent.reader.read, None, place)
  return trees.unflatten(read)['params']
