"""Analytic FLOPs and parameter counts of a T5 or ViT, dense or sparse.

Counted: the 2*N*D*F of every matmul: attention projections, logits and values, MLPs, patch
embedding, head, routers, shared experts, and experts at full capacity, so empty slots cost what
full ones do. The einsum dispatch adds its two one-hot matmuls; the gather dispatch moves data and
counts 0; the grouped dispatch has no capacity and counts k experts per token (its padding of rows
to whole blocks left out). Not counted: norms, softmax, activations, embedding look-ups, top-k, the
optimizer. A training step is
three times the forward pass: a matmul's gradient is one matmul for its input, one for its weight.

The configs are duck-typed (T5Config, ViTConfig): this file imports no model.

Dimensions: B batch, L length, M attended length, D model, F ffn, H heads, K head width, E experts,
S tokens per group, C slots per expert and group.
"""

import re

from moejax import trees
from moejax.config import check
from moejax.moe.routing import expert_capacity


def parameters(shapes: dict, config) -> tuple[int, int]:
  """Parameters in all, and those that act on a token.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs, as `Model.shapes`.
    config: T5Config or ViTConfig.

  Returns:
    (total, active): active takes of each layer's E experts those a token meets: k with token
    choice (the most there can be with top_p), capacity_factor on average (at most E) with expert
    choice. Embeddings and shared experts count in full.
  """
  total = active = 0
  stacks = config.stacks()
  for path, leaf in trees.flatten(shapes).items():
    size = trees.count({path: leaf})
    total += size
    found = re.match(r'(\w+)/layers/\d+/moe/experts/', path)
    if found:
      moe, E = stacks[found.group(1)].moe, leaf.shape[0]
      met = moe.k if moe.token_choice else moe.capacity_factor
      size = round(size * min(met, E) / E)
    active += size
  return total, active


def forward_flops(config, batch_size: int, encoder_length: int = 0, decoder_length: int = 0,
                  train: bool = True, dispatch: bool = True) -> int:
  """FLOPs of the forward pass of a batch.

  Args:
    config: T5Config or ViTConfig.
    batch_size: B, examples.
    encoder_length, decoder_length: tokens of an example, padding included, for T5; ViT has its own.
    train: capacity factor of training or of evaluation.
    dispatch: whether one-hot matmuls that only move tokens count.

  Raises:
    ConfigError: a T5 without lengths.
  """
  B, total = batch_size, 0
  for name, stack in config.stacks(encoder_length, decoder_length).items():
    check(stack.tokens >= 1, f'{name}_length', stack.tokens, 'the tokens of an example',
          'T5 has no length of its own.')
    total += _stack(config, stack, B, train, dispatch)
  return total + sum(_matmul(B * rows, d_in, d_out)
                     for rows, d_in, d_out in config.outer_matmuls(decoder_length))


def train_step_flops(config, batch_size: int, encoder_length: int = 0, decoder_length: int = 0,
                     dispatch: bool = True) -> int:
  """FLOPs of forward and backward pass, without the optimizer: three times `forward_flops`.

  What is done for a model FLOPs utilisation (MFU) has dispatch=False: moving tokens by matmuls is
  work of the hardware's, and none of the model's.
  """
  return 3 * forward_flops(config, batch_size, encoder_length, decoder_length, dispatch=dispatch)


def _matmul(rows: int, d_in: int, d_out: int) -> int:
  """(rows, d_in) @ (d_in, d_out)."""
  return 2 * rows * d_in * d_out


def _stack(config, stack, B: int, train: bool, dispatch: bool) -> int:
  """All blocks of a stack, a models.StackInfo, over B examples."""
  D, F, L = config.d_model, config.d_ff, stack.tokens
  mlp = lambda rows, d_ff=F: stack.mlp_matrices * _matmul(rows, D, d_ff)
  total = stack.depth * _attention(B, L, L, D, stack.inner)
  if stack.source_tokens:
    total += stack.depth * _attention(B, L, stack.source_tokens, D, stack.inner)
  total += (stack.depth - len(stack.sparse)) * mlp(B * L)
  return total + sum(_moe_layer(stack.moe, E, B, L, D, F, mlp, train, dispatch)
                     for E in stack.sparse.values())


def _attention(B: int, L: int, M: int, D: int, inner: int) -> int:
  """From L queries to M keys: q and o, k and v, logits and values; inner = H*K."""
  projections = 2 * _matmul(B * L, D, inner) + 2 * _matmul(B * M, D, inner)
  return projections + 2 * B * _matmul(L, inner, M)


def _moe_layer(moe, E: int, B: int, L: int, D: int, d_ff: int, mlp, train: bool,
               dispatch: bool) -> int:
  """Router, experts at full capacity, shared experts, and the dispatch if it is a matmul."""
  S = moe.group_size or L
  groups, F = B * L // S, moe.expert_d_ff(d_ff)
  factor = moe.capacity_factor if train else moe.eval_capacity_factor
  slots = E * expert_capacity(S, E, factor, moe.min_capacity)
  if moe.dispatch == 'grouped' and moe.token_choice:
    slots = moe.k * S
  hot = dispatch and moe.dispatch == 'einsum'
  moved = 2 * groups * _matmul(S, slots, D) if hot else 0
  # Norm-based routing has no router, but runs every expert on every token.
  router = mlp(E * B * L, F) if moe.router == 'norm' else _matmul(B * L, D, E)
  if moe.learned_noise and train:
    router *= 2                                                     # its scale is a matmul too
  shared = mlp(B * L, moe.shared_experts * F) if moe.shared_experts else 0
  return router + mlp(groups * slots, F) + moved + shared
