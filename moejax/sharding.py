"""The device mesh and who holds what on it.

Four axes, any of which may be 1. Examples are split over data x fsdp x expert; parameters over fsdp
(gathered where used), expert (stacked experts, tokens travel to them) and model (tensor parallel):

  data    replicas                      fsdp    replicas that also split parameters
  expert  experts live here             model   heads (whole ones) and hidden units live here

RULES is the one table that splits parameters; optimizer slots follow their parameter, and so do
activations: the compiler splits heads, hidden units and logits over `model` as the kernels that
make them, and adds up what a block puts out. What no row matches (routers, norms, biases, position
tables, patch embedding) is small and stays whole.
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
EXCHANGED = 'exchanged'   # what came by all-to-all goes by this name in models.stack's policies

# First match wins. Dimensions: E experts, D model, F hidden, H*K heads x head size, V vocabulary.
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
  """Devices along each mesh axis; at most one may be -1, which takes all devices left over."""
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  model: int = 1


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
  """Mesh of all devices, those of a process next to each other.

  Raises ConfigError when the axes do not multiply to their number.
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
  # Auto axes: the compiler places whatever a rule or a shard_map does not pin down.
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def ordered(devices) -> list:
  """Devices by process: their numbers run across a slice's hosts, rows of a batch do not."""
  return sorted(devices, key=lambda d: (d.process_index, d.id))


def host_of(mesh: Mesh, shards: int, process: int) -> tuple[int, int]:
  """(host, hosts): which of how many equal parts of a batch's rows a process's devices hold.

  Processes that hold the same rows, as where `model` spans them, have the same number.

  Args:
    mesh: of all processes.
    shards: parts that the rows are split into, over the leading axes of the mesh.
    process: its index.

  Raises:
    ConfigError: some process's rows are not such a part.
  """
  owner = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(shards, -1)
  held = {n: np.flatnonzero((owner == n).any(1)) for n in np.unique(owner)}
  size = len(held[process])
  whole = lambda rows: len(rows) == size and rows[0] % size == 0 and rows[-1] - rows[0] == size - 1
  config_lib.check(
      shards % size == 0 and all(map(whole, held.values())),
      'config.mesh', ' x '.join(f'{a}={s}' for a, s in mesh.shape.items()),
      'axes of which each process has whole parts', 'Make model a divisor, or a multiple, of the '
      f'{mesh.size // len(held)} devices of a process.')
  return int(held[process][0]) // size, shards // size


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """PartitionSpec of one parameter or optimizer slot, by its path 'a/b/c'.

  An axis that does not divide its dimension is left out (the dimension is then replicated), except
  `expert`, where it is an error: half an expert cannot be held. Stacked blocks are not split: each
  device holds its part of every block.
  """
  if stacking.is_stacked(path):
    return P(None, *spec(stacking.members(path)[0], shape[1:], mesh))
  for pattern, axes in RULES:
    if re.search(rf'{pattern}(/|$)', path):
      if len(shape) < len(axes):   # a factored or scalar slot: only E is known to be first
        axes = axes[:1] if len(shape) and axes and axes[0] == 'expert' else ()
      break
  else:
    return P()
  kept = []
  for size, axis in zip(shape, axes):
    if axis is not None and size % mesh.shape[axis]:
      config_lib.check(axis != 'expert', 'config.mesh.expert', mesh.shape['expert'],
                       f'a divisor of the {size} experts of {path}',
                       'Change config.mesh.expert or num_experts.')
      axis = None
    kept.append(axis if axis is None or mesh.shape[axis] > 1 else None)
  return P(*kept)


def shardings(tree, mesh: Mesh):
  """Tree of arrays or ShapeDtypeStructs -> tree of NamedShardings by RULES."""
  return trees.map_with_path(
      lambda path, leaf: NamedSharding(mesh, spec(path, tuple(leaf.shape), mesh)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over all group axes."""
  return NamedSharding(mesh, P(GROUP_AXES))


def axis_sizes() -> dict[str, int]:
  """Devices along each axis of the mesh set by `jax.set_mesh`; all 1 under pmap or without one."""
  shape = jax.sharding.get_abstract_mesh().shape
  return {axis: shape.get(axis, 1) for axis in AXES}


def by_example(x: jax.Array) -> jax.Array:
  """x (B, ...) with its examples on the devices of their routing groups, whole otherwise.

  Said of what embeddings and blocks put out. The compiler, left to itself, sends tokens to the
  parts of parameters and not parameters to the tokens: of an embedding, and under fsdp of whole
  dense models (T5-XL over 128 chips of v5p then sent 8 times the bytes).
  """
  shards = math.prod(size for axis, size in axis_sizes().items() if axis in GROUP_AXES)
  if shards == 1 or x.shape[0] % shards:
    return x
  return jax.lax.with_sharding_constraint(x, P(GROUP_AXES))


def whole_rows(table: jax.Array) -> jax.Array:
  """table (V, D) of an embedding, gathered over fsdp as other parameters are where they are used.

  Said because the compiler otherwise, where gradients are added up in a loop over microbatches,
  sends the gradients of all tokens to the parts of the table's gradient.
  """
  shape = axis_sizes()
  if shape['fsdp'] == 1:
    return table
  rows = 'model' if shape['model'] > 1 and not table.shape[0] % shape['model'] else None
  return jax.lax.with_sharding_constraint(table, P(rows))


def over_groups(fn: Callable) -> Callable:
  """Runs fn on each device's own routing groups, and its experts wherever they live.

  `fn(groups, weights, *, exchange, total) -> (per_group, sums)`: `groups` is a tree of arrays with
  a leading G, `weights` one with a leading E. fn computes on local groups; `exchange(apply)` is
  `apply` with buffers carried to and from the devices that hold the experts; `total` adds over all
  groups. Without a mesh, fn simply runs. Kept out of the compiler's hands because it would
  all-gather the operands of top_k and of the gathers over the whole batch.
  """
  def run(groups, weights):
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
  return run


def exchange(apply: Callable) -> Callable:
  """apply(weights, (E, N, D)) where each device holds E/n experts: all-to-all there and back."""
  def send(x, split, concat):
    x = jax.lax.all_to_all(x, 'expert', split_axis=split, concat_axis=concat, tiled=True)
    return checkpoint_name(x, EXCHANGED)

  def run(weights, x):
    x = apply(weights, send(x, 0, 1))                                              # (E/n, n*N, D)
    return send(x, 1, 0)
  return run
