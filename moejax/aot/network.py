"""Estimates the time of communication on the links of a TPU slice.

A slice is a grid of chips. Links connect each chip to its neighbours along two or three dimensions;
a dimension whose ends are also linked is a ring. The rules are from "How to Scale Your Model"
(jax-ml.github.io/scaling-book, chapters 2 and 3). Latency and other traffic are left out.
"""

import dataclasses
import functools
import math

import numpy as np

from moejax.aot.chips import Chip
from moejax.aot.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Network:
  """The links of a slice, and the place of each device of a program.

  Attributes:
    link: bytes per second of one link, both directions together.
    shape: chips along each dimension.
    rings: whether the ends of each dimension are linked.
    places: coordinates of device n of the program.
  """
  link: float
  shape: tuple[int, ...]
  rings: tuple[bool, ...]
  places: tuple[tuple[int, ...], ...]

  def seconds(self, collective: Collective) -> float:
    """Returns the time of one collective, all its repetitions together.

    All-to-alls and permutes send each message the shortest way, one dimension after the other; the
    busiest link decides. Gathers, scatters and sums use all dimensions that a group extends over at
    once (see `bandwidth`): of V bytes, V (n-1)/n must reach each device, twice for a sum.
    """
    n, size = collective.devices, collective.bytes
    groups = tuple(map(tuple, collective.groups.tolist()))
    if collective.kind == 'all-to-all':
      each = self._busiest(groups, True) * size / n / (self.link / 2)
    elif collective.kind == 'collective-permute':
      each = self._busiest(groups, False) * size / (self.link / 2)
    else:
      each = size * (n - 1) / n / min(map(self.bandwidth, groups))
      each *= 2 if collective.kind == 'all-reduce' else 1
    return each * collective.times

  def bandwidth(self, group: tuple[int, ...]) -> float:
    """Returns bytes per second at which each device of a group can receive what the others have.

    Every dimension that the group extends over adds the bandwidth of a link: both directions if the
    group closes a ring, else one, as at the ends of a line. If a group takes every k-th chip, k
    groups share the links.
    """
    total = 0.0
    for size, ring, places in zip(self.shape, self.rings, np.array(
        [self.places[device] for device in group]).T):
      taken = np.unique(places)
      if len(taken) > 1:
        stride = int(np.diff(taken).max())
        closed = ring and len(taken) * stride == size
        total += (self.link if closed else self.link / 2) / stride
    return total

  @functools.lru_cache(maxsize=256)   # noqa: B019  as long as the report is made
  def _busiest(self, groups: tuple[tuple[int, ...], ...], all_pairs: bool) -> float:
    """Returns the number of messages over the busiest direction of a link.

    Args:
      groups: devices that send to each other.
      all_pairs: each sends one to each other device of its group; else the first to the second.
    """
    sources, targets = [], []
    for group in np.asarray(groups):
      n = len(group)
      sources.append(np.repeat(group, n) if all_pairs else group[:1])
      targets.append(np.tile(group, n) if all_pairs else group[1:])
    places = np.asarray(self.places)
    now, to = places[np.concatenate(sources)].copy(), places[np.concatenate(targets)]
    busiest = 0.0
    for dim in range(len(self.shape)):
      busiest = max(busiest, self._along(dim, now, to[:, dim]))
      now[:, dim] = to[:, dim]
    return busiest

  def _along(self, dim: int, now: np.ndarray, to: np.ndarray) -> float:
    """Messages over the busiest link when they go from `now` (N, dims) to `to` (N,) along dim."""
    size, ring = self.shape[dim], self.rings[dim]
    line = np.ravel_multi_index(np.delete(now, dim, 1).T, np.delete(self.shape, dim))
    load = np.zeros((math.prod(self.shape) // size, size, 2))
    ahead = (to - now[:, dim]) % size if ring else to - now[:, dim]
    for way, hops in ((1, ahead), (-1, (size - ahead) if ring else -ahead)):
      other = size - hops if ring else np.full_like(hops, size)
      part = np.where(hops < other, 1.0, np.where(hops == other, 0.5, 0.0)) * (to != now[:, dim])
      for hop in range(size):
        going = (hop < hops) & (part > 0)
        link = (now[:, dim] + way * hop - (way < 0)) % size   # link n is between n and n + 1
        np.add.at(load, (line[going], link[going], (way < 0) + 0), part[going])
    return float(load.max())


def of(chip: Chip, devices) -> Network:
  """Returns the network of a slice.

  Args:
    chip: its kind.
    devices: of the topology, in the order in which the program numbers them.
  """
  places = np.array([d.coords for d in devices])[:, :chip.torus]
  shape = tuple((places.max(0) + 1).tolist())
  if chip.torus == 3:   # v4 and v5p: cubes of 4 x 4 x 4, whose switches close every dimension
    rings = (all(size % 4 == 0 for size in shape),) * 3
  else:                 # v5e and v6e: only the whole side of a pod is closed
    rings = tuple(size == 16 for size in shape)
  return Network(chip.link, shape, rings, tuple(map(tuple, places.tolist())))
