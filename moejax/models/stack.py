"""Transformer blocks, dense or sparse, and stacks of them: the trunk of T5's two halves and of ViT.

Dimensions: B batch, L length (queries), M length (keys), D model, H heads, K head
width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.models import attention, layers
from moejax.moe.layer import MoEConfig, MoELayer

PLACES = 6  # where a block draws: inside and after attention, cross-attention and MLP


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

  def make_norm(self, rngs: nnx.Rngs) -> nnx.Module:
    return self.norm(self.d_model, eps=self.norm_eps, rngs=rngs)

  def make_attention(self, rngs: nnx.Rngs) -> attention.Attention:
    return attention.Attention(
        self.d_model, self.num_heads, self.head_dim, bias=self.bias, scaled=self.scaled,
        init=self.init, q_init=self.q_init, dropout_rate=self.attention_dropout_rate, rngs=rngs)

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
      keys: PLACES arrays (B,), or None for each.
      source: keys and values (B, M, H, K) to cross-attend to, or None.
      cache: keys and values (B, Lmax, H, K) of earlier tokens, among which those of x are written
        at `position`; None: x is all there is.
      (The others are Stack's.)

    The new cache is what x attended to: keys and values of the whole sequence.
    """
    inside, after, cross_inside, cross_after, mlp_inside, mlp_after = keys
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
  """

  def __init__(self, spec: BlockSpec, depth: int, moe: MoEConfig, sparse: dict[int, int],
               relative_bias: attention.RelativeBias | None = None, *, rngs: nnx.Rngs):
    self.has_relative_bias = relative_bias is not None
    if self.has_relative_bias:
      self.relative_bias = relative_bias
    self.layers = nnx.Dict({
        f'{i:02d}': Block(spec, moe, sparse.get(i, 0), rngs=rngs) for i in range(depth)})
    self.final_norm = spec.make_norm(rngs)
    self.dropout_rate = spec.dropout_rate

  def __call__(self, x: jax.Array, *, mask: jax.Array | None, token_mask: jax.Array, train: bool,
               keys: jax.Array | None, source: dict | None = None,
               source_mask: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """Runs the blocks.

    Args:
      x: (B, L, D) embeddings, before dropout.
      mask: broadcastable to (B, H, L, L) bool, False where not to look; None: everywhere.
      token_mask: (B, L) bool, False at tokens that routers must treat as padding.
      train: chooses the routers' capacity factor.
      keys: (B,) jax keys, one per example; None: no dropout.
      source: what to cross-attend to, as from `project`.
      source_mask: (B, 1, 1, M) bool, False at its padding.

    Returns:
      (B, L, D) after the final norm, and {'layers/01': aux} for each MoE block.
    """
    L = x.shape[1]
    bias = (self.relative_bias(L, L, layers.at_least_float32(x.dtype))
            if self.has_relative_bias else None)
    first, *keys = layers.split(keys, 1 + PLACES * len(self.layers))
    x = layers.dropout(x, self.dropout_rate, first)
    auxes = {}
    for i, (name, block) in enumerate(self.layers.items()):
      with jax.named_scope(name):
        x, aux, _ = block(
            x, bias=bias, mask=mask, source=source and source[name], source_mask=source_mask,
            token_mask=token_mask, train=train, keys=keys[PLACES * i:PLACES * (i + 1)])
      if aux is not None:
        auxes[f'layers/{name}'] = aux
    return self.final_norm(x), auxes

  def project(self, source: jax.Array) -> dict:
    """Keys and values of a sequence (B, M, D) in each block's cross-attention.

    Returns:
      {'00': (keys, values)}, each (B, M, H, K).
    """
    return {name: block.cross_attention.project(source) for name, block in self.layers.items()}

  def step(self, x: jax.Array, *, cache: dict, position: jax.Array, source: dict,
           source_mask: jax.Array) -> tuple[jax.Array, dict]:
    """Runs the blocks on one token of each sequence: what __call__ gives at that position.

    MoE layers drop nothing, so that a token's output depends on no other.

    Args:
      x: (B, 1, D) embeddings.
      cache: {'00': (keys, values)}, each (B, Lmax, H, K), filled in before `position`.
      position: int scalar in [0, Lmax), the same for all sequences.
      source, source_mask: as in __call__.

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
            token_mask=jnp.ones(x.shape[:2], bool), train=False, keys=[None] * PLACES,
            cache=cache[name], position=position)
    return self.final_norm(x), kept
