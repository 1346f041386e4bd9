"""Rule tables that turn one flat tree of arrays into another, leaf by leaf and strictly.

    planned = plan([copy('a/.*'), derive('b', {'experts/b': Tile()}), fresh('router')], old, new)
    new_tree, entries = apply(planned, read, make_fresh)

`plan` checks a table as a whole against the shapes of both sides before anything is read: exactly
one rule must take each source leaf, and exactly one must make each target leaf. A name that matches
nothing is an error, never a leaf that silently keeps its random values.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.trees import transforms
from moejax.trees.transforms import Index, Transform

FATES = ('copied', 'repeated', 'tiled', 'tiled, scaled', 'tiled in part', 'tiled with noise',
         're-initialised', 'sharded', 'sharded, scaled', 'sliced', 'stacked', 'transposed',
         'averaged', 'fresh', 'dropped')   # of a leaf, in the order of receipts
Make = Callable[[Index], np.ndarray]
Place = Callable[[str, Make, tuple[int, ...], Any], Any]
_LISTED = 5   # leaves that a message lists per kind of problem


@dataclasses.dataclass(frozen=True)
class Rule:
  """What becomes of the leaves whose whole path a regular expression matches.

  The functions below make rules.

  Attributes:
    kind: name of the function, for messages.
    source: regular expression for source paths; '' of 'fresh'.
    targets: templates of target paths (`\\1` is the first group of source), each a leaf of its own;
      () of 'drop'. 'fresh': a regular expression for target paths.
    how: a transform for each target, or for the dropped leaf.
  """
  kind: str
  source: str
  targets: tuple[str, ...]
  how: tuple[Transform, ...]

  def __str__(self):
    return f'{self.kind} {" -> ".join(repr(p) for p in (self.source, *self.targets) if p)}'


@dataclasses.dataclass(frozen=True)
class Entry:
  """What happened to one leaf.

  Attributes:
    target: path in the new tree; '' if dropped.
    sources: paths in the old tree; () if fresh.
    fate: one of FATES.
    shape: the target's, or the source's if dropped.
    dtype: the target's, or the source's if dropped.
    source_dtype: the source's where it differs (a cast between float types), else ''.
  """
  target: str
  sources: tuple[str, ...]
  fate: str
  shape: tuple[int, ...]
  dtype: str
  source_dtype: str = ''


@dataclasses.dataclass(frozen=True)
class Move:
  """A target leaf to make, or a source leaf to drop.

  Attributes:
    rule: which rule requires it.
    sources: paths of the source leaves, in the order in which `how` takes them.
    target: path of the target leaf; '' to drop.
    how: the transform that makes it.
  """
  rule: Rule
  sources: tuple[str, ...]
  target: str
  how: Transform

  @property
  def needs_fresh(self) -> bool:
    """Whether the target leaf is new, or new in part."""
    return bool(self.target) and (self.how.with_fresh or not self.sources)


def copy(source: str, target: str | tuple[str, ...] = r'\g<0>') -> Rule:
  """The leaf as it is, by default under its old path; or under several paths."""
  targets = (target,) if isinstance(target, str) else target
  how = transforms.Copy('copied' if len(targets) == 1 else 'repeated')
  return Rule('copy', source, targets, (how,) * len(targets))


def derive(source: str, targets: Mapping[str, Transform]) -> Rule:
  """One or more leaves made from the leaf: {template of a target: how it is made}.

  A target of Stack is made from all leaves with this target, in natural order of their paths.
  """
  return Rule('derive', source, tuple(targets), tuple(targets.values()))


def fresh(target: str, how: Transform | None = None) -> Rule:
  """Target leaves without a source.

  Args:
    target: regular expression for target paths.
    how: a transform of the fresh values; None: they stay as they are.
  """
  return Rule('fresh', '', (target,), (how or transforms.Copy('fresh'),))


def drop(source: str) -> Rule:
  """Source leaves that nothing is made of."""
  return Rule('drop', source, (), (transforms.Copy('dropped'),))


def on_host(path: str, make: Make, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """A `place` that makes a numpy array."""
  del path, dtype
  return np.array(make((slice(None),) * len(shape)))


@dataclasses.dataclass(frozen=True)
class Plan:
  """A table that accounts for every leaf of both sides, for `apply`; `plan` makes it.

  Attributes:
    moves: one for each target leaf, in order of its path, then one for each dropped leaf.
    source_shapes, target_shapes: {path: anything with shape and dtype}.
  """
  moves: tuple[Move, ...]
  source_shapes: Mapping[str, Any]
  target_shapes: Mapping[str, Any]

  @property
  def fresh(self) -> set[str]:
    """Target paths whose leaf is new, or new in part."""
    return {move.target for move in self.moves if move.needs_fresh}


def apply(planned: Plan, read: Callable[[str], np.ndarray], make_fresh: Callable[[str], Any],
          place: Place = on_host) -> tuple[dict[str, Any], list[Entry]]:
  """Makes the target tree, one leaf after the other.

  Args:
    planned: from `plan`.
    read: source path -> numpy array; called once for each leaf that is used.
    make_fresh: target path -> array, for the leaves of `planned.fresh`; or anything with shape,
      dtype and numpy's slices.
    place: (path, make, shape, dtype) -> the target leaf, where make(index) returns the values of a
      slice. `lambda path, make, shape, dtype: jax.make_array_from_callback(shape, sharding[path],
      make)` puts each shard on its devices without the whole leaf on the host.

  Returns:
    {path: leaf} of the target, and an Entry for every target leaf and every dropped leaf.

  Raises:
    ConfigError: an array does not have the shape that `plan` was given.
  """
  source_shapes, target_shapes = planned.source_shapes, planned.target_shapes
  target, entries = {}, []
  for moves in _by_sources(planned.moves):
    if not moves[0].target:
      [path] = moves[0].sources
      leaf = source_shapes[path]
      entries.append(Entry('', (path,), moves[0].how.fate, tuple(leaf.shape), str(leaf.dtype)))
      continue
    read_once = [_check_read(p, read(p), source_shapes[p]) for p in moves[0].sources]
    for move in moves:
      like, arrays = target_shapes[move.target], read_once
      if move.needs_fresh:
        arrays = [*arrays, _check_read(move.target, make_fresh(move.target), like)]
      target[move.target] = place(move.target, _maker(move.how, arrays, like), tuple(like.shape),
                                  like.dtype)
      cast = str(arrays[0].dtype) if arrays[0].dtype != like.dtype else ''
      entries.append(Entry(move.target, move.sources, move.how.fate, tuple(like.shape),
                           str(like.dtype), cast))
  return (dict(sorted(target.items())),
          sorted(entries, key=lambda e: (not e.target, e.target, e.sources)))


def _by_sources(moves: Iterable[Move]) -> list[list[Move]]:
  """Moves grouped by their sources, so that each source is read once."""
  shared = defaultdict(list)
  for move in moves:
    shared[move.sources or move.target].append(move)
  return list(shared.values())


def plan(rules: Iterable[Rule], source_shapes: Mapping[str, Any],
         target_shapes: Mapping[str, Any]) -> Plan:
  """Checks a table against the shapes of both sides and reads nothing.

  Args:
    rules: the table; the order of rules does not matter.
    source_shapes, target_shapes: {path: anything with shape and dtype}.

  Raises:
    ConfigError: no rule takes a source leaf, or two do; nothing makes a target leaf, or two rules
      do; a target does not exist; a shape or dtype does not fit; a rule matches nothing. The
      message lists all kinds of problems with their number and first leaves, parameters before
      optimizer state.
  """
  problems: dict[str, list[str]] = defaultdict(list)
  taken, moves = defaultdict(list), []
  for rule in rules:
    matched = _match(rule, source_shapes, target_shapes)
    if not matched:
      problems['rules that match nothing'].append(str(rule))
    moves += matched
    for path in {p for move in matched for p in move.sources}:
      taken[path].append(rule)

  made = defaultdict(list)
  for move in (m for m in moves if m.target):
    made[move.target].append(move)
    if move.target not in target_shapes:
      problems['leaves sent to a target that does not exist'].append(
          f'{", ".join(move.sources)} -> {move.target}')
    elif problem := _misfit(move, source_shapes, target_shapes):
      problems['shapes or dtypes that do not fit'].append(problem)
  for path, leaf in source_shapes.items():
    if len(taken[path]) > 1:
      problems['source leaves taken twice'].append(
          f'{path}: by {"; by ".join(map(str, taken[path]))}')
    elif not taken[path]:
      problems['source leaves that no rule takes'].append(_show(path, leaf))
  for path, leaf in target_shapes.items():
    if len(made[path]) > 1:
      origins = [', '.join(m.sources) or str(m.rule) for m in made[path]]
      problems['target leaves made twice'].append(f'{path}: from {"; from ".join(origins)}')
    elif not made[path]:
      problems['target leaves that nothing makes'].append(_show(path, leaf))
  if problems:
    raise ConfigError(_message(problems))
  moves.sort(key=lambda m: (not m.target, m.target, m.sources))
  return Plan(tuple(moves), source_shapes, target_shapes)


def _match(rule: Rule, source_shapes: Mapping, target_shapes: Mapping) -> list[Move]:
  """The moves that one rule requires."""
  if rule.kind == 'fresh':
    return [Move(rule, (), path, *rule.how) for path in target_shapes
            if re.fullmatch(*rule.targets, path)]
  matches = [(path, m) for path in source_shapes if (m := re.fullmatch(rule.source, path))]
  if rule.kind == 'drop':
    return [Move(rule, (path,), '', *rule.how) for path, _ in matches]
  moves, stacks = [], defaultdict(list)
  for path, m in matches:
    for template, how in zip(rule.targets, rule.how):
      if isinstance(how, transforms.Stack):
        stacks[m.expand(template), how].append(path)
      else:
        moves.append(Move(rule, (path,), m.expand(template), how))
  return moves + [Move(rule, tuple(sorted(paths, key=_natural)), target, how)
                  for (target, how), paths in stacks.items()]


def _natural(path: str) -> list:
  """A sort key that puts block.2 before block.10."""
  return [(0, int(part), '') if part.isdigit() else (1, 0, part)
          for part in re.split(r'(\d+)', path) if part]


def _misfit(move: Move, source_shapes: Mapping, target_shapes: Mapping) -> str:
  """Why the sources cannot become the target, or ''."""
  like = target_shapes[move.target]
  leaves = [source_shapes[path] for path in move.sources]
  fits = move.how.fits([tuple(leaf.shape) for leaf in leaves], tuple(like.shape))
  for path, leaf in zip(move.sources, leaves):
    floats = all(jax.numpy.issubdtype(x.dtype, jax.numpy.floating) for x in (leaf, like))
    if not fits or (leaf.dtype != like.dtype and not floats):
      many = f' (x{len(leaves)})' if len(leaves) > 1 else ''
      kind = move.rule.kind if move.rule.kind != 'derive' else type(move.how).__name__.lower()
      return f'{kind} {_show(path, leaf)}{many} -> {_show(move.target, like)}'
  return '' if fits else f'{move.rule}: {_show(move.target, like)}'


def _maker(how: Transform, arrays: list, like: Any) -> Make:
  """A function from an index to that slice of the target, which makes nothing else."""
  return lambda index: np.asarray(how.make(arrays, index, like), like.dtype)


def _check_read(path: str, array: Any, like: Any) -> Any:
  """Returns array. Raises ConfigError unless it has the shape of `like`."""
  if tuple(array.shape) != tuple(like.shape):
    raise ConfigError(f'{path}: read an array of shape {tuple(array.shape)}, '
                      f'expected {tuple(like.shape)}')
  return array


def _show(path: str, leaf: Any) -> str:
  return f'{path} {tuple(leaf.shape)} {leaf.dtype}'


def _message(problems: Mapping[str, list[str]]) -> str:
  lines = ['surgery: the rules do not account for every leaf of both sides; nothing was made.']
  for kind, items in problems.items():
    first = sorted(items, key=lambda item: 'opt_state/' in item)[:_LISTED]
    lines += [f'{kind} ({len(items)}):', *(f'  {item}' for item in first)]
    if len(items) > _LISTED:
      lines.append(f'  ... and {len(items) - _LISTED} more')
  return '\n'.join(lines)
