"""Nested dicts of arrays as flat tables of 'a/b/c' paths.

Checkpoints, surgery, sharding and parameter groups all name a leaf by its path, so that a regular
expression selects one set of leaves everywhere.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Tree = Any  # nested dicts with str keys and array leaves


def flatten(tree: Tree) -> dict[str, Any]:
  """Nested dict -> {'a/b/c': leaf}, sorted by path. ValueError if a key is no str or has '/'."""
  flat = {}

  def visit(node, prefix):
    if not isinstance(node, Mapping):
      flat['/'.join(prefix)] = node
      return
    for key, child in node.items():
      if not isinstance(key, str) or '/' in key:
        raise ValueError(f'tree key {key!r} under {"/".join(prefix)!r}: need a str without "/"')
      visit(child, (*prefix, key))

  visit(tree, ())
  return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict:
  """{'a/b/c': leaf} -> nested dict; the inverse of flatten."""
  tree: dict = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def map_with_path(fn: Callable, tree: Tree, *rest: Tree) -> dict:
  """A tree of fn('a/b/c', leaf, *values), values being what the trees `rest` have at that path."""
  def visit(node, others, prefix):
    if not isinstance(node, Mapping):
      return fn('/'.join(prefix), node, *others)
    return {k: visit(v, [o[k] for o in others], (*prefix, k)) for k, v in node.items()}
  return visit(tree, rest, ())


def diff(a: Tree, b: Tree) -> list[str]:
  """A line for each leaf whose path or shape is not in both a and b; [] if there is none."""
  a, b = flatten(a), flatten(b)
  lines = [f'only in the first: {p} {tuple(a[p].shape)}' for p in a if p not in b]
  lines += [f'only in the second: {p} {tuple(b[p].shape)}' for p in b if p not in a]
  lines += [f'shapes differ: {p} {tuple(a[p].shape)} and {tuple(b[p].shape)}'
            for p in a if p in b and tuple(a[p].shape) != tuple(b[p].shape)]
  return lines


def count(tree: Tree) -> int:
  """The number of scalars in all leaves."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
