"""The matmuls and attentions of a train step, taken out of it and timed by themselves.

A step can be no faster than these; what it takes beside them is routing, norms, activations, the
optimizer, and what the compiler makes of it.

Dimensions: B batch, L length (queries), M length (keys), D model, F ffn, H heads, K head width,
E experts, V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.models import attention
from moejax.moe.routing import expert_capacity

ROUNDS = 5
SECONDS = 0.1   # a round


@dataclasses.dataclass(frozen=True)
class Matmul:
  """`times` products (groups, rows, d_in) @ (groups, d_in, d_out); groups are experts, or 1."""
  times: int
  groups: int
  rows: int
  d_in: int
  d_out: int

  @property
  def flops(self) -> int:
    """Of the forward pass, all times."""
    return 2 * self.times * self.groups * self.rows * self.d_in * self.d_out


@dataclasses.dataclass(frozen=True)
class Attend:
  """`times` attentions from L queries to M keys; with T5's bias, and a mask, or without."""
  times: int
  batch: int
  L: int
  M: int
  heads: int
  width: int
  bias: bool = False
  mask: bool = False

  @property
  def flops(self) -> int:
    """Of the forward pass, all times: logits and values."""
    return 4 * self.times * self.batch * self.L * self.M * self.heads * self.width


def parts(config, B: int, encoder_length: int = 0, decoder_length: int = 0
          ) -> list[Matmul | Attend]:
  """All there are in a forward pass; their FLOPs add up to flops.forward_flops.

  Args:
    config: T5Config or ViTConfig, without shared experts, and routed by one matmul without learned
      noise. Of dropless dispatch each expert's rows are the mean, rounded down.
    B: examples.
    encoder_length, decoder_length: tokens of an example, for T5.
  """
  stacks = config.stacks(encoder_length, decoder_length).values()
  return [*(part for stack in stacks for part in _stack(config, stack, B)),
          *(Matmul(1, 1, B * rows, d_in, d_out)
            for rows, d_in, d_out in config.outer_matmuls(decoder_length))]


def _stack(config, stack, B: int) -> Iterator[Matmul | Attend]:
  """Of a models.StackInfo over B examples."""
  D, F, H, L, source = config.d_model, config.d_ff, config.num_heads, stack.tokens, (
      stack.source_tokens)
  K, depth, moe = stack.inner // H, stack.depth, stack.moe
  for M in (L, source) if source else (L,):
    yield Matmul(depth, 1, B * L, D, H * K)       # q
    yield Matmul(2 * depth, 1, B * M, D, H * K)   # k, v
    yield Matmul(depth, 1, B * L, H * K, D)       # o
  yield Attend(depth, B, L, L, H, K, bias=stack.biased, mask=stack.biased)
  if source:
    yield Attend(depth, B, L, source, H, K, mask=True)
  gated = stack.mlp_matrices == 3
  yield from _mlp(depth - len(stack.sparse), 1, B * L, D, F, gated)
  S = moe.group_size or L
  for E in stack.sparse.values():
    slots = expert_capacity(S, E, moe.capacity_factor, moe.min_capacity)
    rows = B * L // S * slots if moe.dispatch != 'grouped' else moe.k * B * L // E
    yield Matmul(1, 1, B * L, D, E)               # router
    if moe.dispatch == 'einsum':
      yield Matmul(1, B * L // S, E * slots, S, D)   # into the buffers, and back
      yield Matmul(1, B * L // S, S, E * slots, D)
    yield from _mlp(1, E, rows, D, moe.expert_d_ff(F), gated)


def _mlp(times: int, groups: int, rows: int, D: int, F: int, gated: bool) -> Iterator[Matmul]:
  if times:
    yield Matmul((2 if gated else 1) * times, groups, rows, D, F)
    yield Matmul(times, groups, rows, F, D)


def seconds(part: Matmul | Attend, fused: bool = False, **rounds) -> float:
  """Time of forward and backward pass, all times, in bfloat16, the median of a few rounds.

  Experts' loads are even: the least that a dropless matmul can take.

  fused: attention in one kernel, where there is neither bias nor mask.
  rounds: see per_call.
  """
  both, given = _both_passes(part, fused)
  return part.times * per_call(lambda: both(*given), **rounds)[1]


def prepare(part: Matmul | Attend, fused: bool = False):
  """Compiles what `seconds` runs, into JAX's folder of compiled programs."""
  both, given = _both_passes(part, fused)
  both.lower(*given).compile()


def _both_passes(part: Matmul | Attend, fused: bool) -> tuple[Callable, tuple]:
  """(jitted forward and backward pass, what it takes)."""
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
  if isinstance(part, Matmul):
    x = draw(0, part.groups, part.rows, part.d_in)
    given, out = (x, draw(1, part.groups, part.d_in, part.d_out)), (part.d_out,)
    fn, cotangent = jnp.matmul, draw(2, part.groups, part.rows, *out)
  else:
    q = draw(0, part.batch, part.L, part.heads, part.width)
    k, v = (draw(i, part.batch, part.M, part.heads, part.width) for i in (1, 2))
    bias = jnp.zeros((1, part.heads, part.L, part.M)) if part.bias else None
    mask = jnp.ones((part.batch, 1, 1, part.M), bool) if part.mask else None
    given, cotangent = (q, k, v, *([bias] if part.bias else [])), draw(3, *q.shape)
    fn = (attention.fused if fused and not (part.bias or part.mask) else
          lambda q, k, v, bias=None: attention.attend(q, k, v, bias, mask))

  @jax.jit
  def both(given, cotangent):
    y, pull = jax.vjp(fn, *given)
    return y, pull(cotangent)
  return both, (given, cotangent)


def errors(part: Attend) -> dict[str, float]:
  """How far fused and plain attention in bfloat16 are from plain attention in float32.

  Args:
    part: without bias and mask; of its batch, one example.

  Returns:
    {'fused', 'plain'}: the largest difference in the output or the gradient of q, k or v, each over
    that array's largest value in float32.
  """
  draw = lambda i, length: jax.random.normal(
      jax.random.key(i), (1, length, part.heads, part.width), jnp.bfloat16)
  given, cotangent = (draw(0, part.L) * part.width ** -0.5, draw(1, part.M), draw(2, part.M)), draw(
      3, part.L)

  def both(fn, dtype):
    wide = [x.astype(dtype) for x in (*given, cotangent)]
    y, pull = jax.vjp(fn, *wide[:3])
    return [np.asarray(x, np.float32) for x in (y, *pull(wide[3]))]
  with jax.default_matmul_precision('highest'):
    right = both(attention.attend, jnp.float32)
  far = lambda found: max(float(np.abs(a - b).max() / np.abs(b).max())
                          for a, b in zip(found, right))
  return {'fused': far(both(attention.fused, jnp.bfloat16)),
          'plain': far(both(attention.attend, jnp.bfloat16))}


def per_call(run: Callable, rounds: int = ROUNDS, least: float = SECONDS) -> list[float]:
  """Seconds of one call, [lower quartile, median, upper quartile] over rounds of several calls.

  Calls of a round are handed over one after the other and waited for together, so that what the
  host does is hidden, as it is in training.
  """
  def timed(calls):
    started = time.perf_counter()
    for _ in range(calls):
      out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - started) / calls
  timed(1)   # compiles
  calls = max(1, round(least / timed(1)))
  return statistics.quantiles([timed(calls) for _ in range(rounds)], n=4, method='inclusive')
