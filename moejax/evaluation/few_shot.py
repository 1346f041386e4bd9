"""Few-shot linear probe: accuracy of a linear classifier of frozen features, from few examples.

Ridge regression in float64 on the host, repeated for several draws of the few examples, as
Komatsuzaki et al. 2023 report for 10 shots and 5 draws.

N examples, D features, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from moejax.config import check

STD_FLOOR = 1e-5   # added to standard deviations, so that a constant feature becomes 0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The probe at the end of a run.

  Attributes:
    source: classification data whose 'train' split gives the few examples and whose 'test' split
      is classified, such as 'digits'; '': no probe.
    skip_classes: as data.image.skip_classes: classes of the source to leave out, such as those that
      the model was trained on.
    examples: draw from this many examples of the training split, the first of its fixed order; 0:
      from all. (ImageNet has 1,281 a class, and 50 are plenty.)
    drop_rare: leave out, in training and test, classes with fewer examples than the most shots;
      otherwise such a class is an error.
    shots: examples per class; each number gives a result.
    draws: number of draws of the examples, over which a result is averaged.
    l2: ridge penalty on standardised features (big_vision and vmoe: 1024); 0: least squares.
  """
  source: str = ''
  skip_classes: int = 0
  examples: int = 0
  drop_rare: bool = False
  shots: tuple = (1, 5, 10)
  draws: int = 5
  l2: float = 1024.0

  def __post_init__(self):
    check(self.shots and all(type(n) is int and n >= 1 for n in self.shots), 'probe.shots',
          self.shots, 'integers >= 1, at least one', 'Usual: (1, 5, 10).')
    for key in ('skip_classes', 'examples'):
      check(getattr(self, key) >= 0, f'probe.{key}', getattr(self, key), '>= 0', 'Use 0 for all.')
    check(self.draws >= 1, 'probe.draws', self.draws, '>= 1', 'Use 1 or more.')
    check(self.l2 >= 0, 'probe.l2', self.l2, '>= 0', '0 is plain least squares.')


class Features(NamedTuple):
  """Features and classes of examples: values (N, D) float64, labels (N,) integers."""
  values: np.ndarray
  labels: np.ndarray

  def of_classes(self, classes: np.ndarray) -> 'Features':
    """Returns the features of the examples of some classes."""
    chosen = np.isin(self.labels, classes)
    return Features(self.values[chosen], self.labels[chosen])


def run(config: ProbeConfig, feature_step: Callable, params: dict, train_batches: Iterable,
        test_batches: Iterable, seed: int = 0) -> dict[str, float]:
  """Probes a model.

  Args:
    feature_step, params: see `extract`.
    train_batches, test_batches: on the host; the few examples are drawn from the former.
    config, seed: see `accuracy`.

  Returns:
    {'10shot_accuracy': mean over draws, '10shot_accuracy_std': ...} for each number of shots;
    fractions.

  Raises:
    ConfigError: a class has fewer examples than shots, or, with drop_rare, fewer than two classes
      have enough.
  """
  train = extract(feature_step, params, train_batches, config.examples)
  test = extract(feature_step, params, test_batches)
  if config.drop_rare:
    classes, counts = np.unique(train.labels, return_counts=True)
    common = classes[counts >= max(config.shots)]
    check(len(common) >= 2, 'probe.shots', max(config.shots),
          f'what two classes have (the most frequent has {counts.max()} examples)',
          'Set fewer shots.')
    train, test = train.of_classes(common), test.of_classes(common)
  results = {}
  for shots in config.shots:
    mean, std = accuracy(train, test, shots, config, seed)
    results |= {f'{shots}shot_accuracy': mean, f'{shots}shot_accuracy_std': std}
  return results


def extract(feature_step: Callable, params: dict, batches: Iterable[dict],
            limit: int = 0) -> Features:
  """Features of the real examples of some batches.

  Args:
    feature_step: (params, batch) -> (B, D) on the host, for a host batch.
    params: of the model.
    batches: dicts of host arrays with 'label' (B,) and 'weight' (B,), 0 for filler examples.
    limit: stop after this many examples; 0: read all.
  """
  values, labels, number = [], [], 0
  for batch in batches:
    real = np.asarray(batch['weight']) > 0
    values.append(np.asarray(feature_step(params, batch), np.float64)[real])
    labels.append(np.asarray(batch['label'])[real])
    number += len(labels[-1])
    if limit and number >= limit:
      break
  return Features(np.concatenate(values)[:limit or None], np.concatenate(labels)[:limit or None])


def accuracy(train: Features, test: Features, shots: int, config: ProbeConfig,
             seed: int = 0) -> tuple[float, float]:
  """Accuracy of a linear classifier fitted to `shots` training examples of each class.

  Draw d permutes the examples of each class by default_rng([seed, d]) and takes the first `shots`,
  so that the examples of fewer shots are among those of more. The classes are those of `train`.

  Returns:
    Mean over draws of the fraction of test examples whose class has the largest output, and its
    (population) standard deviation.

  Raises:
    ConfigError: a class has fewer than `shots` examples, or is only in the test.
  """
  classes, counts = np.unique(train.labels, return_counts=True)
  check(counts.min() >= shots, 'probe.shots', shots,
        f'at most {counts.min()}, the examples of class {classes[counts.argmin()]}',
        'Set fewer shots.')
  absent = np.setdiff1d(test.labels, classes)
  check(not len(absent), 'probe.examples', f'none of class {absent[0] if len(absent) else ""}',
        'examples of every class in the test', 'Draw from more, or set probe.drop_rare.')
  of_class = [np.flatnonzero(train.labels == c) for c in classes]
  accuracies = []
  for draw in range(config.draws):
    rng = np.random.default_rng([seed, draw])
    chosen = np.concatenate([rng.permutation(numbers)[:shots] for numbers in of_class])
    few = Features(train.values[chosen], train.labels[chosen])
    outputs = ridge(few, test.values, classes, config.l2)
    accuracies.append(np.mean(classes[outputs.argmax(-1)] == test.labels))
  return float(np.mean(accuracies)), float(np.std(accuracies))


def ridge(few: Features, test_values: np.ndarray, classes: np.ndarray, l2: float) -> np.ndarray:
  """Outputs of a ridge regression onto the classes, as in big_vision's fewshot_lsr.

  Features are standardised (there called whitened) by mean and standard deviation of the few
  examples; targets are 1 for the label and -1 for others. The intercept is not penalised; there it
  is the weight of a constant feature of 100, hence nearly so.

  Args:
    few: (N, D) and (N,), the examples to fit.
    test_values: (M, D).
    classes: (C,).
    l2: penalty on the squared weights, added to the sum of squared errors; 0: least squares, the
      solution of least norm.

  Returns:
    (M, C) float64.
  """
  from sklearn.linear_model import LinearRegression, Ridge
  mean, std = few.values.mean(0), few.values.std(0) + STD_FLOOR
  targets = 2.0 * (few.labels[:, None] == classes) - 1.0            # (N, C)
  model = Ridge(l2, solver='cholesky') if l2 else LinearRegression()
  model.fit((few.values - mean) / std, targets)
  return model.predict((test_values - mean) / std)
