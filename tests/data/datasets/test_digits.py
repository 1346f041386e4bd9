"""Handwritten digits: their splits, and how many classes there are to choose from."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from moejax import data
from moejax.config import ConfigError
from moejax.data import image, pipeline
from moejax.data.datasets import digits


def load(**settings):
  return digits.load(data.DataConfig(source='digits', image=data.ImageConfig(**settings)))


def test_digits_are_split_once_and_for_all():
  source = load()
  assert [len(source.splits[s]) for s in ('train', 'validation', 'test')] == [1297, 250, 250]
  given = np.concatenate([s.images.reshape(len(s), -1) for s in source.splits.values()])
  expected = np.round(load_digits().data * 255 / 16).astype(np.uint8)
  np.testing.assert_array_equal(np.unique(given, axis=0), np.unique(expected, axis=0))


@pytest.mark.parametrize('settings, words', [
    ({'skip_classes': -1}, ('data.image.skip_classes: got -1', '0 or more')),
    ({'skip_classes': 9}, ('data.image.skip_classes: got 9', 'at most 8 of the 10 classes')),
    ({'skip_classes': 10}, ('data.image.skip_classes: got 10',)),
    ({'skip_classes': 4, 'classes': 7},
     ('data.image.classes: got 7', 'at most 6 for digits without the first 4')),
    ({'classes': 11}, ('data.image.classes: got 11', 'at most 10 for digits. ')),
])
def test_more_classes_than_there_are(settings, words):
  with pytest.raises(ConfigError) as error:
    load(**settings)
  assert all(word in str(error.value) for word in words), error.value


def test_classes_are_taken_and_skipped_in_the_order_of_a_fixed_permutation():
  """So fewer classes are among more, and a run can take those that another never saw."""
  order = np.random.default_rng(0).permutation(10)
  chosen = lambda **settings: image.choose_labels(
      data.DataConfig(source='digits', image=data.ImageConfig(**settings)), 10)[order].tolist()
  assert chosen(classes=4) == [0, 1, 2, 3, *[-1] * 6]
  assert chosen(skip_classes=4) == [*[-1] * 4, 0, 1, 2, 3, 4, 5]
  assert chosen(skip_classes=4, classes=2) == [*[-1] * 4, 0, 1, *[-1] * 4]
  assert chosen() == order.tolist()   # all: by their own numbers


def test_classes_to_skip_are_in_the_fingerprint_only_when_there_are_some():
  """A result from before the setting existed keeps its fingerprint."""
  source = load()

  def fingerprint(**settings):
    config = data.DataConfig(source='digits', image=data.ImageConfig(**settings))
    return pipeline._fingerprint(config, source)
  # As the code before the setting made it, from scikit-learn's digits at the default settings.
  assert fingerprint() == 'f61e28d1e0f6302d93f958e9d8202726e56e8b3deebf56dcf56167cc53568bd8'
  assert len({fingerprint(), fingerprint(skip_classes=2), fingerprint(skip_classes=3)}) == 3
