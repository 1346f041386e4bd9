"""What a GPU does during a step: seconds in matmuls and attentions, and in all other kernels.

Read from a profile of a few steps. Off a GPU there are no kernels to be told apart.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax

from moejax.aot import hlo

STEPS = 3
DEAREST = 5
# cuBLAS, XLA's matmuls by Triton, ours; cuDNN's fused attention and what goes with it.
PRODUCTS = re.compile(r'nvjet|gemm|cutlass|cublas|grouped_|cudnn|sdpa|fmha', re.IGNORECASE)
CALLED = re.compile(r'cublas|cudnn|triton', re.IGNORECASE)   # products that the program calls


def per_step(advance: Callable) -> dict[str, Any] | None:
  """Of a step that `advance` hands over, returning something to wait for; None off a GPU.

  Returns:
    {'products', 'other'}: seconds in matmuls and fused attentions, and in all other kernels;
    {'launched'}: how many kernels there are. What is left of a step's time, no kernel ran.
    {'dearest'}: {name: seconds} of the DEAREST others.
  """
  if jax.default_backend() != 'gpu':
    return None
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        out = advance()
      jax.block_until_ready(out)
    return add_up(event for path in pathlib.Path(folder).rglob('*.xplane.pb')
                  for event in _kernels(str(path)))


def _kernels(path: str) -> Iterable[tuple[str, float]]:
  """(name, seconds) of every kernel in a profile."""
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    if 'GPU' in plane.name:
      for line in plane.lines:
        if line.name.startswith('Stream'):
          yield from ((event.name, event.duration_ns / 1e9) for event in line.events)


def add_up(events: Iterable[tuple[str, float]]) -> dict[str, Any]:
  """(name, seconds) of all kernels of STEPS steps -> what per_step returns."""
  found = {'products': 0.0, 'other': 0.0, 'launched': 0.0}
  others = collections.Counter()
  for name, seconds in events:
    kind = 'products' if PRODUCTS.search(name) else 'other'
    found[kind] += seconds / STEPS
    found['launched'] += 1 / STEPS
    if kind == 'other':
      others[name] += seconds / STEPS
  return {**found, 'dearest': dict(others.most_common(DEAREST))}


def moved(text: str) -> float:
  """Bytes that a compiled program reads and writes outside of matmuls and fused attentions.

  text: `compiled.as_text()`. What a kernel finds in a cache counts as well.
  """
  module = hlo.Module(text)
  return sum(times * module.bytes(instruction, where) for instruction, times, where in module.run()
             if not CALLED.search(instruction.target) and not module.flops(instruction, where))
