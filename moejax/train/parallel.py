"""Runs one pure step on many devices, in one of two ways: 'mesh' or 'pmap'.

'mesh': arrays are split over the four axes of moejax.sharding; the compiler and the MoE layer's
shard_map place the communication.
'pmap': data-parallel only. Every device holds the whole state, runs the step on its share of the
batch, and adds sums with psum. It is jit of shard_map, as jax.pmap is since JAX 0.10. But jax.pmap
takes the arrays of one process, so it cannot be compiled from shapes where there are several.

Both take a batch as global arrays whose examples are split over the devices.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import sharding
from moejax.config import check, check_choice

NAMES = ('mesh', 'pmap')
PMAP_AXIS = 'batch'


def make(name: str, config: sharding.MeshConfig, devices=None) -> 'MeshParallel':
  """Returns MeshParallel or PmapParallel over `devices` (default: all).

  Raises:
    ConfigError: axes that do not multiply to the devices, or that pmap does not have.
  """
  check_choice('config.parallel', name, NAMES)
  if name == 'mesh':
    return MeshParallel(sharding.make_mesh(config, devices), sharding.GROUP_AXES)
  for axis in ('fsdp', 'expert', 'model'):
    check(getattr(config, axis) == 1, f'config.mesh.{axis}', getattr(config, axis),
          "1 with parallel='pmap', which is data-parallel only", "Use parallel='mesh'.")
  devices = sharding.ordered(jax.devices() if devices is None else devices)
  check(config.data in (-1, len(devices)), 'config.mesh.data', config.data,
        f'-1 or the number of devices, {len(devices)}', 'Set it to -1.')
  return PmapParallel(Mesh(np.asarray(devices), (PMAP_AXIS,)), (PMAP_AXIS,))


class Jitted:
  """A jitted function that runs, or is lowered from shapes with shardings, in its mesh."""

  def __init__(self, jitted, mesh: Mesh):
    self._jitted, self._mesh = jitted, mesh

  def __call__(self, *args):
    with jax.set_mesh(self._mesh):
      return self._jitted(*args)

  def lower(self, *args) -> jax.stages.Lowered:
    with jax.set_mesh(self._mesh):
      return self._jitted.lower(*args)


class MeshParallel:
  """jit over a mesh.

  Attributes:
    mesh: all devices.
    shards: parts that the examples of a batch are split into.
    host, hosts: which of how many equal parts of a batch this process loads.
    reduce: adds a tree over devices, inside a jitted function; the identity where arrays are
      global.
    gather: collects the examples of all devices on each, inside a jitted function; the identity
      where arrays are global.
  """

  def __init__(self, mesh: Mesh, axes: tuple[str, ...]):
    """axes: those that examples are split over."""
    self.mesh, self._examples = mesh, NamedSharding(mesh, P(axes))
    self.shards = int(np.prod([mesh.shape[axis] for axis in axes]))
    self.host, self.hosts = sharding.host_of(mesh, self.shards, jax.process_index())
    self.reduce = self.gather = lambda tree: tree

  def shardings(self, tree):
    """Shardings of a tree of parameters or optimizer state (or of their shapes)."""
    return sharding.shardings(tree, self.mesh)

  def with_shardings(self, tree):
    """Shapes of such a tree -> the same shapes with shardings."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype,
                                                                 sharding=sharding),
                        tree, self.shardings(tree))

  def replicated(self) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(self.mesh, P())

  def put(self, batch: dict) -> dict:
    """This process's examples of a batch -> global arrays."""
    return {k: jax.make_array_from_process_local_data(
        self._examples, v, (len(v) * self.hosts, *v.shape[1:])) for k, v in batch.items()}

  def placed(self, batch: dict) -> dict:
    """Shapes of a global batch -> those of what `put` returns."""
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self._examples)
            for k, v in batch.items()}

  def init(self, fn: Callable, *args):
    """fn(*args) -> tree of parameters, computed directly into their shardings."""
    with jax.set_mesh(self.mesh):
      out = self.shardings(jax.eval_shape(fn, *args))
      return jax.jit(fn, out_shardings=out)(*args)

  def jit(self, fn: Callable) -> Jitted:
    """fn(params, batch) -> tree; every process gets the results whole."""
    return Jitted(jax.jit(self._spmd(fn, P()), out_shardings=self.replicated()), self.mesh)

  def jit_by_example(self, fn: Callable) -> Jitted:
    """fn(params, batch) -> arrays with a leading axis of examples, which stay on their devices."""
    return Jitted(jax.jit(self._spmd(fn, self._examples.spec), out_shardings=self._examples),
                  self.mesh)

  def jit_step(self, fn: Callable, state) -> Jitted:
    """fn(state, batch) -> (state, scalar); the state is donated and keeps its shardings.

    state: arrays, or shapes with shardings.
    """
    out = jax.tree.map(lambda x: x.sharding, state), self.replicated()
    return Jitted(jax.jit(self._spmd(fn, P()), donate_argnums=0, out_shardings=out), self.mesh)

  def _spmd(self, fn: Callable, out: P) -> Callable:
    """fn of global arrays. out: how its results are split."""
    del out
    return fn


class PmapParallel(MeshParallel):
  """One program per device, over a mesh of one axis."""

  def __init__(self, mesh: Mesh, axes: tuple[str, ...]):
    super().__init__(mesh, axes)
    self.reduce = lambda tree: jax.lax.psum(tree, axes)
    self.gather = lambda tree: jax.lax.all_gather(tree, axes, tiled=True)

  def shardings(self, tree):
    """Replicated."""
    return jax.tree.map(lambda _: self.replicated(), tree)

  def _spmd(self, fn: Callable, out: P) -> Callable:
    return jax.shard_map(fn, mesh=self.mesh, in_specs=(P(), self._examples.spec), out_specs=out,
                         check_vma=False)


def all_examples(devices: MeshParallel, batch: dict) -> dict:
  """One host's examples of a batch, numpy arrays -> those of all hosts, on every host."""
  if devices.hosts == 1:
    return batch
  by_process = multihost_utils.process_allgather({'host': np.int32(devices.host), **batch})
  _, first = np.unique(by_process.pop('host'), return_index=True)   # a process for each host
  return {k: np.concatenate([v[n] for n in first]) for k, v in by_process.items()}
