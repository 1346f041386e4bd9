"""Transformer blocks, dense or sparse, and stacks of them: the trunk of T5's two halves and of ViT.

Dimensions: B batch, L length (queries), M length (keys), D model, H heads, K head
width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import sharding
from moejax.config import check_choice
from moejax.models import attention, layers
from moejax.moe import routing
from moejax.moe.layer import MoEConfig, MoELayer
from moejax.trees import stacking

PLACES = 6  # where a block draws: inside and after attention, cross-attention and MLP

_policies = jax.checkpoint_policies
_named = _policies.save_only_these_names

# What the backward pass finds instead of computing it again; 'none' keeps everything.
REMAT = {
    'none': None,
    'dots': _policies.save_from_both_policies(   # outputs of matmuls with weights, and as 'sent'
        _policies.dots_with_no_batch_dims_saveable,
        _named(routing.KEPT, sharding.EXCHANGED, layers.EXPERT_MATMUL)),
    'sent': _named(routing.KEPT, sharding.EXCHANGED),   # as 'full', and what came by all-to-all
    'full': _named(routing.KEPT),                # inputs of blocks, and who goes where
}


@dataclasses.dataclass(frozen=True)
class Execution:
  """How stacks run, which changes no result.

  Attributes:
    scan: repeated blocks run under lax.scan, with stacked parameters (see trees/stacking.py): the
      time to compile no longer grows with depth.
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


@dataclasses.dataclass(frozen=True)
class StackInfo:
  """A stack of blocks, as code outside of models/ sees it, whatever the family of the model.

  Attributes:
    moe_key, depth_key: names of the model config's fields that hold `moe` and `depth`.
    moe: settings of the sparse blocks.
    depth: number of blocks.
    sparse: {block number: number of experts}.
    tokens: of an example in this stack, padding included; 0: unknown without lengths.
    source_tokens: of an example that blocks cross-attend to; 0: no cross-attention.
    inner: H*K, heads times head width.
    mlp_matrices: 3 if the MLP is gated (two in, one out), else 2.
    biased: attention logits have a bias and a mask.
  """
  moe_key: str
  depth_key: str
  moe: MoEConfig
  depth: int
  sparse: dict[int, int]
  tokens: int
  source_tokens: int
  inner: int
  mlp_matrices: int
  biased: bool


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """What a block is made of; the same for every block of a stack.

  Attributes:
    d_model, d_ff, num_heads, head_dim: sizes.
    norm: layers.RMSNorm or layers.LayerNorm, with norm_eps.
    bias: biases in attention and MLP.
    gated, activation: form of the MLP.
    scaled: attention logits divided by sqrt(head_dim).
    init, q_init: initialisers of all kernels, and of the queries'.
    dropout_rate: of sublayer outputs and MLP hidden activations.
    attention_dropout_rate: of attention probabilities.
    cross_attention: whether blocks attend to a second sequence.
    fused_attention: attention in one kernel.
  """
  d_model: int
  d_ff: int
  num_heads: int
  head_dim: int
  norm: type
  norm_eps: float
  bias: bool
  gated: bool
  activation: str
  scaled: bool
  init: layers.Initializer
  q_init: layers.Initializer
  dropout_rate: float
  attention_dropout_rate: float
  cross_attention: bool = False
  fused_attention: bool = False

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.norm(self.d_model, eps=self.norm_eps, rngs=rngs)

  def make_attention(self, rngs: nnx.Rngs) -> attention.Attention:
    return attention.Attention(
        self.d_model, self.num_heads, self.head_dim, bias=self.bias, scaled=self.scaled,
        init=self.init, q_init=self.q_init, dropout_rate=self.attention_dropout_rate,
        fused=self.fused_attention, rngs=rngs)

  def make_mlp(self, rngs: nnx.Rngs, *, d_ff: int | None = None, num_experts: int | None = None,
               dropout_rate: float | None = None) -> layers.MLP:
    return layers.MLP(
        self.d_model, self.d_ff if d_ff is None else d_ff, gated=self.gated,
        activation=self.activation, bias=self.bias, init=self.init, num_experts=num_experts,
        dropout_rate=self.dropout_rate if dropout_rate is None else dropout_rate, rngs=rngs)


