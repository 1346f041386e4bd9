"""Two ways to run the same pure step on many devices.

Both have `reduce`, which adds a tree over devices, and `gather`, which puts rows of all devices
together, for use inside what they compile; and (host, hosts), which of how many equal parts of a
batch this process loads; and `ahead`, whether a step can be compiled before its arguments are
there, by `lower`, `lower_eval` and `lower_rows`, or only at its first call, by `compile_step`,
`compile` and `compile_rows`.
What they compile hands its results to every process whole; `everywhere` makes of a step's state
what a checkpoint takes.

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
    self.host, self.hosts = sharding.host_of(self.mesh, self.shards, jax.process_index())
    self.reduce = self.gather = self.everywhere = lambda tree: tree
    self.ahead = True

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

  def placed(self, batch: dict) -> dict:
    """Shapes of a global batch, of all processes -> those of what `put` makes of it."""
    rows = sharding.batch_sharding(self.mesh)
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=rows) for k, v in batch.items()}

  def compile(self, fn: Callable) -> Callable:
    """Compiles eval_step(params, batch), at its first call."""
    return self._in_mesh(self._whole(fn))

  def lower_eval(self, fn: Callable, params, batch) -> jax.stages.Lowered:
    """The same, to be compiled for arrays, or shapes with shardings."""
    return self._in_mesh(self._whole(fn).lower)(params, batch)

  def _whole(self, fn: Callable):
    return jax.jit(fn, out_shardings=self.replicated())

  def lower(self, fn: Callable, state, batch) -> jax.stages.Lowered:
    """train_step(state, batch), to be compiled. The state is donated and keeps its shardings.

    Args:
      state, batch: arrays, or shapes with shardings (see `placed`).
    """
    out = (jax.tree.map(lambda x: x.sharding, state), self.replicated())
    return self._in_mesh(jax.jit(fn, donate_argnums=0, out_shardings=out).lower)(state, batch)

  def compile_rows(self, fn: Callable) -> Callable:
    """Compiles fn(params, batch) -> tree of arrays with the batch's rows, which stay in place."""
    return self._in_mesh(self._of_rows(fn))

  def lower_rows(self, fn: Callable, params, batch) -> jax.stages.Lowered:
    """The same, to be compiled for arrays, or shapes with shardings."""
    return self._in_mesh(self._of_rows(fn).lower)(params, batch)

  def _of_rows(self, fn: Callable):
    return jax.jit(fn, out_shardings=sharding.batch_sharding(self.mesh))

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
    self.host, self.hosts = sharding.host_of(self.mesh, self.shards, jax.process_index())
    self.ahead = self.hosts == 1   # pmap over several processes does not lower from shapes
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
    return {k: v.reshape(self._local, -1, *v.shape[1:]) for k, v in batch.items()}

  def placed(self, batch: dict) -> dict:
    """Shapes of a global batch, of all processes -> those of what `put` makes of it."""
    return {k: jax.ShapeDtypeStruct((self._local, v.shape[0] // self.shards, *v.shape[1:]), v.dtype)
            for k, v in batch.items()}

  @property
  def _local(self) -> int:
    """Devices of this process."""
    return sum(d.process_index == jax.process_index() for d in self.devices)

  def init(self, fn: Callable, *args):
    """fn(*args) -> tree of parameters, on every device."""
    return jax.jit(fn, out_shardings=self.replicated())(*args)

  def compile(self, fn: Callable) -> Callable:
    """Compiles eval_step(params, batch), at its first call."""
    return self._pmap(fn)

  def lower_eval(self, fn: Callable, params, batch) -> jax.stages.Lowered:
    """The same, to be compiled for arrays, or shapes."""
    return self._pmap(fn).lower(params, batch)

  def lower(self, fn: Callable, state, batch) -> jax.stages.Lowered:
    """train_step(state, batch), to be compiled. The state is donated.

    Args:
      state, batch: arrays, or shapes (see `placed`).
    """
    return self.compile_step(fn).lower(state, batch)

  def compile_step(self, fn: Callable) -> Callable:
    """Compiles train_step(state, batch) at its first call. The state is donated."""
    return self._pmap(fn, donate_argnums=0)

  def _pmap(self, fn: Callable, **settings):
    return jax.pmap(fn, axis_name=PMAP_AXIS, in_axes=(None, 0), out_axes=None,
                    devices=self.devices, **settings)

  def compile_rows(self, fn: Callable) -> Callable:
    """Compiles fn(params, batch) -> tree of arrays with the batch's rows, which stay in place."""
    return jax.pmap(fn, axis_name=PMAP_AXIS, in_axes=(None, 0), devices=self.devices)

  def lower_rows(self, fn: Callable, params, batch) -> jax.stages.Lowered:
    """The same, to be compiled for arrays, or shapes."""
    return self.compile_rows(fn).lower(params, batch)


def all_rows(devices, batch: dict) -> dict:
  """One host's rows of a batch, numpy arrays -> those of all hosts, on every host."""
  if devices.hosts == 1:
    return batch
  found = multihost_utils.process_allgather({'host': np.int32(devices.host), **batch})
  _, first = np.unique(found.pop('host'), return_index=True)   # a process for each host, in order
  return {k: np.concatenate([v[n] for n in first]) for k, v in found.items()}
