"""Transformer blocks, dense or sparse, and stacks of them: T5's encoder and decoder, ViT's trunk.

Dimensions: B batch, L length (queries), M length (keys), D model, H heads, K head width.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import nn
from moejax.models import layers, scan
from moejax.models.attention import Attention, AttentionSpec, RelativeBias
from moejax.moe.config import MoEConfig
from moejax.moe.experts import Experts
from moejax.moe.layer import MoELayer
from moejax.trees import stacking


@dataclasses.dataclass(frozen=True)
class StackInfo:
  """A stack of blocks as code outside models/ sees it, for any family of models.

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
  """The form of a block, common to all blocks of a stack.

  Attributes:
    norm: makes a norm of the residual stream, given rngs=.
    attention: form of the attention, and of the cross-attention.
    mlp: form of the dense MLP.
    dropout_rate: of sublayer outputs, and of the stack's input.
    cross_attention: whether blocks attend to a second sequence.
  """
  norm: Callable[..., nnx.Module]
  attention: AttentionSpec
  mlp: nn.MLPSpec
  dropout_rate: float
  cross_attention: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What all blocks of a stack share during one pass.

  Attributes:
    train: static; chooses the routers' capacity factor, and whether they draw noise.
    token_mask: (B, L) bool, False at tokens that routers must treat as padding.
    mask: broadcastable to (B, H, L, M) bool, False at keys that a query must not see; None: it sees
      all of them.
    bias: (1, H, L, M) added to the logits of self-attention, or None.
    source: what to cross-attend to: a sequence (B, M, D), or its keys and values (B, M, H, K);
      None without cross-attention.
    source_mask: (B, 1, 1, M) bool, False at the source's padding.
    position: scalar int, position of the tokens that are decoded with a cache; None without one.
  """
  train: bool = dataclasses.field(metadata={'static': True})
  token_mask: jax.Array
  mask: jax.Array | None = None
  bias: jax.Array | None = None
  source: jax.Array | tuple[jax.Array, jax.Array] | None = None
  source_mask: jax.Array | None = None
  position: jax.Array | None = None


class BlockKeys(NamedTuple):
  """(B,) keys for each random draw of a block: dropout within a sublayer, and of its output."""
  attention: jax.Array | None
  attention_output: jax.Array | None
  cross_attention: jax.Array | None
  cross_attention_output: jax.Array | None
  mlp: jax.Array | None
  mlp_output: jax.Array | None


NUM_KEYS = len(BlockKeys._fields)


class Block(nnx.Module):
  """Pre-norm transformer block: attention, cross-attention if any, then MLP or MoE layer."""

  def __init__(self, spec: BlockSpec, moe: MoEConfig, num_experts: int, *, rngs: nnx.Rngs):
    self.attention_norm = spec.norm(rngs=rngs)
    self.attention = Attention(spec.attention, rngs=rngs)
    cross = spec.cross_attention
    self.cross_attention_norm = spec.norm(rngs=rngs) if cross else None
    self.cross_attention = Attention(spec.attention, rngs=rngs) if cross else None
    self.mlp_norm = spec.norm(rngs=rngs)
    self.moe = _moe_layer(spec, moe, num_experts, rngs) if num_experts else None
    self.mlp = None if num_experts else layers.MLP(spec.mlp, rngs=rngs)
    self.dropout_rate = spec.dropout_rate

  def __call__(self, x: jax.Array, context: Context, keys: jax.Array | None,
               cache: tuple[jax.Array, jax.Array] | None = None):
    """Runs the block.

    Args:
      x: (B, L, D).
      context: what it shares with the other blocks.
      keys: (NUM_KEYS, B), or None: nothing is drawn.
      cache: keys and values (B, Lmax, H, K) of earlier tokens, among which those of x are written
        at context.position; None: x is the whole sequence.

    Returns:
      x (B, L, D); aux of the MoE layer, or None; and the keys and values that x attended to.
    """
    keys = BlockKeys(*([None] * NUM_KEYS if keys is None else keys))
    add = lambda x, y, keys: x + nn.dropout(y, self.dropout_rate, keys)
    with jax.named_scope('attention'):
      h = self.attention_norm(x)
      seen = self.attention.project(h)
      if cache is not None:
        seen = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, context.position, axis=1)
                     for old, new in zip(cache, seen))
      h = self.attention(h, seen, context.bias, context.mask, keys.attention)
      x = add(x, h, keys.attention_output)
    if self.cross_attention is not None:
      with jax.named_scope('cross_attention'):
        h, source = self.cross_attention_norm(x), context.source
        if not isinstance(source, tuple):
          source = self.cross_attention.project(source)
        h = self.cross_attention(h, source, None, context.source_mask, keys.cross_attention)
        x = add(x, h, keys.cross_attention_output)
    aux = None
    with jax.named_scope('mlp' if self.moe is None else 'moe'):
      h = self.mlp_norm(x)
      if self.moe is None:
        h = self.mlp(h, keys.mlp)
      else:
        h, aux = self.moe(h, context.token_mask, train=context.train, keys=keys.mlp,
                          no_drop=cache is not None)
      return add(x, h, keys.mlp_output), aux, seen


def _moe_layer(spec: BlockSpec, moe: MoEConfig, num_experts: int, rngs: nnx.Rngs) -> MoELayer:
  """The MoE layer in place of a block's MLP."""
  rate = moe.dropout_rate if moe.dropout_rate >= 0 else spec.mlp.dropout_rate
  d_ff = moe.expert_d_ff(spec.mlp.d_ff)
  form = dataclasses.replace(spec.mlp, d_ff=d_ff, dropout_rate=rate)
  experts = Experts(form, num_experts, rngs=rngs)
  shared = None
  if moe.shared_experts:
    shared = layers.MLP(dataclasses.replace(form, d_ff=moe.shared_experts * d_ff), rngs=rngs)
  return MoELayer(moe, num_experts, experts, shared, form.d_model, rngs=rngs)