class Block(nnx.Module):
  """Pre-norm transformer block: attention, cross-attention if any, then MLP or MoE."""

  def __init__(self, spec: BlockSpec, moe: MoEConfig, num_experts: int, *, rngs: nnx.Rngs):
    self.attention_norm = spec.make_norm(rngs)
    self.attention = spec.make_attention(rngs)
    self.cross = spec.cross_attention
    if self.cross:
      self.cross_attention_norm = spec.make_norm(rngs)
      self.cross_attention = spec.make_attention(rngs)
    self.mlp_norm = spec.make_norm(rngs)
    self.sparse = num_experts > 0
    if self.sparse:
      self.moe = _make_moe(spec, moe, num_experts, rngs)
    else:
      self.mlp = spec.make_mlp(rngs)
    self.dropout_rate = spec.dropout_rate

  def __call__(self, x, *, bias, mask, source, source_mask, token_mask, train, keys,
               cache=None, position=None):
    """x (B, L, D) -> (x (B, L, D), aux of the MoE layer, or None, new cache).

    Args:
      keys: (PLACES, B), or None.
      source: what to cross-attend to: a sequence (B, M, D), or its keys and values (B, M, H, K);
        None without cross-attention.
      cache: keys and values (B, Lmax, H, K) of earlier tokens, among which those of x are written
        at `position`; None: x is all there is.
      (The others are Stack's.)

    The new cache is what x attended to: keys and values of the whole sequence.
    """
    inside, after, cross_inside, cross_after, mlp_inside, mlp_after = (
        [None] * PLACES if keys is None else keys)
    add = lambda x, y, keys: x + layers.dropout(y, self.dropout_rate, keys)
    with jax.named_scope('attention'):
      h = self.attention_norm(x)
      kept = self.attention.project(h)
      if cache is not None:
        kept = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=1)
                     for old, new in zip(cache, kept))
      x = add(x, self.attention(h, kept, bias, mask, inside), after)
    if self.cross:
      with jax.named_scope('cross_attention'):
        h = self.cross_attention_norm(x)
        if not isinstance(source, tuple):
          source = self.cross_attention.project(source)
        x = add(x, self.cross_attention(h, source, None, source_mask, cross_inside), cross_after)
    aux = None
    with jax.named_scope('moe' if self.sparse else 'mlp'):
      h = self.mlp_norm(x)
      if self.sparse:
        h, aux = self.moe(h, token_mask, train=train, keys=mlp_inside, no_drop=cache is not None)
      else:
        h = self.mlp(h, mlp_inside)
      return add(x, h, mlp_after), aux, kept


def _make_moe(spec: BlockSpec, moe: MoEConfig, num_experts: int, rngs: nnx.Rngs) -> MoELayer:
  """The MoE layer that stands in for a block's MLP."""
  d_ff = moe.expert_d_ff(spec.d_ff)
  rate = moe.dropout_rate if moe.dropout_rate >= 0 else None
  experts = spec.make_mlp(rngs, d_ff=d_ff, num_experts=num_experts, dropout_rate=rate)
  shared = None
  if moe.shared_experts:
    shared = spec.make_mlp(rngs, d_ff=moe.shared_experts * d_ff, dropout_rate=rate)
  return MoELayer(moe, num_experts, experts, shared, spec.d_model, rngs=rngs)


