"""Each transform by itself: its values, any slice of them, and what fits."""

import numpy as np
import pytest

from moejax.trees import transforms
from moejax.trees.transforms import Mean, Noise, Reinit, Repeat, Shard, Slice, Subset, Transpose

D, F, E = 4, 6, 5
W = np.random.default_rng(0).normal(size=(D, F)).astype(np.float32)
FRESH = np.random.default_rng(1).normal(size=(E, D, F)).astype(np.float32)


def like(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


def whole(how, arrays, target):
  sources = arrays[:len(arrays) - how.with_fresh] or arrays
  assert how.fits([a.shape for a in sources], target.shape)
  return np.asarray(how.make(arrays, (slice(None),) * target.ndim, target), target.dtype)


CASES = {
    'copy': (transforms.Copy(), [W], like(D, F)),
    'transpose': (Transpose(), [W], like(F, D)),
    'stack': (transforms.Stack(), [W, W + 1], like(2, D, F)),
    'tile': (transforms.Tile(), [W], like(E, D, F)),
    'subset': (Subset(2), [W, FRESH], like(E, D, F)),
    'noise': (Noise(0.5, (1, 2)), [W], like(E, D, F)),
    'reinit columns': (Reinit(0.5, -1, (1,), (2,)), [W], like(E, D, F)),
    'reinit rows': (Reinit(0.5, 0, (1,), (2,)), [W], like(E, D, F)),
    'shard columns': (Shard(2, -1, 3.0), [W], like(4, D, 3)),
    'shard rows': (Shard(2, 0), [W], like(4, 2, F)),
    'slice columns': (Slice(-1), [W], like(D, 4)),
    'slice rows': (Slice(0, 0.5), [W], like(3, F)),
    'mean': (Mean(), [FRESH], like(D, F)),
    'repeat': (Repeat(3), [W], like(D, F)),
}


@pytest.mark.parametrize('case', CASES)
def test_any_slice_is_that_slice_of_the_whole(case):
  """Whichever slice a device requests, and in any order, random draws included."""
  how, arrays, target = CASES[case]
  full = whole(how, arrays, target)
  halves = [(slice(0, n // 2), slice(n // 2, n)) for n in target.shape]
  requested = [tuple(half[pick] if a == axis else slice(None) for a, half in enumerate(halves))
               for pick in (1, 0) for axis in range(target.ndim)]
  for index in (*requested, tuple(half[1] for half in halves)):
    part = how.make(arrays, index, target)
    np.testing.assert_array_equal(np.asarray(part, np.float32), full[index])
    assert np.size(part) < full.size


def test_one_expert_at_a_time():
  """Of 64 experts only those of the slice are made, one after the other."""
  made = []

  class Counted(Reinit):
    def expert(self, source, e):
      made.append(e)
      return super().expert(source, e)

  part = Counted(0.5, -1, (1,), (2,)).make([W], (slice(10, 12), slice(0, 1), slice(0, 1)),
                                           like(64, D, F))
  assert part.shape == (2, 1, 1)
  assert made == [10, 11]


def test_subset():
  made = whole(Subset(2), [W, FRESH], like(E, D, F))
  np.testing.assert_array_equal(made[:2], [W, W])
  np.testing.assert_array_equal(made[2:], FRESH[2:])
  counts = whole(Subset(2), [np.int32(9), np.zeros(E, np.int32)], like(E, dtype=np.int32))
  np.testing.assert_array_equal(counts, [9, 9, 0, 0, 0])


def test_noise_is_relative_to_the_leaf_and_different_for_each_expert():
  source = 5 + 3 * np.random.default_rng(0).normal(size=(100, 100))
  added = whole(Noise(0.1, (1,)), [source], like(3, 100, 100, dtype=np.float64)) - source
  np.testing.assert_allclose(added.std(axis=(1, 2)), 0.3, rtol=0.03)   # 0.1 of the 3, not of the 5
  assert abs(np.corrcoef(added[0].ravel(), added[1].ravel())[0, 1]) < 0.05
  flat = np.full((2, 3), 7.0)
  np.testing.assert_array_equal(whole(Noise(0.1, (1,)), [flat], like(2, 2, 3))[1], flat)


@pytest.mark.parametrize('axis', [0, -1])
def test_reinit_draws_from_what_it_replaces(axis):
  """Mean and deviation are those of the replaced units, not of the leaf."""
  F = 8
  source = np.random.default_rng(0).normal(size=(F, 400)) * 0.01 + 2.0 ** np.arange(F)[:, None]
  source = np.moveaxis(source, 0, axis)
  made = whole(Reinit(0.25, axis, (3,), (4,)), [source], like(6, *source.shape, dtype=np.float64))
  seen = set()
  for expert in np.moveaxis(made, 1 + axis if axis == 0 else axis, 1):
    old = np.moveaxis(source, axis, 0)
    lost = np.flatnonzero((expert != old).any(1))
    assert len(lost) == 2 and (expert != old)[lost].all()
    seen.add(tuple(lost))
    assert abs(expert[lost].mean() - old[lost].mean()) < 5 * old[lost].std() / np.sqrt(800)
    np.testing.assert_allclose(expert[lost].std(), old[lost].std(), rtol=0.15)
  assert len(seen) > 2   # experts lose different units


@pytest.mark.parametrize('fraction, lost', [(0.0, 0), (0.34, 2), (1.0, 6)])
def test_how_many_units_are_lost(fraction, lost):
  made = whole(Reinit(fraction, -1, (1,), (2,)), [W], like(E, D, F))
  assert [(expert != W).any(0).sum() for expert in made] == [lost] * E


def test_shards_cycle_and_scale():
  made = whole(Shard(3, 0, 2.0), [W.T], like(6, 2, D))
  for e, rows in enumerate([(0, 2), (2, 4), (4, 6)] * 2):
    np.testing.assert_array_equal(made[e], 2 * W.T[slice(*rows)])
  np.testing.assert_array_equal(whole(Shard(3, None, 0.5), [W[0]], like(6, F)), [W[0] / 2] * 6)


def test_slice():
  np.testing.assert_array_equal(whole(Slice(-1), [W], like(D, 2)), W[:, :2])
  np.testing.assert_array_equal(whole(Slice(None, 0.5), [W[0]], like(F)), W[0] / 2)


def test_mean_is_exact_for_identical_experts():
  same = np.stack([np.random.default_rng(0).normal(size=99).astype(np.float32)] * 7)
  assert (same.sum(0) / 7 != same[0]).any()   # the plain mean is not
  np.testing.assert_array_equal(whole(Mean(), [same], like(99)), same[0])
  np.testing.assert_allclose(whole(Mean(), [FRESH], like(D, F)), FRESH.mean(0), rtol=1e-5,
                             atol=1e-6)


def test_repeat_keeps_the_shards_of_an_mlp_together():
  fresh = np.arange(12.0).reshape(2, 6)
  np.testing.assert_array_equal(whole(Repeat(3), [fresh], like(2, 6)),
                                [[0, 0, 0, 1, 1, 1], [6, 6, 6, 7, 7, 7]])


def test_transpose_reverses_the_axes_by_default():
  np.testing.assert_array_equal(whole(Transpose(), [W], like(F, D)), W.T)
  np.testing.assert_array_equal(whole(Transpose((0, 1)), [W], like(D, F)), W)


@pytest.mark.parametrize('how, source, target', [
    (transforms.Tile(), (D, F), (E, F, D)), (transforms.Tile(), (), ()),
    (Transpose((0, 1)), (D, F), (F, D)), (Transpose((1, 1)), (D, F), (F, F)),
    (Subset(3), (D,), (2, D)), (Noise(1.0, ()), (D, F), (E, F, D)), (Mean(), (E, D), (E,)),
    (Mean(), (), ()), (Shard(4, 1), (D, F), (8, D, 1)), (Shard(2, 1), (D, F), (8, D, F)),
    (Shard(2, None), (D,), (8, D // 2)), (Slice(0), (F, D), (F + 1, D)), (Slice(0), (F, D), (2, 2)),
    (Slice(0), (F, D), (F,)), (Slice(None), (D,), (2,)), (Repeat(4), (), (D, F))])
def test_what_does_not_fit(how, source, target):
  assert not how.fits([source], target)
