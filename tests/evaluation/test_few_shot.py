"""The linear probe against scikit-learn's regressions, and on digits' pixels and a tiny ViT."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression, Ridge

from moejax import models
from moejax.config import ConfigError
from moejax.evaluation import few_shot
from moejax.models import vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import parallel
from tests.models.helpers import random_params

CLASSES = np.array([0, 1, 2, 5])


def examples(N, D, seed=0, offset=3.0):
  """Features of unequal scale far from 0, one of them constant, and labels that they follow."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, D)) * np.geomspace(0.1, 100, D) + offset
  x[:, 1] = 7.0
  return x, CLASSES[np.arange(N) % 4]


def standardised(x, test_x):
  mean, std = x.mean(0), x.std(0) + 1e-5
  return (x - mean) / std, (test_x - mean) / std


def targets(labels):
  return np.where(labels[:, None] == CLASSES, 1.0, -1.0)


@pytest.mark.parametrize('l2', [0.5, 1024.0])
@pytest.mark.parametrize('N, D', [(40, 6), (12, 30), (8, 8)], ids=['primal', 'dual', 'square'])
def test_equals_sklearn_ridge(N, D, l2):
  x, labels = examples(N, D)
  test_x, _ = examples(20, D, seed=1)
  a, b = standardised(x, test_x)
  expected = Ridge(alpha=l2, solver='svd').fit(a, targets(labels)).predict(b)
  found = few_shot.ridge(x, labels, test_x, CLASSES, l2)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('N, D', [(40, 6), (12, 30)])
def test_without_penalty_equals_sklearn_least_squares(N, D):
  x, labels = examples(N, D)
  test_x, _ = examples(20, D, seed=1)
  a, b = standardised(x, test_x)
  expected = LinearRegression().fit(a, targets(labels)).predict(b)
  np.testing.assert_allclose(few_shot.ridge(x, labels, test_x, CLASSES, 0.0), expected, rtol=1e-7,
                             atol=1e-8)


def test_ridge_by_hand():
  """x = -1, 1 with targets -1, 1: weight 2 / (2 + l2), 1/2 at l2 = 2; intercept 0."""
  x, labels = np.array([[-1.0], [1.0]]), np.array([0, 1])
  found = few_shot.ridge(x, labels, np.array([[3.0]]), np.array([0, 1]), 2.0)
  np.testing.assert_allclose(found, [[-1.5, 1.5]], rtol=1e-4)   # the floor of the deviation
  # Three of class 0 to one of class 1: intercepts are the means of the targets, 1/2 and -1/2.
  x, labels = np.zeros((4, 1)), np.array([0, 0, 0, 1])
  np.testing.assert_array_equal(
      few_shot.ridge(x, labels, np.zeros((1, 1)), np.array([0, 1]), 1.0), [[0.5, -0.5]])


def test_scale_and_shift_of_features_do_not_matter():
  x, labels = examples(40, 6)
  test_x, _ = examples(20, 6, seed=1)
  a = few_shot.ridge(x, labels, test_x, CLASSES, 3.0)
  b = few_shot.ridge(x * 1000 - 5e4, labels, test_x * 1000 - 5e4, CLASSES, 3.0)
  np.testing.assert_allclose(a, b, rtol=1e-3)


def digits():
  data = load_digits()
  return data.data[:900], data.target[:900], data.data[900:], data.target[900:]


def test_digits_pixels_are_told_apart():
  """Chance is 10 %; more shots tell more."""
  one, five, ten = (few_shot.few_shot(*digits(), shots) for shots in (1, 5, 10))
  assert 0.4 < one[0] < five[0] < ten[0] < 0.9
  assert ten[0] > 0.75 and five[0] > 0.7
  assert one[1] > ten[1] > 0   # fewer examples, more luck


def test_shuffled_labels_are_at_chance():
  x, labels, test_x, test_labels = digits()
  shuffled = np.random.default_rng(0).permutation(labels)
  assert few_shot.few_shot(x, shuffled, test_x, test_labels, 10)[0] < 0.2


def test_a_draw_takes_shots_of_each_class(monkeypatch):
  """Features name their example, so what a fit is given shows what was drawn."""
  labels = np.repeat([3, 4, 9], [5, 20, 6])
  features = np.arange(31.0)[:, None]
  seen = []

  def fake(x, y, test_x, classes, l2):
    seen.append(set(x[:, 0].astype(int)))
    np.testing.assert_array_equal(y, labels[x[:, 0].astype(int)])
    np.testing.assert_array_equal(classes, [3, 4, 9])
    outputs = np.zeros((4, 3))
    outputs[:, len(seen) % 3] = 1   # says 4, then 9, then 3
    return outputs
  monkeypatch.setattr(few_shot, 'ridge', fake)
  test = np.zeros((4, 1)), np.array([4, 4, 9, 3])
  mean, std = few_shot.few_shot(features, labels, *test, shots=2, draws=3, seed=1)
  assert (mean, std) == pytest.approx((1 / 3, np.std([0.5, 0.25, 0.25])))
  assert all(np.bincount(labels[list(s)], minlength=10)[[3, 4, 9]].tolist() == [2, 2, 2]
             for s in seen)
  assert seen[0] != seen[1] != seen[2]
  few_shot.few_shot(features, labels, *test, shots=5, draws=3, seed=1)
  assert all(few < many for few, many in zip(seen[:3], seen[3:]))   # nested
  few_shot.few_shot(features, labels, *test, shots=2, draws=3, seed=1)
  few_shot.few_shot(features, labels, *test, shots=2, draws=3, seed=2)
  assert seen[:3] == seen[6:9] != seen[9:]
  with pytest.raises(ConfigError, match='probe.shots: got 6, allowed: at most 5.*class 3'):
    few_shot.few_shot(features, labels, *test, shots=6)
  with pytest.raises(ConfigError, match='probe.examples: got .none of class 7.'):
    few_shot.few_shot(features, labels, np.zeros((4, 1)), np.array([4, 4, 9, 7]), shots=2)


