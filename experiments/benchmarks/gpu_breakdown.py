"""Splits the time of a GPU's step: its matmuls and attentions timed alone, kernels of a profile.

A step can be no faster than its matmuls and attentions. The remaining time goes to routing, norms,
activations and the optimizer, as the compiler implements them.

Dimensions: B batch, L length (queries), M length (keys), D model, F ffn, H heads, K head width,
E experts, V vocabulary.
"""

import collections
import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import common
from moejax.aot import hlo
from moejax.models import attention
from moejax.moe.routing import expert_capacity

ROUNDS = 5
SECONDS = 0.1   # a round
STEPS = 3       # profiled
SHOWN = 5       # names of kernels that a profile returns
# Kernels of cuBLAS, of XLA's matmuls by Triton, of ours; of cuDNN's fused attention.
PRODUCTS = re.compile(r'nvjet|gemm|cutlass|cublas|grouped_|cudnn|sdpa|fmha', re.IGNORECASE)
CALLED = re.compile(r'cublas|cudnn|triton', re.IGNORECASE)   # products that the program calls


@dataclasses.dataclass(frozen=True)
class Matmul:
  """`count` products (groups, rows, d_in) @ (groups, d_in, d_out); groups are experts, or 1."""
  count: int
  groups: int
  rows: int
  d_in: int
  d_out: int

  @property
  def flops(self) -> int:
    """Of all forward passes."""
    return 2 * self.count * self.groups * self.rows * self.d_in * self.d_out


@dataclasses.dataclass(frozen=True)
class Attention:
  """`count` attentions from L queries to M keys; with T5's bias, and a mask, or without."""
  count: int
  batch: int
  L: int
  M: int
  heads: int
  width: int
  bias: bool = False
  mask: bool = False

  @property
  def flops(self) -> int:
    """Of all forward passes: logits and values."""
    return 4 * self.count * self.batch * self.L * self.M * self.heads * self.width


def operations(config, B: int, encoder_length: int = 0, decoder_length: int = 0
               ) -> list[Matmul | Attention]:
  """All matmuls and attentions of a forward pass; their FLOPs add up to flops.forward_flops.

  Args:
    config: T5Config or ViTConfig, without shared experts, and routed by one matmul without learned
      noise. In dropless dispatch, each expert's rows are the mean, rounded down.
    B: examples.
    encoder_length, decoder_length: tokens of an example, for T5.
  """
  stacks = config.stacks(encoder_length, decoder_length).values()
  return [*(operation for stack in stacks for operation in _stack(config, stack, B)),
          *(Matmul(1, 1, B * rows, d_in, d_out)
            for rows, d_in, d_out in config.outer_matmuls(decoder_length))]


