"""data.eval_repeats: the same examples with other draws; test_seen is one more held-out set."""

import numpy as np

from moejax import data
from moejax.data import DataConfig, ImageConfig
from moejax.data.datasets import embedded

CONFIG = dict(image=ImageConfig(classes=64), eval_examples=24, eval_batch_size=16)


def evaluated(split='validation', **changes):
  batches = list(data.build(DataConfig(**CONFIG, **changes), seed=0).eval_batches(split))
  return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def test_repeats_show_the_same_examples_with_other_distortions():
  once, thrice = evaluated(), evaluated(eval_repeats=3)
  assert once['weight'].sum() == 24 and thrice['weight'].sum() == 72
  labels, images = thrice['label'][:72].reshape(3, 24), thrice['image'][:72].reshape(3, 24, -1)
  np.testing.assert_array_equal(labels, np.broadcast_to(once['label'][:24], (3, 24)))
  np.testing.assert_array_equal(images[0], once['image'][:24].reshape(24, -1))
  assert (np.abs(images[1] - images[0]).max(axis=1) > 0.1).all()
  assert (np.abs(images[2] - images[1]).max(axis=1) > 0.1).all()


def test_repeats_are_part_of_the_fingerprint_and_one_repeat_is_not():
  one, three = (data.build(DataConfig(**CONFIG, eval_repeats=n), seed=0) for n in (1, 3))
  assert one.fingerprint == data.build(DataConfig(**CONFIG), seed=0).fingerprint
  assert one.fingerprint != three.fingerprint


def test_every_glyph_is_in_one_split_and_held_out_classes_keep_two_to_learn_from():
  config = DataConfig(image=ImageConfig(classes=64))
  splits = embedded.glyphs(config, 0).splits
  table = embedded._glyph_table(config)
  points, klass = np.unique(table['code_point'], return_inverse=True)
  chosen = embedded._choose_classes(config, len(points))[klass] >= 0
  assert list(splits) == ['train', 'validation', 'test_seen', 'test']
  assert sum(len(s.labels) for s in splits.values()) == chosen.sum()
  counts = np.bincount(splits['train'].labels, minlength=64)
  for name in ('validation', 'test_seen'):
    assert len(splits[name].labels) > 10
    assert all(counts[label] >= 2 for label in splits[name].labels)
