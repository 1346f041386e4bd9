"""Analytic FLOPs and parameter counts of a model, dense or sparse.

Counted: the 2*N*D*F of every matmul: attention projections, logits and values, MLPs, patch
embedding, head, routers, shared experts, and experts at full capacity, so that empty slots cost as
much as full ones. dispatch='einsum' adds its two one-hot matmuls; 'gather' moves data and counts 0;
'grouped' has no capacity and counts k experts per token (without the padding of rows to whole
blocks). Not counted: norms, softmax, activations, embedding look-ups, top-k, the optimizer. A
training step is three times the forward pass: a matmul's gradient is one matmul for its input and
one for its weight.

Configs, stacks and MoE settings are duck-typed: this file imports neither models nor moe.

Dimensions: B batch, L length, M attended length, D model, F ffn, H heads, K head width (as in
models/), E experts, S tokens per group, C slots per expert and group.
"""

import re

from moejax import trees
from moejax.config import check


def parameters(shapes: dict, config) -> tuple[int, int]:
  """Number of parameters, and number of those that act on a token.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs, as `Model.shapes`.
    config: T5Config or ViTConfig.

  Returns:
    (total, active): of each layer's E experts, active counts those of a token: k with token choice
    (the upper limit with top_p), capacity_factor on average (at most E) with expert choice.
    Embeddings and shared experts count in full.
  """
  total = active = 0
  stacks = config.stacks()
  for path, leaf in trees.flatten(shapes).items():
    size = trees.count({path: leaf})
    total += size
    match = re.match(r'(\w+)/layers/\d+/moe/experts/', path)
    if match:
      moe, E = stacks[match.group(1)].moe, leaf.shape[0]
      per_token = moe.k if moe.token_choice else moe.capacity_factor
      size = round(size * min(per_token, E) / E)
    active += size
  return total, active


def forward_flops(config, batch_size: int, encoder_length: int = 0, decoder_length: int = 0,
                  train: bool = True, dispatch: bool = True) -> int:
  """FLOPs of the forward pass of a batch.

  Args:
    config: T5Config or ViTConfig.
    batch_size: B, examples.
    encoder_length, decoder_length: tokens of an example, padding included, for T5; a ViT's follow
      from its config.
    train: whether capacity is that of training; else of evaluation.
    dispatch: whether one-hot matmuls that only move tokens count.

  Raises:
    ConfigError: a T5 without lengths.
  """
  B, total = batch_size, 0
  for name, stack in config.stacks(encoder_length, decoder_length).items():
    check(stack.tokens >= 1, f'{name}_length', stack.tokens, 'the tokens of an example',
          'T5 has no length of its own.')
    total += _stack(config, stack, B, train, dispatch)
  return total + sum(_matmul(B * tokens, d_in, d_out)
                     for tokens, d_in, d_out in config.outer_matmuls(decoder_length))


def train_step_flops(config, batch_size: int, encoder_length: int = 0, decoder_length: int = 0,
                     dispatch: bool = True) -> int:
  """FLOPs of forward and backward pass, without the optimizer: three times `forward_flops`.

  For model FLOPs utilisation (MFU) use dispatch=False: matmuls that move tokens are work of the
  hardware, not of the model.
  """
  return 3 * forward_flops(config, batch_size, encoder_length, decoder_length, dispatch=dispatch)


def _matmul(N: int, d_in: int, d_out: int) -> int:
  """(N, d_in) @ (d_in, d_out)."""
  return 2 * N * d_in * d_out


def _stack(config, stack, B: int, train: bool, dispatch: bool) -> int:
  """All blocks of a stack, a models.StackInfo, over B examples."""
  D, L = config.d_model, stack.tokens
  total = stack.depth * _attention(B, L, L, D, stack.inner)
  if stack.source_tokens:
    total += stack.depth * _attention(B, L, stack.source_tokens, D, stack.inner)
  total += (stack.depth - len(stack.sparse)) * stack.mlp_matrices * _matmul(B * L, D, config.d_ff)
  return total + sum(_moe_layer(config, stack, E, B, train, dispatch)
                     for E in stack.sparse.values())


def _attention(B: int, L: int, M: int, D: int, inner: int) -> int:
  """From L queries to M keys: q and o, k and v, logits and values; inner = H*K."""
  projections = 2 * _matmul(B * L, D, inner) + 2 * _matmul(B * M, D, inner)
  return projections + 2 * B * _matmul(L, inner, M)


def _moe_layer(config, stack, E: int, B: int, train: bool, dispatch: bool) -> int:
  """Router, experts at full capacity, shared experts, and the dispatch if it is a matmul."""
  moe, D, L = stack.moe, config.d_model, stack.tokens
  S = moe.group_size or L
  G, F = B * L // S, moe.expert_d_ff(config.d_ff)
  mlp = lambda tokens, hidden: stack.mlp_matrices * _matmul(tokens, D, hidden)
  slots = moe.k * S if moe.dropless else E * moe.slots_per_expert(S, E, train)
  one_hot = dispatch and moe.dispatch == 'einsum'
  moved = 2 * G * _matmul(S, slots, D) if one_hot else 0
  # Norm-based routing has no router, but runs every expert on every token.
  router = mlp(E * B * L, F) if moe.router == 'norm' else _matmul(B * L, D, E)
  if moe.learned_noise and train:
    router *= 2                                                     # its scale is a matmul too
  shared = mlp(B * L, moe.shared_experts * F) if moe.shared_experts else 0
  return router + mlp(G * slots, F) + moved + shared
