"""The timing of grouped matmuls, in small."""

import pytest

from experiments.benchmarks import grouped_matmul

SHAPE = (64, 16, 32, 4)


@pytest.mark.parametrize('backend, dtype', [('cpu', 'float32'), ('gpu', 'bfloat16')])
def test_a_gpu_has_a_workload_of_its_own(monkeypatch, backend, dtype):
  monkeypatch.setattr(grouped_matmul.jax, 'default_backend', lambda: backend)
  shapes = grouped_matmul.GPU_SHAPES if backend == 'gpu' else grouped_matmul.SHAPES
  assert grouped_matmul.workload() == (shapes, dtype)
  monkeypatch.setattr(grouped_matmul, 'GPU_SHAPES', (SHAPE,))
  monkeypatch.setattr(grouped_matmul, 'SHAPES', (SHAPE,))
  (_, x, w, _), *others = grouped_matmul.ways(*SHAPE).values()
  assert x.dtype == w.dtype == dtype and all(way[1].dtype == dtype for way in others)
  text = grouped_matmul.timed(1)
  assert f'rounds, {dtype}' in text and text.count('| 64 | 16 | 32 | 4 |') == 2
