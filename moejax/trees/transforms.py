"""How one new leaf is made: a class per way, each giving any slice of the leaf and no more.

A device requests its own slice, so a leaf larger than memory is never made as a whole; of a leaf
stacked over experts at most one whole expert is in memory besides the slice. Random draws depend on
the seed and the expert alone, not on the slice.

E experts, D model, F hidden units, G shards of an MLP (granularity).
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Transform(abc.ABC):
  """A way to make a new leaf from the leaves of the old tree.

  Attributes:
    fate: its name in receipts.
    with_fresh: whether `make` gets the fresh value of the new leaf as the last of `arrays`.
  """
  fate: ClassVar[str] = ''
  with_fresh: ClassVar[bool] = False

  def fits(self, sources: Sequence[Shape], target: Shape) -> bool:
    """Whether leaves of these shapes can become a leaf of shape `target`.

    Unless a class has another rule: one leaf becomes that of any number of experts.
    """
    return len(target) > 0 and target[1:] == sources[0]

  @abc.abstractmethod
  def make(self, arrays: Sequence[Any], index: Index, like: Any) -> np.ndarray:
    """One slice of the new leaf.

    Args:
      arrays: the sources.
      index: the slice.
      like: anything with the new leaf's shape and dtype.

    Returns:
      The values, in any dtype.
    """


@dataclasses.dataclass(frozen=True)
class Copy(Transform):
  """The leaf as it is, or its fresh value as it is."""
  fate: str = 'copied'

  def fits(self, sources, target):
    return all(shape == target for shape in sources)

  def make(self, arrays, index, like):
    return arrays[0][index]


@dataclasses.dataclass(frozen=True)
class Transpose(Transform):
  """The leaf with axes permuted as in np.transpose; () reverses them."""
  axes: tuple[int, ...] = ()
  fate: ClassVar[str] = 'transposed'

  def fits(self, sources, target):
    axes = self.axes or tuple(reversed(range(len(sources[0]))))
    return (sorted(axes) == list(range(len(sources[0])))
            and target == tuple(sources[0][a] for a in axes))

  def make(self, arrays, index, like):
    return np.transpose(arrays[0], self.axes or None)[index]


class Stack(Transform):
  """All sources along a new first axis."""
  fate = 'stacked'

  def fits(self, sources, target):
    return all(target == (len(sources), *shape) for shape in sources)

  def make(self, arrays, index, like):
    return np.stack([a[index[1:]] for a in arrays[index[0]]])


class Tile(Transform):
  """The leaf repeated along a new first axis, to the length that the target has."""
  fate = 'tiled'

  def make(self, arrays, index, like):
    part = arrays[0][index[1:]]
    E = len(_experts(index, like))
    return np.broadcast_to(part, (E, *np.shape(part)))   # a view: one expert is in memory


class Mean(Transform):
  """The average over the first axis, as w0 + mean(w_i - w0): exact if all w_i are equal."""
  fate = 'averaged'

  def fits(self, sources, target):
    return len(sources[0]) > 0 and sources[0][0] > 0 and sources[0][1:] == target

  def make(self, arrays, index, like):
    first = np.asarray(arrays[0][0][index], np.float64)
    total = sum((np.asarray(w[index], np.float64) - first for w in arrays[0]),
                np.zeros_like(first))
    return first + total / len(arrays[0])


@dataclasses.dataclass(frozen=True)
class Slice(Transform):
  """The first hidden units, as many as the target has, times `scale`.

  Attributes:
    axis: of hidden units; None: the leaf has none (wo_bias) and is taken as a whole.
    scale: factor of all values.
  """
  axis: int | None
  scale: float = 1.0
  fate: ClassVar[str] = 'sliced'

  def fits(self, sources, target):
    if self.axis is None:
      return sources[0] == target
    if len(sources[0]) != len(target) or not target:
      return False
    units = target[self.axis]
    return units <= sources[0][self.axis] and _resized(sources[0], self.axis, units) == target

  def make(self, arrays, index, like):
    whole = arrays[0]
    if self.axis is not None:
      whole = _units(whole, self.axis, 0, like.shape[self.axis])
    return _scaled(whole[index], self.scale)


@dataclasses.dataclass(frozen=True)
class Subset(Transform):
  """The first `copies` experts are the source, the others keep their fresh values."""
  copies: int
  fate: ClassVar[str] = 'tiled in part'
  with_fresh: ClassVar[bool] = True

  def fits(self, sources, target):
    return super().fits(sources, target) and self.copies <= target[0]

  def make(self, arrays, index, like):
    out = np.array(arrays[1][index], like.dtype)
    for i, e in enumerate(_experts(index, like)):
      if e < self.copies:
        out[i] = arrays[0][index[1:]]
    return out


class _Experts(Transform):
  """Stacked experts that differ, made one at a time."""

  @abc.abstractmethod
  def expert(self, source: np.ndarray, e: int) -> np.ndarray:
    """The whole leaf of expert e."""

  def make(self, arrays, index, like):
    experts, out = _experts(index, like), None
    for i, e in enumerate(experts):
      part = self.expert(arrays[0], e)[index[1:]]
      if out is None:
        out = np.empty((len(experts), *np.shape(part)), like.dtype)
      out[i] = part
    return out


@dataclasses.dataclass(frozen=True)
class Noise(_Experts):
  """Each expert is the source plus its own N(0, (std * s)^2), s the source's standard deviation.

  Attributes:
    std: relative to s, so that one value suits leaves of all scales; a constant leaf gets no noise.
    seed: integers, of this leaf; the expert's number is appended.
  """
  std: float
  seed: tuple[int, ...]
  fate: ClassVar[str] = 'tiled with noise'

  def expert(self, source, e):
    wide = np.asarray(source, np.float64)
    rng = np.random.default_rng((*self.seed, e))
    return wide + self.std * wide.std() * rng.standard_normal(wide.shape)


@dataclasses.dataclass(frozen=True)
class Reinit(_Experts):
  """Each expert is the source with some hidden units drawn anew (Drop-Upcycling).

  Attributes:
    fraction: r, of the hidden units.
    axis: of hidden units.
    units_seed: integers. They and the number of an expert decide which units it loses, so that all
      leaves of a layer lose one set of units.
    seed: integers, of this leaf, for the new values.
  """
  fraction: float
  axis: int
  units_seed: tuple[int, ...]
  seed: tuple[int, ...]
  fate: ClassVar[str] = 're-initialised'

  def expert(self, source, e):
    out = np.moveaxis(np.array(source, np.float64), self.axis, 0)    # hidden units first
    F = len(out)
    lost = np.random.default_rng((*self.units_seed, e)).permutation(F)[:round(self.fraction * F)]
    if len(lost):
      old = out[lost]
      out[lost] = np.random.default_rng((*self.seed, e)).normal(old.mean(), old.std(), old.shape)
    return np.moveaxis(out, 0, self.axis)


@dataclasses.dataclass(frozen=True)
class Shard(_Experts):
  """Expert e is shard e mod G of the source's hidden units, times `scale`.

  Attributes:
    shards: G.
    axis: of hidden units; None: the leaf has none (wo_bias) and every expert gets all of it.
    scale: factor of all values.
  """
  shards: int
  axis: int | None
  scale: float = 1.0

  @property
  def fate(self) -> str:
    kind = 'tiled' if self.shards == 1 or self.axis is None else 'sharded'
    return kind if self.scale == 1 else f'{kind}, scaled'

  def fits(self, sources, target):
    if self.axis is None:
      return super().fits(sources, target)
    F = sources[0][self.axis]
    return F % self.shards == 0 and target[1:] == _resized(sources[0], self.axis, F // self.shards)

  def expert(self, source, e):
    if self.axis is not None:
      size = source.shape[self.axis] // self.shards
      source = _units(source, self.axis, e % self.shards * size, size)
    return _scaled(source, self.scale)


@dataclasses.dataclass(frozen=True)
class Repeat(Transform):
  """The fresh value's first columns, each repeated G times in succession: a router over shards.

  The G shards of an MLP have equal logits until the router has learnt to distinguish them.
  """
  shards: int
  fate: ClassVar[str] = 'fresh'
  with_fresh: ClassVar[bool] = True

  def fits(self, sources, target):
    return len(target) > 0 and target[-1] % self.shards == 0

  def make(self, arrays, index, like):
    columns = np.arange(like.shape[-1])[index[-1]] // self.shards
    whole = arrays[-1][(slice(None),) * len(like.shape)]
    return np.asarray(whole)[*index[:-1]][..., columns]


def _experts(index: Index, like: Any) -> range:
  """The numbers of the experts in a slice."""
  return range(*index[0].indices(like.shape[0]))


def _units(array: np.ndarray, axis: int, start: int, size: int) -> np.ndarray:
  """A view of hidden units from start to start + size."""
  where = [slice(None)] * array.ndim
  where[axis] = slice(start, start + size)
  return array[tuple(where)]


def _scaled(array: np.ndarray, scale: float) -> np.ndarray:
  return array if scale == 1 else np.asarray(array, np.float64) * scale


def _resized(shape: Shape, axis: int, size: int) -> Shape:
  """shape with `size` in place of the size of one axis."""
  sizes = list(shape)
  sizes[axis] = size
  return tuple(sizes)
