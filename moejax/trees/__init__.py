"""Nested dicts of arrays: paths of leaves, stacked blocks, rules from one tree to another."""

from moejax.trees.paths import Tree, count, diff, flatten, map_with_path, unflatten

__all__ = ['Tree', 'count', 'diff', 'flatten', 'map_with_path', 'unflatten']
