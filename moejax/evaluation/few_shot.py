"""Few-shot linear probe: how well frozen features tell classes apart, from a few examples of each.

Least squares in closed form, float64 on the host, over several draws of the few examples, as
Komatsuzaki et al. 2023 report for 10 shots and 5 draws.

Dimensions: N examples, D features, C classes.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from moejax.config import check

STD_FLOOR = 1e-5   # added to standard deviations: a constant feature stays 0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """A probe at the end of a run.

  Attributes:
    source: classification data to draw examples from and to test on, such as 'digits'; empty: no
      probe.
    skip_classes: as data.image.skip_classes: classes of the source that are left out, such as those
      that the model was trained on.
    examples: draw from this many examples of the training split, the first of its fixed order; 0:
      from all. (ImageNet: 50 a class are plenty, and it has 1,281.)
    drop_rare: leave out, in training and test, classes with fewer examples than the most shots;
      otherwise they are an error.
    shots: examples per class, one result for each number.
    draws: sets of examples that a result is averaged over.
    l2: ridge penalty on standardised features (big_vision and vmoe: 1024).
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


def run(config: ProbeConfig, feature_step: Callable, params: dict, train_batches: Iterable,
        test_batches: Iterable, seed: int = 0) -> dict[str, float]:
  """Probes a model.

  Args:
    config: what to measure.
    feature_step, params: see `extract`.
    train_batches: host batches of which the few examples are drawn.
    test_batches: host batches on which accuracy is measured.
    seed: of the draws.

  Returns:
    {'10shot_accuracy': mean over draws, '10shot_accuracy_std': ...} for each number of shots;
    fractions.

  Raises:
    ConfigError: more shots than a class has examples, or, with drop_rare, than any class has.
  """
  features, labels = extract(feature_step, params, train_batches, config.examples)
  test_features, test_labels = extract(feature_step, params, test_batches)
  if config.drop_rare:
    common = common_classes(labels, max(config.shots))
    kept, test_kept = np.isin(labels, common), np.isin(test_labels, common)
    features, labels = features[kept], labels[kept]
    test_features, test_labels = test_features[test_kept], test_labels[test_kept]
  results = {}
  for shots in config.shots:
    mean, std = few_shot(features, labels, test_features, test_labels, shots, config.draws, seed,
                         config.l2)
    results |= {f'{shots}shot_accuracy': mean, f'{shots}shot_accuracy_std': std}
  return results


def common_classes(labels: np.ndarray, shots: int) -> np.ndarray:
  """The classes of which `labels` (N,) holds at least `shots`; ConfigError if there are not two."""
  classes, counts = np.unique(labels, return_counts=True)
  common = classes[counts >= shots]
  check(len(common) >= 2, 'probe.shots', shots,
        f'what two classes have (the most frequent has {counts.max()} examples)',
        'Ask for fewer shots.')
  return common


def extract(feature_step: Callable, params: dict, batches: Iterable[dict],
            limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Features and labels of the real examples of some batches.

  Args:
    feature_step: (params, batch) -> (B, D), one row per example of the batch as it stands here: it
      does any placing on devices, and brings home what they have.
    params: of the model.
    batches: dicts of host arrays with 'label' (B,) and 'weight' (B,), 0 for fillers.
    limit: of how many examples, the first; 0: of all.

  Returns:
    (N, D) float64 and (N,) integers.
  """
  features, labels, number = [], [], 0
  for batch in batches:
    real = np.asarray(batch['weight']) > 0
    features.append(np.asarray(feature_step(params, batch), np.float64)[real])
    labels.append(np.asarray(batch['label'])[real])
    number += len(labels[-1])
    if limit and number >= limit:
      break
  features, labels = np.concatenate(features), np.concatenate(labels)
  return (features[:limit], labels[:limit]) if limit else (features, labels)


def few_shot(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray,
             test_labels: np.ndarray, shots: int, draws: int = 5, seed: int = 0,
             l2: float = 1024.0) -> tuple[float, float]:
  """Accuracy of a linear classifier fitted to a few examples of each class.

  Draw d takes, by default_rng([seed, d]), a permutation of each class and its first `shots`: fewer
  shots are part of more.

  Args:
    features: (N, D) to draw from.
    labels: (N,) integers; the classes are those found here.
    test_features, test_labels: (M, D), (M,).
    shots: examples per class.
    draws: times that examples are drawn.
    seed: of the draws.
    l2: ridge penalty.

  Returns:
    Mean over draws of the fraction of test examples whose class has the largest output, and its
    (population) standard deviation.

  Raises:
    ConfigError: a class has fewer than `shots` examples, or is only in the test.
  """
  classes, counts = np.unique(labels, return_counts=True)
  check(counts.min() >= shots, 'probe.shots', shots,
        f'at most {counts.min()}, the examples of class {classes[counts.argmin()]}',
        'Ask for fewer shots.')
  absent = np.setdiff1d(test_labels, classes)
  check(not len(absent), 'probe.examples', f'none of class {absent[0] if len(absent) else ""}',
        'examples of every class that is tested', 'Draw from more, or set probe.drop_rare.')
  accuracies = []
  for draw in range(draws):
    rng = np.random.default_rng([seed, draw])
    chosen = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in classes])
    outputs = ridge(features[chosen], labels[chosen], test_features, classes, l2)
    accuracies.append(np.mean(classes[outputs.argmax(-1)] == test_labels))
  return float(np.mean(accuracies)), float(np.std(accuracies))


def ridge(x: np.ndarray, labels: np.ndarray, test_x: np.ndarray, classes: np.ndarray,
          l2: float) -> np.ndarray:
  """Outputs of a ridge regression onto the classes, as in big_vision's fewshot_lsr.

  Features are standardised (there called whitened) by mean and standard deviation of the N drawn
  examples; targets are 1 for the label and -1 for others. The intercept is not penalised; there it
  is the weight of a constant feature of 100, hence nearly so.

  Args:
    x: (N, D).
    labels: (N,).
    test_x: (M, D).
    classes: (C,).
    l2: penalty on the squared weights, beside the sum of squared errors; 0: least squares, the
      solution of least norm.

  Returns:
    (M, C) float64.
  """
  x, test_x = np.asarray(x, np.float64), np.asarray(test_x, np.float64)
  mean, std = x.mean(0), x.std(0) + STD_FLOOR
  x, test_x = (x - mean) / std, (test_x - mean) / std
  y = 2.0 * (labels[:, None] == classes) - 1.0                      # (N, C)
  N, D = x.shape
  if l2 == 0:
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
  elif N >= D:
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(D), x.T @ y)
  else:   # the same by the dual, N x N
    weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(N), y)
  return test_x @ weights + y.mean(0)   # the intercept, as x is centred