def _stack(config, stack, B: int) -> Iterator[Matmul | Attention]:
  """Operations of a models.StackInfo over B examples."""
  D, F, H, L, source = config.d_model, config.d_ff, config.num_heads, stack.tokens, (
      stack.source_tokens)
  K, depth, moe = stack.inner // H, stack.depth, stack.moe
  for M in (L, source) if source else (L,):
    yield Matmul(depth, 1, B * L, D, H * K)       # q
    yield Matmul(2 * depth, 1, B * M, D, H * K)   # k, v
    yield Matmul(depth, 1, B * L, H * K, D)       # o
  yield Attention(depth, B, L, L, H, K, bias=stack.biased, mask=stack.biased)
  if source:
    yield Attention(depth, B, L, source, H, K, mask=True)
  gated = stack.mlp_matrices == 3
  yield from _mlp(depth - len(stack.sparse), 1, B * L, D, F, gated)
  S = moe.group_size or L
  for E in stack.sparse.values():
    capacity = expert_capacity(S, E, moe.capacity_factor, moe.min_capacity)
    rows = B * L // S * capacity if moe.dispatch != 'grouped' else moe.k * B * L // E
    yield Matmul(1, 1, B * L, D, E)               # router
    if moe.dispatch == 'einsum':
      yield Matmul(1, B * L // S, E * capacity, S, D)   # into the buffers, and back
      yield Matmul(1, B * L // S, S, E * capacity, D)
    yield from _mlp(1, E, rows, D, moe.expert_d_ff(F), gated)


def _mlp(count: int, groups: int, rows: int, D: int, F: int, gated: bool) -> Iterator[Matmul]:
  if count:
    yield Matmul((2 if gated else 1) * count, groups, rows, D, F)
    yield Matmul(count, groups, rows, F, D)


def seconds(operation: Matmul | Attention, fused: bool = False, **rounds) -> float:
  """Median time of forward and backward pass, `count` times, in bfloat16.

  Experts' loads are even: the least that a dropless matmul can take.

  fused: attention in one kernel, where there is neither bias nor mask.
  rounds: see per_call.
  """
  both, operands = _both_passes(operation, fused)
  return operation.count * per_call(lambda: both(*operands), **rounds)[1]


def prepare(operation: Matmul | Attention, fused: bool = False) -> None:
  """Compiles the program of `seconds` into JAX's folder of compiled programs."""
  both, operands = _both_passes(operation, fused)
  both.lower(*operands).compile()


def _both_passes(operation: Matmul | Attention, fused: bool) -> tuple[Callable, tuple]:
  """(jitted forward and backward pass, its operands)."""
  op = operation
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
  if isinstance(op, Matmul):
    fn = jnp.matmul
    operands = draw(0, op.groups, op.rows, op.d_in), draw(1, op.groups, op.d_in, op.d_out)
    cotangent = draw(2, op.groups, op.rows, op.d_out)
  else:
    q = draw(0, op.batch, op.L, op.heads, op.width)
    k, v = (draw(i, op.batch, op.M, op.heads, op.width) for i in (1, 2))
    bias = jnp.zeros((1, op.heads, op.L, op.M)) if op.bias else None
    mask = jnp.ones((op.batch, 1, 1, op.M), bool) if op.mask else None
    operands, cotangent = (q, k, v, *([bias] if op.bias else [])), draw(3, *q.shape)
    fn = (attention.fused if fused and not (op.bias or op.mask) else
          lambda q, k, v, bias=None: attention.attend(q, k, v, bias, mask))

  @jax.jit
  def both(operands, cotangent):
    y, pull = jax.vjp(fn, *operands)
    return y, pull(cotangent)
  return both, (operands, cotangent)


def attention_errors(operation: Attention) -> dict[str, float]:
  """How far fused and plain attention in bfloat16 are from plain attention in float32.

  Args:
    operation: without bias and mask; of its batch, one example.

  Returns:
    {'fused', 'plain'}: the largest difference in the output or the gradient of q, k or v, each over
    that array's largest value in float32.
  """
  draw = lambda i, length: jax.random.normal(
      jax.random.key(i), (1, length, operation.heads, operation.width), jnp.bfloat16)
  q, k, v = draw(0, operation.L) * operation.width ** -0.5, *(draw(i, operation.M) for i in (1, 2))
  cotangent = draw(3, operation.L)

  def both(fn, dtype):
    *qkv, dy = (x.astype(dtype) for x in (q, k, v, cotangent))
    y, pull = jax.vjp(fn, *qkv)
    return [np.asarray(x, np.float32) for x in (y, *pull(dy))]
  with jax.default_matmul_precision('highest'):
    right = both(attention.attend, jnp.float32)
  error = lambda arrays: max(float(np.abs(a - b).max() / np.abs(b).max())
                             for a, b in zip(arrays, right))
  return {'fused': error(both(attention.fused, jnp.bfloat16)),
          'plain': error(both(attention.attend, jnp.bfloat16))}


def per_call(call: Callable[[], Any], rounds: int = ROUNDS, least: float = SECONDS) -> list[float]:
  """Seconds of one call, [lower quartile, median, upper quartile] over rounds of several calls.

  Calls of a round are enqueued one after the other and waited for together, which hides the
  host's work, as in training. A round takes `least` seconds or more.
  """
  def timed(calls):
    def work():
      for _ in range(calls):
        out = call()
      jax.block_until_ready(out)
    return common.seconds(work) / calls
  timed(1)   # compiles
  calls = max(1, round(least / timed(1)))
  return common.quartiles([timed(calls) for _ in range(rounds)])


def profile(step: Callable[[], Any]) -> dict[str, Any] | None:
  """Kernels of a step, which `step` enqueues, returning something to wait for; None off a GPU.

  Returns:
    {'products', 'other'}: seconds in matmuls and fused attentions, and in all other kernels;
    {'launched'}: number of kernels. In the rest of a step's time no kernel ran.
    {'longest'}: {name: seconds} of the SHOWN others that took longest.
  """
  if jax.default_backend() != 'gpu':
    return None
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        out = step()
      jax.block_until_ready(out)
    return add_up(kernel for path in pathlib.Path(folder).rglob('*.xplane.pb')
                  for kernel in _kernels(str(path)))


def _kernels(path: str) -> Iterator[tuple[str, float]]:
  """(name, seconds) of every kernel in a profile."""
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    if 'GPU' in plane.name:
      for line in plane.lines:
        if line.name.startswith('Stream'):
          yield from ((event.name, event.duration_ns / 1e9) for event in line.events)


def add_up(kernels: Iterable[tuple[str, float]]) -> dict[str, Any]:
  """The return value of `profile`, of (name, seconds) of all kernels of STEPS steps."""
  total = {'products': 0.0, 'other': 0.0, 'launched': 0.0}
  others = collections.Counter()
  for name, seconds in kernels:
    kind = 'products' if PRODUCTS.search(name) else 'other'
    total[kind] += seconds / STEPS
    total['launched'] += 1 / STEPS
    if kind == 'other':
      others[name] += seconds / STEPS
  return {**total, 'longest': dict(others.most_common(SHOWN))}


def bytes_moved(text: str) -> float:
  """Bytes that a compiled program reads and writes outside of matmuls and fused attentions.

  text: `compiled.as_text()`. Reads that a cache serves count too.
  """
  module = hlo.Module(text)
  return sum(times * module.bytes(instruction, where) for instruction, times, where in module.run()
             if not CALLED.search(instruction.target) and not module.flops(instruction, where))
