"""Two ways to run the same pure step on many devices.

Both have `reduce`, which adds a tree over devices, and `gather`, which puts rows of all devices
together, for use inside what they compile; and (host, hosts), which of how many equal parts of a
batch this process loads. What they compile hands its results to every process whole; `everywhere`
makes of a step's state what a checkpoint takes.

'mesh': arrays are global, split over the axes of moejax.sharding; the compiler and the MoE layer's
shard_map place the communication. 'pmap': one program per device over its share of the batch, sums
added with psum; data-parallel only, state replicated.
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


def make(name: str, config: sharding.MeshConfig, devices=None):
  """MeshParallel or PmapParallel over `devices` (default: all). ConfigError on what cannot be."""
  check_choice('config.parallel', name, NAMES)
  if name == 'mesh':
    return MeshParallel(config, devices)
  for axis in ('fsdp', 'expert', 'model'):
    check(getattr(config, axis) == 1, f'config.mesh.{axis}', getattr(config, axis),
          "1 with parallel='pmap', which is data-parallel only", "Use parallel='mesh'.")
  devices = sharding.ordered(jax.devices() if devices is None else devices)
  check(config.data in (-1, len(devices)), 'config.mesh.data', config.data,
        f'-1 or the number of devices, {len(devices)}', 'Set it to -1.')
  return PmapParallel(devices)


class MeshParallel:
  """jit over a mesh."""

  def __init__(self, config: sharding.MeshConfig, devices=None):
    self.mesh = sharding.make_mesh(config, devices)
    self.shards = int(np.prod([self.mesh.shape[a] for a in sharding.GROUP_AXES]))
    self.host, self.hosts = sharding.host_of(self.mesh)
    self.reduce = self.gather = self.everywhere = lambda tree: tree

  def shardings(self, tree):
    """Shardings of a tree of parameters or optimizer slots (or shapes thereof)."""
    return sharding.shardings(tree, self.mesh)

  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, P())

  def put(self, batch: dict) -> dict:
    """This process's rows of a batch -> global arrays."""
    rows = sharding.batch_sharding(self.mesh)
    return {k: jax.make_array_from_process_local_data(rows, v, (len(v) * self.hosts, *v.shape[1:]))
            for k, v in batch.items()}

  def init(self, fn: Callable, *args):
    """fn(*args) -> tree of parameters, computed directly into their shardings."""
    with jax.set_mesh(self.mesh):
      out = self.shardings(jax.eval_shape(fn, *args))
      return jax.jit(fn, out_shardings=out)(*args)

  def compile(self, fn: Callable, state=None) -> Callable:
    """Compiles eval_step(params, batch), or train_step(state, batch) if `state`, arrays or shapes
    with shardings, is given: it is then donated and keeps its shardings."""
    return self._in_mesh(jax.jit(fn, out_shardings=self.replicated()) if state is None
                         else self._train(fn, state))

  def lower(self, fn: Callable, state, batch):
    """train_step(state, batch) lowered for the mesh, from shapes with shardings."""
    return self._in_mesh(self._train(fn, state).lower)(state, batch)

  def _train(self, fn: Callable, state):
    out = (jax.tree.map(lambda x: x.sharding, state), self.replicated())
    return jax.jit(fn, donate_argnums=0, out_shardings=out)

  def compile_rows(self, fn: Callable) -> Callable:
    """Compiles fn(params, batch) -> tree of arrays with the batch's rows, which stay in place."""
    return self._in_mesh(jax.jit(fn, out_shardings=sharding.batch_sharding(self.mesh)))

  def _in_mesh(self, jitted):
    def run(*args):
      with jax.set_mesh(self.mesh):
        return jitted(*args)
    return run


class PmapParallel:
  """pmap over all devices; every leaf of the state is replicated."""

  def __init__(self, devices):
    self.devices = list(devices)
    self.mesh = Mesh(np.asarray(self.devices), (PMAP_AXIS,))
    self.shards = len(self.devices)
    self.host, self.hosts = sharding.host_of(self.mesh)
    self.reduce = lambda tree: jax.lax.psum(tree, PMAP_AXIS)
    self.gather = lambda tree: jax.lax.all_gather(tree, PMAP_AXIS, tiled=True)

  def shardings(self, tree):
    """Shardings of a tree of parameters or optimizer slots: replicated."""
    return jax.tree.map(lambda _: self.replicated(), tree)

  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, P())

  def everywhere(self, tree):
    """A state that a step returned, of this process's devices -> the same of all, to be saved."""
    if self.hosts == 1:
      return tree
    return jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(
        x.shape, self.replicated(), [shard.data for shard in x.addressable_shards]), tree)

  def put(self, batch: dict) -> dict:
    """This process's rows of a batch -> (local devices, rows per device, ...)."""
    local = sum(d.process_index == jax.process_index() for d in self.devices)
    return {k: v.reshape(local, -1, *v.shape[1:]) for k, v in batch.items()}

  def init(self, fn: Callable, *args):
    """fn(*args) -> tree of parameters, on every device."""
    return jax.jit(fn, out_shardings=self.replicated())(*args)

  def compile(self, fn: Callable, state=None) -> Callable:
    """Compiles eval_step(params, batch), or train_step(state, batch) if `state` is given: it is
    then donated."""
    return jax.pmap(fn, axis_name=PMAP_AXIS, in_axes=(None, 0), out_axes=None,
                    devices=self.devices, donate_argnums=() if state is None else (0,))

  def compile_rows(self, fn: Callable) -> Callable:
    """Compiles fn(params, batch) -> tree of arrays with the batch's rows, which stay in place."""
    return jax.pmap(fn, axis_name=PMAP_AXIS, in_axes=(None, 0), devices=self.devices)


def all_rows(devices, batch: dict) -> dict:
  """One host's rows of a batch, numpy arrays -> those of all hosts, on every host."""
  if devices.hosts == 1:
    return batch
  found = multihost_utils.process_allgather({'host': np.int32(devices.host), **batch})
  _, first = np.unique(found.pop('host'), return_index=True)   # a process for each host, in order
  return {k: np.concatenate([v[n] for n in first]) for k, v in found.items()}
