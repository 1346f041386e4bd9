"""Paths, masks, differences and counts of nested dicts."""

import numpy as np
import pytest

from moejax import trees

TREE = {'b': {'kernel': np.zeros((2, 3)), 'bias': np.zeros(3)}, 'a': {'x': {'scale': np.zeros(())}}}


def test_flatten_sorts_by_path_and_unflatten_undoes_it():
  flat = trees.flatten(TREE)
  assert list(flat) == ['a/x/scale', 'b/bias', 'b/kernel']
  assert flat['b/kernel'] is TREE['b']['kernel']
  assert trees.unflatten(flat) == TREE
  # A leaf may be a dict, as telemetry is.
  assert trees.unflatten({'a/01': {'load': 1}, 'a/03': {'load': 2}}) == {
      'a': {'01': {'load': 1}, '03': {'load': 2}}}


@pytest.mark.parametrize('key', [0, 'a/b'])
def test_flatten_refuses_keys_that_break_paths(key):
  with pytest.raises(ValueError, match=f"tree key {key!r} under 'layers'"):
    trees.flatten({'layers': {key: np.zeros(1)}})


def test_map_with_path_takes_subtrees_of_the_rest():
  moments = {'b': {'kernel': {'mu': 5, 'nu': 6}, 'bias': {'mu': 7, 'nu': 8}},
           'a': {'x': {'scale': {'mu': 9, 'nu': 10}}}}
  ndim = {'b': {'kernel': 2, 'bias': 1}, 'a': {'x': {'scale': 0}}}
  seen = trees.map_with_path(lambda path, leaf, n, s: (path, leaf.ndim == n, s['mu']),
                             TREE, ndim, moments)
  assert seen == {'b': {'kernel': ('b/kernel', True, 5), 'bias': ('b/bias', True, 7)},
                  'a': {'x': {'scale': ('a/x/scale', True, 9)}}}


def test_diff_names_every_leaf_not_shared():
  assert trees.diff(TREE, TREE) == []
  other = {'b': {'kernel': np.zeros((3, 2)), 'bias': np.ones(3)}, 'c': np.zeros(4)}
  assert trees.diff(TREE, other) == [
      'only in the first: a/x/scale ()', 'only in the second: c (4,)',
      'shapes differ: b/kernel (2, 3) and (3, 2)']


def test_count():
  assert trees.count(TREE) == 2 * 3 + 3 + 1
