"""Receipts: JSON has every leaf, and so has the text."""

import json

import numpy as np

from moejax.surgery.receipt import Receipt
from moejax.trees import rules
from moejax.trees.transforms import Tile


def make_receipt() -> Receipt:
  source = {'a/wi': np.ones((2, 3), np.float32), 'b': np.ones(4, np.float32),
            'old': np.ones(5, np.float32), 'step': np.int32(3)}
  target = {'a/experts/wi': np.ones((8, 2, 3), np.float32), 'b': np.ones(4, np.float16),
            'router': np.ones((2, 8), np.float32), 'step': np.int32(0)}
  table = [rules.derive('a/wi', {'a/experts/wi': Tile()}), rules.copy('b|step'),
           rules.fresh('router'), rules.drop('old')]
  _, entries = rules.apply(rules.plan(table, source, target),
                           source.__getitem__, target.__getitem__)
  return Receipt.of(entries, parent='runs/dense', step=3).with_measured(
      parent_loss=1.25).with_measured(step_0_gap=0.1234567891)


def test_json():
  receipt = make_receipt()
  read = json.loads(receipt.to_json())
  # tiled 8*2*3; copied 4 + 1; fresh 2*8; dropped 5
  assert read['counts'] == receipt.counts == {
      'copied': {'leaves': 2, 'scalars': 5}, 'tiled': {'leaves': 1, 'scalars': 48},
      'fresh': {'leaves': 1, 'scalars': 16}, 'dropped': {'leaves': 1, 'scalars': 5}}
  assert read['about'] == {'parent': 'runs/dense', 'step': 3}
  assert read['measured'] == {'parent_loss': 1.25, 'step_0_gap': 0.1234567891}
  assert Receipt.from_json(receipt.to_json()) == receipt


def test_text():
  assert make_receipt().to_text() == '''\
parent: runs/dense
step: 3
parent_loss  1.25
step_0_gap   0.123457

fate     leaves  scalars
copied   2       5
tiled    1       48
fresh    1       16
dropped  1       5

fate     target        shape   dtype               source
tiled    a/experts/wi  8x2x3   float32             a/wi
copied   b             4       float32 -> float16  b
fresh    router        2x8     float32             -
copied   step          scalar  int32               step
dropped  -             5       float32             old
'''