def batches(x, labels, size):
  """The last one is filled up, with fillers of weight 0 that must not be seen."""
  for start in range(0, len(x), size):
    rows = x[start:start + size]
    missing = size - len(rows)
    yield {'image': np.pad(rows, ((0, missing), (0, 0)), constant_values=1e6),
           'label': np.pad(labels[start:start + size], (0, missing)),
           'weight': np.pad(np.ones(len(rows), np.float32), (0, missing))}


def test_run_probes_real_examples_only():
  x, labels, test_x, test_labels = digits()
  config = few_shot.ProbeConfig(source='digits', shots=(1, 10), draws=3, l2=64.0)
  scale = lambda params, batch: np.float32(batch['image'] * params['scale'])
  found = few_shot.run(config, scale, {'scale': 2.0}, batches(x, labels, 64),
                    batches(test_x, test_labels, 100), seed=5)
  assert list(found) == ['1shot_accuracy', '1shot_accuracy_std',
                         '10shot_accuracy', '10shot_accuracy_std']
  mean, std = few_shot.few_shot(2 * x, labels, 2 * test_x, test_labels, 10, 3, 5, 64.0)
  assert (found['10shot_accuracy'], found['10shot_accuracy_std']) == (mean, std)
  assert mean > 0.8


def identity(params, batch):
  return batch['image']


def test_examples_are_the_first_of_the_training_split():
  x, labels, test_x, test_labels = digits()
  read = []

  def reading(batches):
    for batch in batches:
      read.append(len(batch['label']))
      yield batch
  config = few_shot.ProbeConfig(source='digits', shots=(5,), draws=2, examples=200)
  found = few_shot.run(config, identity, {}, reading(batches(x, labels, 64)),
                    batches(test_x, test_labels, 100))
  mean, _ = few_shot.few_shot(x[:200], labels[:200], test_x, test_labels, 5, 2, 0)
  assert found['5shot_accuracy'] == mean
  assert len(read) == 4   # of 15: no more is read than it takes


def test_rare_classes_are_left_out_of_training_and_test():
  x, labels, test_x, test_labels = digits()
  kept = (labels != 3) | (np.cumsum(labels == 3) <= 7)   # seven threes are left
  x, labels = x[kept], labels[kept]

  def run(**settings):
    return few_shot.run(few_shot.ProbeConfig(source='digits', shots=(5, 10), draws=2, **settings),
                     identity, {}, batches(x, labels, 64), batches(test_x, test_labels, 100))
  with pytest.raises(ConfigError, match='probe.shots: got 10, allowed: at most 7.*class 3'):
    run()
  found = run(drop_rare=True)
  for shots in (5, 10):   # the same classes for all shots
    mean, _ = few_shot.few_shot(x[labels != 3], labels[labels != 3], test_x[test_labels != 3],
                             test_labels[test_labels != 3], shots, 2, 0)
    assert found[f'{shots}shot_accuracy'] == mean
  with pytest.raises(ConfigError, match='probe.shots: got 91, .*the most frequent has 9'):
    few_shot.common_classes(np.repeat([0, 1], [90, 91]), 91)
  np.testing.assert_array_equal(few_shot.common_classes(np.repeat([2, 5, 7], [3, 4, 2]), 3), [2, 5])


def test_features_of_a_vit_are_the_same_on_a_mesh():
  """Eight devices with an example each, the last two fillers, against one."""
  config = vit.config('tiny', num_layers=1, moe=MoEConfig(layers='0', num_experts=2))
  model = models.build(config)
  params = random_params(model.shapes)
  rng = np.random.default_rng(0)
  batch = {'image': rng.normal(size=(8, 8, 8, 1)).astype(np.float32), 'label': np.arange(8),
           'weight': np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)}
  features, labels = few_shot.extract(jax.jit(model.features), params, [batch, batch])
  assert features.shape == (12, 16) and features.dtype == np.float64
  np.testing.assert_array_equal(labels, [0, 1, 2, 3, 4, 5] * 2)
  assert np.ptp(features[:6], axis=0).min() > 0.1   # images differ
  where = parallel.make('mesh', MeshConfig(expert=2))
  step = where.jit(model.features)
  on_mesh, _ = few_shot.extract(lambda params, batch: step(params, where.put(batch)),
                             jax.device_put(params, where.shardings(params)), [batch])
  np.testing.assert_allclose(on_mesh, features[:6], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('changes', [{'shots': ()}, {'shots': (0,)}, {'shots': (1.5,)},
                                     {'draws': 0}, {'l2': -1.0}, {'skip_classes': -1},
                                     {'examples': -1}])
def test_refused(changes):
  key, = changes
  with pytest.raises(ConfigError, match=f'probe.{key}'):
    few_shot.ProbeConfig(**changes)
