"""Blocks whose parameters are stacked, so that one `lax.scan` runs them.

Deep models repeat: 24 dense blocks, or 12 times a dense and a sparse one. Unrolled, the compiler
works through each block; scanned, through one repetition. The name of a stacked block lists its
single blocks: '01+2x12' is 01, 03, ..., 23 (from 01, every 2nd, 12 of them). Its leaves have a
leading axis of 12. So the path of a leaf shows whether it is stacked.

Parameters and optimizer state are stacked from the first step to the last. Checkpoints, surgery and
receipts have single blocks only, and so do not depend on how a run stacks them.

N single blocks in a stacked one.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from moejax import trees

_NAME = re.compile(r'(\d+)\+(\d+)x(\d+)')
_BLOCK = re.compile(r'(.*?)(\w+/layers/\d+)(/.*)')   # before a single block, the block, within it


def name(first: int, stride: int, count: int) -> str:
  """The name of the blocks first, first + stride, ...; of a single block its number: '05'."""
  return f'{first:02d}' if count == 1 else f'{first:02d}+{stride}x{count}'


def repeats(kinds: Sequence[Hashable]) -> list[tuple[int, int, int]]:
  """Cuts a stack into repetitions.

  Args:
    kinds: of each block; blocks of one kind have parameters of the same paths and shapes.

  Returns:
    [(first block, blocks in the pattern, number of repetitions)], which cover the stack in order.
    Each covers as many blocks as possible (greedily), with the shortest such pattern. A block that
    does not repeat is (block, 1, 1).
  """
  result, first = [], 0
  while first < len(kinds):
    best = (1, 1)
    for period in range(1, (len(kinds) - first) // 2 + 1):
      pattern, count = kinds[first:first + period], 1
      while kinds[first + count * period:first + (count + 1) * period] == pattern:
        count += 1
      if count > 1 and period * count > best[0] * best[1]:
        best = (period, count)
    result.append((first, *best))
    first += best[0] * best[1]
  return result


def names(kinds: Sequence[Hashable]) -> list[list[str]]:
  """The names of the stacked blocks of each repetition in `repeats`, a list per repetition."""
  return [[name(first + i, period, count) for i in range(period)]
          for first, period, count in repeats(kinds)]


def members(path: str) -> list[str]:
  """The paths of the single leaves in a stacked one, in order; [path] if it is not stacked."""
  match = _NAME.search(path)
  if not match:
    return [path]
  first, stride, count = map(int, match.groups())
  return [f'{path[:match.start()]}{first + i * stride:02d}{path[match.end():]}'
          for i in range(count)]


def is_stacked(path: str) -> bool:
  """Whether the leaf at this path has a leading axis of blocks."""
  return bool(_NAME.search(path))


def stacked_paths(paths: Iterable[str], param_paths: Iterable[str]) -> list[str]:
  """The paths of the leaves into which leaves of single blocks are stacked, each once.

  Args:
    paths: of parameters ('params/encoder/layers/01/mlp/wo') or optimizer state.
    param_paths: of all parameters, with stacked blocks ('encoder/layers/01+2x12/mlp/wo').
  """
  stacked = {member: block for path in param_paths if (match := _NAME.search(path))
             for block in [path[:match.end()]] for member in members(block)}
  result = {}
  for path in paths:
    match = _BLOCK.fullmatch(path)
    block = stacked.get(match[2]) if match else None
    result[f'{match[1]}{block}{match[3]}' if block else path] = None
  return list(result)


def unstack(tree: trees.Tree, split: Callable[[str, Any], list]) -> dict:
  """The tree with single blocks in place of stacked ones.

  Args:
    tree: nested dict; leaves of stacked blocks have a leading axis N.
    split: (stacked path, leaf) -> list of its N single leaves.
  """
  flat = {}
  for path, leaf in trees.flatten(tree).items():
    flat |= zip(members(path), split(path, leaf) if is_stacked(path) else [leaf])
  return trees.unflatten(flat)


def stack(tree: trees.Tree, param_paths: Iterable[str], join: Callable[[str, list], Any]) -> dict:
  """The inverse of `unstack`.

  Args:
    tree: nested dict with single blocks, which is emptied, so that arrays are freed once joined.
    param_paths: as in `stacked_paths`.
    join: (stacked path, list of its N single leaves) -> one leaf with a leading axis N.
  """
  flat = trees.flatten(tree)
  for node in [tree, *(node for node in tree.values() if isinstance(node, dict))]:
    node.clear()
  stacked = {}
  for path in stacked_paths(list(flat), param_paths):
    leaves = [flat.pop(member) for member in members(path)]
    stacked[path] = join(path, leaves) if is_stacked(path) else leaves[0]
  return trees.unflatten(stacked)
