"""The device mesh, and how examples, parameters and routing groups are split over it.

Four axes, any of which may be 1. Examples are split over data x fsdp x expert; parameters over fsdp
(gathered where used), expert (stacked experts, tokens travel to them) and model (tensor parallel):

  data    replicas                      fsdp    replicas that also split parameters
  expert  splits stacked experts        model   splits heads (whole ones) and hidden units

RULES is the one table that splits parameters. Optimizer state is split as its parameter, and the
compiler splits heads, hidden units and logits over `model` as the kernels that make them, and sums
the outputs of blocks. Parameters that no rule matches (routers, norms, biases, position tables,
patch embedding) are small, and whole on every device.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import config as config_lib
from moejax import trees
from moejax.trees import stacking

AXES = ('data', 'fsdp', 'expert', 'model')
GROUP_AXES = ('data', 'fsdp', 'expert')   # examples, hence routing groups, are split over these
ALL_TO_ALL = 'all_to_all'   # name of its outputs in the policies of models/scan.py

# First match wins. Dimensions: E experts, D model, F hidden, H*K heads times head width (as in
# models/), V vocabulary.
RULES = (
    (r'experts/(wi|wi_gate|wi_up)', P('expert', 'fsdp', 'model')),      # (E, D, F)
    (r'experts/wo', P('expert', 'model', 'fsdp')),                      # (E, F, D)
    (r'experts/wi_bias', P('expert', 'model')),                         # (E, F)
    (r'experts/wo_bias', P('expert')),                                  # (E, D)
    (r'(mlp|shared)/(wi|wi_gate|wi_up)', P('fsdp', 'model')),           # (D, F)
    (r'(mlp|shared)/wo', P('model', 'fsdp')),                           # (F, D)
    (r'attention/(q|k|v)/kernel', P('fsdp', 'model')),                  # (D, H*K)
    (r'attention/o/kernel', P('model', 'fsdp')),                        # (H*K, D)
    (r'token_embed/embedding', P('model', 'fsdp')),                     # (V, D)
    (r'head/kernel', P('fsdp', 'model')),                               # (D, V)
)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; at most one may be -1, for all devices that the others leave."""
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  model: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Mesh of all devices, or of the given ones; the devices of a process are adjacent.

  Raises:
    ConfigError: the axes do not multiply to the number of devices.
  """
  devices = ordered(jax.devices() if devices is None else devices)
  sizes = [getattr(config, axis) for axis in AXES]
  given = ' x '.join(f'{a}={s}' for a, s in zip(AXES, sizes))
  free = sizes.count(-1)
  fixed = math.prod(s for s in sizes if s != -1)
  if (free > 1 or any(s < 1 for s in sizes if s != -1) or len(devices) % fixed
      or (not free and fixed != len(devices))):
    config_lib.fail('config.mesh', given, f'axes that multiply to the {len(devices)} devices',
                    'Set one axis to -1 to let it take what the others leave.')
  sizes = [len(devices) // fixed if s == -1 else s for s in sizes]
  # Auto axes: the compiler decides wherever no rule and no shard_map does.
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def ordered(devices) -> list:
  """Devices sorted by process, as a batch is split; ids alone may alternate between hosts."""
  return sorted(devices, key=lambda d: (d.process_index, d.id))


def host_of(mesh: Mesh, shards: int, process: int) -> tuple[int, int]:
  """(host, hosts): which of how many equal parts of a batch the devices of a process hold.

  Processes that hold the same examples, as where `model` spans them, have the same number.

  Args:
    mesh: of all processes.
    shards: number of parts that a batch is split into, over the leading axes of the mesh.
    process: index of the process.

  Raises:
    ConfigError: the shards of some process are not such a part.
  """
  process_of = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(shards, -1)
  shards_of = {n: np.flatnonzero((process_of == n).any(1)) for n in np.unique(process_of)}
  size = len(shards_of[process])
  whole = lambda own: len(own) == size and own[0] % size == 0 and own[-1] - own[0] == size - 1
  config_lib.check(
      shards % size == 0 and all(map(whole, shards_of.values())),
      'config.mesh', ' x '.join(f'{a}={s}' for a, s in mesh.shape.items()),
      'axes of which each process has whole parts', 'Make model a divisor, or a multiple, of the '
      f'{mesh.size // len(shards_of)} devices of a process.')
  return int(shards_of[process][0]) // size, shards // size


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """PartitionSpec of one leaf of parameters or optimizer state, by its path 'a/b/c'.

  An axis that does not divide its dimension is left out (the dimension is then replicated), except
  `expert`, where it is an error: an expert is not divided. The axis of stacked blocks is not split:
  each device holds its part of every block.
  """
  if stacking.is_stacked(path):
    return P(None, *spec(stacking.members(path)[0], shape[1:], mesh))
  for pattern, axes in RULES:
    if re.search(rf'{pattern}(/|$)', path):
      if len(shape) < len(axes):   # factored or scalar optimizer state: only E is known to be first
        axes = axes[:1] if len(shape) and axes and axes[0] == 'expert' else ()
      break
  else:
    return P()
  used = []
  for size, axis in zip(shape, axes):
    if axis is not None and size % mesh.shape[axis]:
      config_lib.check(axis != 'expert', 'config.mesh.expert', mesh.shape['expert'],
                       f'a divisor of the {size} experts of {path}',
                       'Change config.mesh.expert or num_experts.')
      axis = None
    used.append(axis if axis is None or mesh.shape[axis] > 1 else None)
  return P(*used)


def shardings(tree, mesh: Mesh):
  """Tree of arrays or ShapeDtypeStructs -> tree of NamedShardings by RULES."""
  return trees.map_with_path(
      lambda path, leaf: NamedSharding(mesh, spec(path, tuple(leaf.shape), mesh)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples of a batch over all group axes."""
  return NamedSharding(mesh, P(GROUP_AXES))