class Stack(nnx.Module):
  """Blocks 'layers/00', 'layers/01', ... and a final norm.

  Args:
    sparse: {block number: number of experts}; the other blocks are dense.
    relative_bias: module giving the attention bias shared by the blocks, or None.
    execution: with `scan`, repeated blocks are one entry of `layers`, named by trees/stacking.py,
      which expects parameters with a leading axis.
  """

  def __init__(self, spec: BlockSpec, depth: int, moe: MoEConfig, sparse: dict[int, int],
               relative_bias: attention.RelativeBias | None = None,
               execution: Execution = UNROLLED, *, rngs: nnx.Rngs):
    self.has_relative_bias = relative_bias is not None
    if self.has_relative_bias:
      self.relative_bias = relative_bias
    kinds = [sparse.get(i, 0) for i in range(depth)]
    together = stacking.names(kinds) if execution.scan else [[f'{i:02d}'] for i in range(depth)]
    self.layers = nnx.Dict({
        name: Block(spec, moe, kinds[int(stacking.members(name)[0])], rngs=rngs)
        for names in together for name in names})
    self.together = tuple(map(tuple, together))
    self.final_norm = spec.make_norm(rngs)
    self.dropout_rate = spec.dropout_rate
    self.remat = execution.remat

  def __call__(self, x: jax.Array, *, mask: jax.Array | None, token_mask: jax.Array, train: bool,
               keys: jax.Array | None, source: jax.Array | None = None,
               source_mask: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """Runs the blocks.

    Args:
      x: (B, L, D) embeddings, before dropout.
      mask: broadcastable to (B, H, L, L) bool, False where not to look; None: everywhere.
      token_mask: (B, L) bool, False at tokens that routers must treat as padding.
      train: chooses the routers' capacity factor.
      keys: (B,) jax keys, one per example; None: no dropout.
      source: (B, M, D), what to cross-attend to.
      source_mask: (B, 1, 1, M) bool, False at its padding.

    Returns:
      (B, L, D) after the final norm, and {'layers/01': aux} for each MoE block.
    """
    L = x.shape[1]
    bias = (self.relative_bias(L, L, layers.at_least_float32(x.dtype))
            if self.has_relative_bias else None)
    depth = sum(len(stacking.members(name)) for name in self.layers)
    if keys is not None:
      drawn = layers.split(keys, 1 + PLACES * depth)                 # (1 + PLACES * depth, B)
      x = layers.dropout(x, self.dropout_rate, drawn[0])
      keys = drawn[1:].reshape(depth, PLACES, -1)
    same = {'bias': bias, 'mask': mask, 'source': source, 'source_mask': source_mask,
            'token_mask': token_mask}
    auxes = {}
    for names in self.together:
      with jax.named_scope('_'.join(names)):
        x, found = self._run(names, x, keys, same, train)
      auxes |= found
    return self.final_norm(x), auxes

  def _run(self, names: tuple[str, ...], x: jax.Array, keys: jax.Array | None, same: dict,
           train: bool) -> tuple[jax.Array, dict]:
    """Runs the blocks `names` one after the other, as often as they stand for blocks.

    Args:
      names: of blocks that are stacked alike, or of one that is not.
      x: (B, L, D).
      keys: (blocks of the stack, PLACES, B), or None.
      same: arguments that all blocks share; arrays and None.
      train: see __call__.

    Returns:
      (B, L, D), {'layers/01': aux of that MoE block}.
    """
    graphs, params = zip(*(nnx.split(self.layers[name], nnx.Param) for name in names))
    params = [nnx.to_pure_dict(state) for state in params]
    members = [stacking.members(name) for name in names]             # a list per block

    def run(x, params, keys, same):
      auxes = []
      for graph, own, places in zip(graphs, params, keys):
        x, aux, _ = nnx.merge(graph, own)(x, keys=places, train=train, **same)
        x = sharding.by_example(x)
        auxes.append(aux)
      return x, auxes

    if self.remat != 'none':
      # A scan keeps the two passes apart by itself; elsewhere the compiler might merge them again.
      run = jax.checkpoint(run, policy=REMAT[self.remat], prevent_cse=len(members[0]) == 1)
    if not stacking.is_stacked(names[0]):
      own = [None if keys is None else keys[int(name)] for name in names]
      x, auxes = run(x, params, own, same)
      return x, {f'layers/{name}': aux for name, aux in zip(names, auxes) if aux is not None}
    own = [None if keys is None else keys[np.array(found, int)] for found in members]
    x, auxes = jax.lax.scan(lambda x, of: run(x, *of, same), x, (params, own))
    return x, {f'layers/{member}': jax.tree.map(lambda sums, i=i: sums[i], aux)
               for found, aux in zip(members, auxes) if aux is not None
               for i, member in enumerate(found)}

  def project(self, source: jax.Array) -> dict:
    """Keys and values of a sequence (B, M, D) in each block's cross-attention.

    Returns:
      {'00': (keys, values)}, each (B, M, H, K).
    """
    return {name: block.cross_attention.project(source) for name, block in self.layers.items()}

  def step(self, x: jax.Array, *, cache: dict, position: jax.Array, source: dict,
           source_mask: jax.Array) -> tuple[jax.Array, dict]:
    """Runs the blocks on one token of each sequence: what __call__ gives at that position.

    MoE layers drop nothing, so that a token's output depends on no other. Blocks must not be
    stacked.

    Args:
      x: (B, 1, D) embeddings.
      cache: {'00': (keys, values)}, each (B, Lmax, H, K), filled in before `position`.
      position: int scalar in [0, Lmax), the same for all sequences.
      source: {'00': (keys, values)} to cross-attend to, as from `project`.
      source_mask: as in __call__.

    Returns:
      (B, 1, D) after the final norm, and the cache with `position` filled in.
    """
    M = jax.tree.leaves(cache)[0].shape[1]
    bias = self.relative_bias.row(position, M, layers.at_least_float32(x.dtype))
    mask = jnp.arange(M) <= position                                  # what comes later is empty
    kept = {}
    for name, block in self.layers.items():
      with jax.named_scope(name):
        x, _, kept[name] = block(
            x, bias=bias, mask=mask, source=source[name], source_mask=source_mask,
            token_mask=jnp.ones(x.shape[:2], bool), train=False, keys=None,
            cache=cache[name], position=position)
    return self.final_norm(x), kept
