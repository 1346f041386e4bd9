"""The timing of grouped matmuls, in small."""

import pytest

from experiments import grouped

SHAPE = (64, 16, 32, 4)


def test_ratios_to_the_floor_of_every_way_and_pass():
  found = grouped.ratios(SHAPE, 2)
  assert set(found) == {(way, which) for way in ('grouped', 'ragged_dot')
                        for which in grouped.PASSES}
  assert all(len(ratios) == 2 and min(ratios) > 0 for ratios in found.values())


@pytest.mark.parametrize('backend, dtype', [('cpu', 'float32'), ('gpu', 'bfloat16')])
def test_a_gpu_has_a_workload_of_its_own(monkeypatch, backend, dtype):
  monkeypatch.setattr(grouped.jax, 'default_backend', lambda: backend)
  assert grouped.workload() == (grouped.GPU_SHAPES if backend == 'gpu' else grouped.SHAPES, dtype)
  monkeypatch.setattr(grouped, 'GPU_SHAPES', (SHAPE,))
  monkeypatch.setattr(grouped, 'SHAPES', (SHAPE,))
  (_, x, w, _), *others = grouped.ways(*SHAPE).values()
  assert x.dtype == w.dtype == dtype and all(way[1].dtype == dtype for way in others)
  text = grouped.timed(1)
  assert f'rounds, {dtype}' in text and text.count('| 64 | 16 | 32 | 4 |') == 2