class Stack(nnx.Module):
  """Blocks 'layers/00', 'layers/01', ... and a final norm.

  Args:
    spec: form of the blocks.
    depth: number of blocks.
    moe: settings of the sparse blocks.
    sparse: {block number: number of experts}; the other blocks are dense.
    relative_bias: module of the attention bias that the blocks share, or None.
    execution: with `scan`, repeated blocks are one entry of `layers`, named by trees/stacking.py,
      which expects parameters with a leading axis.
  """

  def __init__(self, spec: BlockSpec, depth: int, moe: MoEConfig, sparse: dict[int, int],
               relative_bias: RelativeBias | None = None,
               execution: scan.Execution = scan.UNROLLED, *, rngs: nnx.Rngs):
    self.relative_bias = relative_bias
    experts = [sparse.get(i, 0) for i in range(depth)]
    patterns = stacking.names(experts) if execution.scan else [[f'{i:02d}'] for i in range(depth)]
    self.layers = nnx.Dict({
        name: Block(spec, moe, experts[int(stacking.members(name)[0])], rngs=rngs)
        for names in patterns for name in names})
    self.patterns = tuple(map(tuple, patterns))   # names of the blocks that are scanned together
    self.depth = depth
    self.final_norm = spec.norm(rngs=rngs)
    self.dropout_rate = spec.dropout_rate
    self.remat = execution.remat

  def __call__(self, x: jax.Array, context: Context, keys: jax.Array | None
               ) -> tuple[jax.Array, dict]:
    """Runs the blocks.

    Args:
      x: (B, L, D) embeddings, before dropout.
      context: what the blocks share; this stack adds its relative bias.
      keys: (B,) jax keys, one per example; None: nothing is drawn.

    Returns:
      (B, L, D) after the final norm, and {'layers/01': aux} for each MoE layer.
    """
    if self.relative_bias is not None:
      L, dtype = x.shape[1], nn.at_least_float32(x.dtype)
      context = dataclasses.replace(context, bias=self.relative_bias(L, L, dtype))
    if keys is not None:
      keys = nn.split_keys(keys, 1 + NUM_KEYS * self.depth)          # (1 + NUM_KEYS * depth, B)
      x = nn.dropout(x, self.dropout_rate, keys[0])
      keys = keys[1:].reshape(self.depth, NUM_KEYS, -1)
    auxes = {}
    for names in self.patterns:
      with jax.named_scope('_'.join(names)):
        blocks = {name: self.layers[name] for name in names}
        x, aux = scan.run(blocks, x, keys, context, self.remat)
      auxes |= aux
    return self.final_norm(x), auxes

  def project(self, source: jax.Array) -> dict:
    """Keys and values of a sequence (B, M, D) in each block's cross-attention.

    Returns:
      {'00': (keys, values)}, each (B, M, H, K).
    """
    return {name: block.cross_attention.project(source) for name, block in self.layers.items()}

  def step(self, x: jax.Array, cache: dict, source: dict, context: Context
           ) -> tuple[jax.Array, dict]:
    """Runs the blocks on one token of each sequence: the output of __call__ at that position.

    MoE layers drop nothing, so that a token's output depends on no other. Blocks must not be
    stacked.

    Args:
      x: (B, 1, D) embeddings.
      cache: {'00': (keys, values)}, each (B, Lmax, H, K), filled in before context.position.
      source: {'00': (keys, values)} to cross-attend to, as from `project`.
      context: with position, an int scalar in [0, Lmax) for all sequences, token_mask and
        source_mask; this stack adds the rest.

    Returns:
      (B, 1, D) after the final norm, and the cache with `position` filled in.
    """
    M = jax.tree.leaves(cache)[0].shape[1]
    context = dataclasses.replace(
        context, mask=jnp.arange(M) <= context.position,   # later positions are empty
        bias=self.relative_bias.row(context.position, M, nn.at_least_float32(x.dtype)))
    filled = {}
    for name, block in self.layers.items():
      with jax.named_scope(name):
        x, _, filled[name] = block(
            x, dataclasses.replace(context, source=source[name]), None, cache[name])
    return self.final_norm(x), filled
