"""How stacks are executed: unrolled, rematerialised or scanned. Results do not depend on it.

Dimensions: B batch, L length, D model.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from moejax import sharding
from moejax.config import check_choice
from moejax.moe import experts, routing
from moejax.trees import stacking

_policies = jax.checkpoint_policies
_named = _policies.save_only_these_names

# What the forward pass saves for the backward pass, which recomputes the rest. All save sort
# indices, so that no token is routed again.
REMAT = {
    'none': None,                                # everything
    'dots': _policies.save_from_both_policies(   # as 'sent', and outputs of matmuls with weights
        _policies.dots_with_no_batch_dims_saveable,
        _named(routing.SORT_INDICES, sharding.ALL_TO_ALL, experts.EXPERT_MATMULS)),
    'sent': _named(routing.SORT_INDICES, sharding.ALL_TO_ALL),   # as 'full', and all-to-all outputs
    'full': _named(routing.SORT_INDICES),        # inputs of blocks
}


@dataclasses.dataclass(frozen=True)
class Execution:
  """How stacks are executed; results do not depend on it.

  Attributes:
    scan: whether repeated blocks run under lax.scan, with stacked parameters (trees/stacking.py):
      the time to compile then no longer grows with depth.
    remat: key of REMAT: trades time for memory.
    attention: 'plain', or 'fused' into one kernel on GPU (see attention.fused): ViT only.
  """
  scan: bool = False
  remat: str = 'none'
  attention: str = 'plain'

  def __post_init__(self):
    check_choice('config.execution.remat', self.remat, REMAT)
    check_choice('config.execution.attention', self.attention, ('plain', 'fused'))


UNROLLED = Execution()


def run(blocks: dict[str, nnx.Module], x: jax.Array, keys: jax.Array | None, context,
        remat: str = 'none') -> tuple[jax.Array, dict[str, dict]]:
  """Runs blocks one after the other; stacked ones as a scan, as often as they repeat.

  Args:
    blocks: {name: Block}: the stacked blocks of one repeated pattern, named as trees/stacking.py
      does, such as '00+2x12' and '01+2x12'; or a single block, such as '05'.
    x: (B, L, D).
    keys: (blocks of the whole stack, blocks.NUM_KEYS, B), or None.
    context: blocks.Context.
    remat: key of REMAT.

  Returns:
    (B, L, D), and {'layers/01': aux of its MoE layer} for each sparse block.
  """
  graphs, params = zip(*(nnx.split(block, nnx.Param) for block in blocks.values()))
  params = [nnx.to_pure_dict(state) for state in params]
  members = [stacking.members(name) for name in blocks]   # for each block those it stands for
  stacked = any(map(stacking.is_stacked, blocks))

  def pattern(x, params, keys, context):
    auxes = []
    for graph, block_params, block_keys in zip(graphs, params, keys):
      x, aux, _ = nnx.merge(graph, block_params)(x, context, block_keys)
      x = sharding.by_example(x)
      auxes.append(aux)
    return x, auxes

  if remat != 'none':
    # prevent_cse stops the compiler from merging recomputation with the forward pass; in a scan the
    # two passes are loops of their own.
    pattern = jax.checkpoint(pattern, policy=REMAT[remat], prevent_cse=not stacked)
  numbers = [np.array(names, int) for names in members]
  if not stacked:
    block_keys = [None if keys is None else keys[n] for n, in numbers]
    x, auxes = pattern(x, params, block_keys, context)
    return x, {f'layers/{name}': aux for name, aux in zip(blocks, auxes) if aux is not None}
  block_keys = [None if keys is None else keys[n] for n in numbers]
  x, auxes = jax.lax.scan(lambda x, of: pattern(x, *of, context), x, (params, block_keys))
  return x, {f'layers/{member}': jax.tree.map(lambda sums, i=i: sums[i], aux)
             for names, aux in zip(members, auxes) if aux is not None
             for i, member in enumerate(names)}