def axis_sizes() -> dict[str, int]:
  """Devices along each axis of the mesh set by `jax.set_mesh`; all 1 under pmap or without one."""
  shape = jax.sharding.get_abstract_mesh().shape
  return {axis: shape.get(axis, 1) for axis in AXES}


def by_example(x: jax.Array) -> jax.Array:
  """x (B, ...) with examples on the devices of their routing groups, other axes whole.

  Applied to the outputs of embeddings and blocks. Without it the compiler moves tokens to shards of
  parameters rather than parameters to tokens: for an embedding, and under fsdp for whole dense
  models (T5-XL over 128 chips of v5p sent 8 times the bytes).
  """
  shards = math.prod(size for axis, size in axis_sizes().items() if axis in GROUP_AXES)
  if shards == 1 or x.shape[0] % shards:
    return x
  return jax.lax.with_sharding_constraint(x, P(GROUP_AXES))


def gathered_table(table: jax.Array) -> jax.Array:
  """table (V, D) of an embedding, gathered over fsdp as other parameters are where they are used.

  Without it, where a loop over microbatches sums gradients, the compiler sends the gradients of all
  tokens to the shards of the table's gradient.
  """
  shape = axis_sizes()
  if shape['fsdp'] == 1:
    return table
  split = shape['model'] > 1 and table.shape[0] % shape['model'] == 0
  return jax.lax.with_sharding_constraint(table, P('model' if split else None))


def over_groups(fn: Callable) -> Callable:
  """fn, run on each device with its own routing groups.

  `fn(groups, weights, *, exchange, total) -> (per_group, sums)`: `groups` is a tree of arrays with
  a leading G, `weights` one with a leading E. fn gets the groups and experts of one device;
  `exchange(apply)` is `apply` with buffers carried to the devices that hold the experts and back
  (None where every device holds all experts); `total` sums over all groups. Without a mesh fn runs
  as it is.

  The compiler is not left to split this: it would all-gather the operands of top_k and of gathers
  over the whole batch.
  """
  def on_all_devices(groups, weights):
    shape = axis_sizes()
    shards = math.prod(shape[a] for a in GROUP_AXES)
    if shards == 1:
      return fn(groups, weights, exchange=None, total=lambda x: x)
    G = jax.tree.leaves(groups)[0].shape[0]
    config_lib.check(G % shards == 0, 'routing groups per step', G,
                     f'a multiple of data*fsdp*expert = {shards}',
                     'Make batch_size larger or group_size smaller.')
    local = lambda g, w: fn(g, w, exchange=exchange if shape['expert'] > 1 else None,
                            total=lambda x: jax.lax.psum(x, GROUP_AXES))
    return jax.shard_map(
        local, in_specs=(P(GROUP_AXES), P('expert')), out_specs=(P(GROUP_AXES), P()),
        axis_names=set(GROUP_AXES))(groups, weights)
  return on_all_devices


def exchange(apply: Callable) -> Callable:
  """apply(weights, (E, N, D)) where each of n devices holds E/n experts: all-to-all, and back."""
  def send(x, split, concat):
    x = jax.lax.all_to_all(x, 'expert', split_axis=split, concat_axis=concat, tiled=True)
    return checkpoint_name(x, ALL_TO_ALL)

  def apply_elsewhere(weights, x):
    x = apply(weights, send(x, 0, 1))                                              # (E/n, n*N, D)
    return send(x, 1, 0)
  return apply_elsewhere
