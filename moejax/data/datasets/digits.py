"""Handwritten digits from scikit-learn, 8 x 8 pixels: a small target of transfer."""

import numpy as np

from moejax.data.config import DataConfig
from moejax.data.image import ImageTable, choose_labels, grey_source
from moejax.data.source import Source


def load(config: DataConfig) -> Source:
  """The 1,797 digits, split 1,297 / 250 / 250 by a fixed permutation.

  Raises:
    ConfigError: config.image takes or skips more than ten classes.
  """
  from sklearn.datasets import load_digits
  digits = load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = choose_labels(config, 10)[digits.target]
  order = np.random.default_rng(0).permutation(len(labels))
  splits = {}
  for name, numbers in zip(('train', 'validation', 'test'),
                           np.split(order, [len(order) - 500, len(order) - 250])):
    numbers = numbers[labels[numbers] >= 0]
    splits[name] = ImageTable(images[numbers], labels[numbers])
  return grey_source(splits, int(labels.max()) + 1)
