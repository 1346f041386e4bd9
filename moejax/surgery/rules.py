"""Rule tables that turn one flat tree of arrays into another, leaf by leaf and strictly.

A table is checked as a whole against the shapes of both sides before anything is read: every
source leaf must be taken by exactly one rule, every target leaf made by exactly one. What fails to
match is an error, never a leaf that silently keeps its random values.

E experts.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moejax.config import ConfigError, check_choice

FATES = {'copy': 'copied', 'tile': 'tiled', 'stack': 'stacked', 'transpose': 'transposed',
         'fresh': 'fresh', 'drop': 'dropped'}
Index = tuple[slice, ...]
Make = Callable[[Index], np.ndarray]
Place = Callable[[str, Make, tuple[int, ...], Any], Any]
_LISTED = 20  # leaves listed per kind of problem


@dataclasses.dataclass(frozen=True)
class Rule:
  """What becomes of the leaves whose whole path a regular expression matches.

  Attributes:
    kind: 'copy'; 'tile': repeated along a new first axis, as often as the target's shape says;
      'stack': all leaves with the same target, in natural order of their paths, along a new first
      axis; 'transpose'; 'fresh': a new value; 'drop'.
    source: regular expression on source paths; unused by 'fresh'.
    target: template of the target path (`\\1` is the first group of source); for 'fresh' a
      regular expression on target paths; unused by 'drop'.
    axes: 'transpose' only, as numpy's; () reverses all axes.
  """
  kind: str
  source: str = ''
  target: str = ''
  axes: tuple[int, ...] = ()

  def __post_init__(self):
    check_choice('rule.kind', self.kind, FATES)

  def __str__(self):
    return f'{self.kind} {" -> ".join(repr(p) for p in (self.source, self.target) if p)}'


@dataclasses.dataclass(frozen=True)
class Entry:
  """What happened to one leaf.

  Attributes:
    target: path in the new tree; '' if dropped.
    sources: paths in the old tree; () if fresh.
    fate: 'copied', 'tiled', 'stacked', 'transposed', 'fresh' or 'dropped'.
    shape: the target's, or the source's if dropped.
    dtype: as shape.
    source_dtype: the source's where it differs (a cast between float types), else ''.
  """
  target: str
  sources: tuple[str, ...]
  fate: str
  shape: tuple[int, ...]
  dtype: str
  source_dtype: str = ''


@dataclasses.dataclass(frozen=True)
class _Step:
  """One target leaf to make (or, with target '', one source leaf to drop)."""
  rule: Rule
  sources: tuple[str, ...]
  target: str


def copy(source: str, target: str = r'\g<0>') -> Rule:
  """The leaf as it is, by default under the same path."""
  return Rule('copy', source, target)


def tile(source: str, target: str) -> Rule:
  """The leaf repeated along a new first axis."""
  return Rule('tile', source, target)


def stack(source: str, target: str) -> Rule:
  """Several leaves along a new first axis."""
  return Rule('stack', source, target)


def transpose(source: str, target: str, axes: Iterable[int] = ()) -> Rule:
  """The leaf with its axes permuted."""
  return Rule('transpose', source, target, tuple(axes))


def fresh(target: str) -> Rule:
  """Target leaves that no source leaf becomes."""
  return Rule('fresh', target=target)


def drop(source: str) -> Rule:
  """Source leaves that become nothing."""
  return Rule('drop', source)


def on_host(path: str, make: Make, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """The `place` that makes a numpy array."""
  del path, dtype
  return np.array(make((slice(None),) * len(shape)))


def apply(rules: Iterable[Rule], source_shapes: Mapping[str, Any], target_shapes: Mapping[str, Any],
          read: Callable[[str], np.ndarray], make_fresh: Callable[[str], Any],
          place: Place = on_host) -> tuple[dict[str, Any], list[Entry]]:
  """Makes the target tree, one leaf after the other.

  Args:
    rules: the table; the order of rules means nothing.
    source_shapes: {path: anything with shape and dtype}.
    target_shapes: likewise.
    read: source path -> numpy array; called once for each leaf that is used.
    make_fresh: target path -> array, for the leaves of 'fresh' rules.
    place: (path, make, shape, dtype) -> the target leaf, where make(index) gives the values of one
      slice; `lambda path, make, shape, dtype: jax.make_array_from_callback(shape, sharding[path],
      make)` puts each shard where it belongs without E copies of it on the host.

  Returns:
    ({path: leaf} of the target, an Entry for every leaf of either side).

  Raises:
    ConfigError: the table does not account for both sides; see `plan`.
  """
  target, entries = {}, []
  for step in plan(rules, source_shapes, target_shapes):
    fate = FATES[step.rule.kind]
    if not step.target:
      leaf = source_shapes[step.sources[0]]
      entries.append(Entry('', step.sources, fate, tuple(leaf.shape), str(leaf.dtype)))
      continue
    like = target_shapes[step.target]
    arrays = [_check_read(p, read(p), source_shapes[p]) for p in step.sources]
    if not step.sources:
      arrays = [_check_read(step.target, np.asarray(make_fresh(step.target)), like)]
    make = _maker(step.rule, arrays, like)
    target[step.target] = place(step.target, make, tuple(like.shape), like.dtype)
    cast = str(arrays[0].dtype) if arrays[0].dtype != like.dtype else ''
    entries.append(Entry(step.target, step.sources, fate, tuple(like.shape), str(like.dtype), cast))
  return target, entries


def plan(rules: Iterable[Rule], source_shapes: Mapping[str, Any],
         target_shapes: Mapping[str, Any]) -> list[_Step]:
  """Checks a table against both sides, reading nothing.

  Returns:
    Steps in order of target path, dropped leaves last.

  Raises:
    ConfigError: a source leaf that no rule takes, or two; a target leaf that nothing makes, or two
      things; a target that does not exist; a shape or dtype that does not fit; a rule that matches
      nothing. All of them are listed, with the leaves of both sides.
  """
  problems: dict[str, list[str]] = defaultdict(list)
  taken, steps = defaultdict(list), []
  for rule in rules:
    matched = _match(rule, source_shapes, target_shapes)
    if not matched:
      problems['rules that match nothing'].append(str(rule))
    steps += matched
    for path in (p for step in matched for p in step.sources):
      taken[path].append(rule)

  made = defaultdict(list)
  for step in (s for s in steps if s.target):
    made[step.target].append(step)
    if step.target not in target_shapes:
      problems['leaves sent to a target that does not exist'].append(
          f'{", ".join(step.sources)} -> {step.target}')
    elif problem := _misfit(step, source_shapes, target_shapes):
      problems['shapes or dtypes that do not fit'].append(problem)
  for path, leaf in source_shapes.items():
    if len(taken[path]) > 1:
      problems['source leaves taken twice'].append(
          f'{path}: by {"; by ".join(map(str, taken[path]))}')
    elif not taken[path]:
      problems['source leaves that no rule takes'].append(_show(path, leaf))
  for path, leaf in target_shapes.items():
    if len(made[path]) > 1:
      origins = [', '.join(s.sources) or str(s.rule) for s in made[path]]
      problems['target leaves made twice'].append(f'{path}: from {"; from ".join(origins)}')
    elif not made[path]:
      problems['target leaves that nothing makes'].append(_show(path, leaf))
  if problems:
    raise ConfigError(_message(problems))
  return sorted(steps, key=lambda s: (not s.target, s.target, s.sources))


def _match(rule: Rule, source_shapes: Mapping, target_shapes: Mapping) -> list[_Step]:
  """The steps that one rule asks for."""
  if rule.kind == 'fresh':
    return [_Step(rule, (), path) for path in target_shapes if re.fullmatch(rule.target, path)]
  found = [(path, m) for path in source_shapes if (m := re.fullmatch(rule.source, path))]
  if rule.kind == 'drop':
    return [_Step(rule, (path,), '') for path, _ in found]
  if rule.kind != 'stack':
    return [_Step(rule, (path,), m.expand(rule.target)) for path, m in found]
  groups = defaultdict(list)
  for path, m in found:
    groups[m.expand(rule.target)].append(path)
  return [_Step(rule, tuple(sorted(paths, key=_natural)), target)
          for target, paths in groups.items()]


def _natural(path: str) -> list:
  """Sort key by which block.2 comes before block.10."""
  return [(0, int(part), '') if part.isdigit() else (1, 0, part)
          for part in re.split(r'(\d+)', path) if part]


def _misfit(step: _Step, source_shapes: Mapping, target_shapes: Mapping) -> str:
  """Why the sources cannot become the target, or ''."""
  like = target_shapes[step.target]
  shape = tuple(like.shape)
  for path in step.sources:
    leaf = source_shapes[path]
    given = tuple(leaf.shape)
    if step.rule.kind == 'transpose':
      axes = step.rule.axes or tuple(reversed(range(len(given))))
      fits = sorted(axes) == list(range(len(given))) and shape == tuple(given[a] for a in axes)
    elif step.rule.kind == 'tile':
      fits = len(shape) > 0 and shape[1:] == given
    elif step.rule.kind == 'stack':
      fits = shape == (len(step.sources), *given)
    else:
      fits = shape == given
    floats = all(jax.numpy.issubdtype(x.dtype, jax.numpy.floating) for x in (leaf, like))
    if not fits or (leaf.dtype != like.dtype and not floats):
      many = f' (x{len(step.sources)})' if len(step.sources) > 1 else ''
      return f'{step.rule.kind} {_show(path, leaf)}{many} -> {_show(step.target, like)}'
  return ''


def _maker(rule: Rule, arrays: list[np.ndarray], like: Any) -> Make:
  """index -> the values of that slice of the target, without making the rest of it."""
  if rule.kind == 'transpose':
    arrays = [np.transpose(arrays[0], rule.axes or None)]

  def make(index):
    if rule.kind == 'stack':
      part = np.stack([a[index[1:]] for a in arrays[index[0]]])
    elif rule.kind == 'tile':
      E = len(range(*index[0].indices(like.shape[0])))
      part = arrays[0][index[1:]]
      part = np.broadcast_to(part, (E, *np.shape(part)))  # a view: one expert in memory
    else:
      part = arrays[0][index]
    return np.asarray(part, like.dtype)

  return make


def _check_read(path: str, array: np.ndarray, like: Any) -> np.ndarray:
  """array, if it has the announced shape."""
  if tuple(array.shape) != tuple(like.shape):
    raise ConfigError(f'{path}: read an array of shape {tuple(array.shape)}, '
                      f'expected {tuple(like.shape)}')
  return array


def _show(path: str, leaf: Any) -> str:
  return f'{path} {tuple(leaf.shape)} {leaf.dtype}'


def _message(problems: Mapping[str, list[str]]) -> str:
  lines = ['surgery: the rules do not account for every leaf of both sides; nothing was made.']
  for kind, items in problems.items():
    lines.append(f'{kind} ({len(items)}):')
    lines += [f'  {item}' for item in items[:_LISTED]]
    if len(items) > _LISTED:
      lines.append(f'  ... and {len(items) - _LISTED} more')
  return '\n'.join(lines)
