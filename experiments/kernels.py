"""What a GPU does during a step: seconds in matmuls and attentions, and in all other kernels.

Read from a profile of a few steps. Off a GPU there are no kernels to be told apart.
"""

import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable

import jax

STEPS = 3
# cuBLAS, XLA's matmuls by Triton, ours; cuDNN's fused attention and what goes with it.
PRODUCTS = re.compile(r'nvjet|gemm|cutlass|cublas|grouped_|cudnn|sdpa|fmha', re.IGNORECASE)


def per_step(advance: Callable) -> dict[str, float] | None:
  """Of a step that `advance` hands over, returning something to wait for; None off a GPU.

  Returns:
    {'products', 'other'}: seconds in matmuls and fused attentions, and in all other kernels;
    {'launched'}: how many kernels there are. What is left of a step's time, no kernel ran.
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


def add_up(events: Iterable[tuple[str, float]]) -> dict[str, float]:
  """(name, seconds) of all kernels of STEPS steps -> what per_step returns."""
  found = {'products': 0.0, 'other': 0.0, 'launched': 0.0}
  for name, seconds in events:
    found['products' if PRODUCTS.search(name) else 'other'] += seconds / STEPS
    found['launched'] += 1 / STEPS
  return found
