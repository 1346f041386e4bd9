"""The linear probe against closed forms, on digits' pixels, and on a tiny ViT."""

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from moejax import models
from moejax.config import ConfigError
from moejax.evaluation import few_shot
from moejax.evaluation.few_shot import Features, ProbeConfig
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
  return Features(x, CLASSES[np.arange(N) % 4])


@pytest.mark.parametrize('l2', [0.0, 0.5, 1024.0])
@pytest.mark.parametrize('N, D', [(40, 6), (12, 30), (8, 8)])
def test_ridge_is_its_closed_form(N, D, l2):
  """(X^T X + l2)^+ X^T Y on standardised features and centred targets, D x D even where N < D."""
  few, (test_x, _) = examples(N, D), examples(20, D, seed=1)
  mean, std = few.values.mean(0), few.values.std(0) + 1e-5
  X, Y = (few.values - mean) / std, np.where(few.labels[:, None] == CLASSES, 1.0, -1.0)
  weights = np.linalg.pinv(X.T @ X + l2 * np.eye(D), rcond=1e-12) @ X.T @ (Y - Y.mean(0))
  np.testing.assert_allclose(few_shot.ridge(few, test_x, CLASSES, l2),
                             (test_x - mean) / std @ weights + Y.mean(0),
                             *((1e-9, 1e-10) if l2 else (1e-7, 1e-8)))


def test_ridge_by_hand():
  """x = -1, 1 with targets -1, 1: weight 2 / (2 + l2), 1/2 at l2 = 2; intercept 0."""
  few, classes = Features(np.array([[-1.0], [1.0]]), np.array([0, 1])), np.array([0, 1])
  outputs = few_shot.ridge(few, np.array([[3.0]]), classes, 2.0)
  np.testing.assert_allclose(outputs, [[-1.5, 1.5]], rtol=1e-4)   # the floor of the deviation
  # Three of class 0 to one of class 1: intercepts are the means of the targets, 1/2 and -1/2.
  few = Features(np.zeros((4, 1)), np.array([0, 0, 0, 1]))
  np.testing.assert_array_equal(few_shot.ridge(few, np.zeros((1, 1)), classes, 1.0), [[0.5, -0.5]])


def digits():
  """(training examples, test examples) of pixels."""
  data = load_digits()
  return Features(data.data[:900], data.target[:900]), Features(data.data[900:], data.target[900:])


def accuracy(train, test, shots, seed=0, **settings):
  return few_shot.accuracy(train, test, shots, ProbeConfig(**settings), seed)


def test_a_draw_takes_shots_of_each_class(monkeypatch):
  """Features name their example, so the examples of a fit show what was drawn."""
  labels = np.repeat([3, 4, 9], [5, 20, 6])
  train = Features(np.arange(31.0)[:, None], labels)
  test = Features(np.zeros((4, 1)), np.array([4, 4, 9, 3]))
  drawn = []

  def fake(few, test_values, classes, l2):
    numbers = few.values[:, 0].astype(int)
    drawn.append(set(numbers))
    np.testing.assert_array_equal(few.labels, labels[numbers])
    np.testing.assert_array_equal(classes, [3, 4, 9])
    outputs = np.zeros((4, 3))
    outputs[:, len(drawn) % 3] = 1   # predicts 4, then 9, then 3
    return outputs
  monkeypatch.setattr(few_shot, 'ridge', fake)
  mean, std = accuracy(train, test, 2, draws=3, seed=1)
  assert (mean, std) == pytest.approx((1 / 3, np.std([0.5, 0.25, 0.25])))
  assert all(np.bincount(labels[list(d)], minlength=10)[[3, 4, 9]].tolist() == [2, 2, 2]
             for d in drawn)
  assert drawn[0] != drawn[1] != drawn[2]
  accuracy(train, test, 5, draws=3, seed=1)
  assert all(few < many for few, many in zip(drawn[:3], drawn[3:]))   # nested
  accuracy(train, test, 2, draws=3, seed=1)
  accuracy(train, test, 2, draws=3, seed=2)
  assert drawn[:3] == drawn[6:9] != drawn[9:]
  with pytest.raises(ConfigError, match='probe.shots: got 6, allowed: at most 5.*class 3'):
    accuracy(train, test, 6)
  with pytest.raises(ConfigError, match='probe.examples: got .none of class 7.'):
    accuracy(train, Features(np.zeros((4, 1)), np.array([4, 4, 9, 7])), 2)


def batches(examples, size):
  """The last one is filled up with filler of weight 0, which must not be used."""
  for start in range(0, len(examples.labels), size):
    values, labels = (x[start:start + size] for x in examples)
    missing = size - len(labels)
    yield {'image': np.pad(values, ((0, missing), (0, 0)), constant_values=1e6),
           'label': np.pad(labels, (0, missing)),
           'weight': np.pad(np.ones(len(labels), np.float32), (0, missing))}


def test_run_probes_real_examples_only():
  train, test = digits()
  config = ProbeConfig(source='digits', shots=(1, 10), draws=3, l2=64.0)
  scale = lambda params, batch: np.float32(batch['image'] * params['scale'])
  results = few_shot.run(config, scale, {'scale': 2.0}, batches(train, 64), batches(test, 100),
                         seed=5)
  assert list(results) == ['1shot_accuracy', '1shot_accuracy_std',
                           '10shot_accuracy', '10shot_accuracy_std']
  train, test = (Features(2 * x.values, x.labels) for x in (train, test))
  mean, std = few_shot.accuracy(train, test, 10, config, 5)
  assert (results['10shot_accuracy'], results['10shot_accuracy_std']) == (mean, std)
  assert mean > 0.8


def run(train, test, **settings):
  return few_shot.run(ProbeConfig(source='digits', draws=2, **settings),
                      lambda params, batch: batch['image'], {}, train, batches(test, 100))


def test_examples_are_the_first_of_the_training_split():
  train, test = digits()
  read = []

  def reading():
    for batch in batches(train, 64):
      read.append(len(batch['label']))
      yield batch
  results = run(reading(), test, shots=(5,), examples=200)
  first = Features(train.values[:200], train.labels[:200])
  assert results['5shot_accuracy'] == accuracy(first, test, 5, draws=2)[0]
  assert len(read) == 4   # of 15: no more is read than needed


def test_rare_classes_are_left_out_of_training_and_test():
  train, test = digits()
  kept = (train.labels != 3) | (np.cumsum(train.labels == 3) <= 7)   # seven threes are left
  train = Features(train.values[kept], train.labels[kept])
  with pytest.raises(ConfigError, match='probe.shots: got 10, allowed: at most 7.*class 3'):
    run(batches(train, 64), test, shots=(5, 10))
  results = run(batches(train, 64), test, shots=(5, 10), drop_rare=True)
  train, test = (Features(x.values[x.labels != 3], x.labels[x.labels != 3]) for x in (train, test))
  for shots in (5, 10):   # all shots have the same classes
    assert results[f'{shots}shot_accuracy'] == accuracy(train, test, shots, draws=2)[0]
  with pytest.raises(ConfigError, match='probe.shots: got 99, .*the most frequent has 9'):
    run(batches(train, 64), test, shots=(1, 99), drop_rare=True)


def test_features_of_a_vit_are_the_same_on_a_mesh():
  """Eight devices with an example each, the last two filler, against one."""
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
    ProbeConfig(**changes)
