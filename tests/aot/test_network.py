"""Times on the links of slices that are known by hand."""

import itertools
import types

import numpy as np
import pytest

from moejax.aot import chips, network
from moejax.aot.collectives import Collective

SIZE = 1e9


def slice_of(name: str) -> network.Network:
  """The network of a slice whose devices are numbered along its last dimension first."""
  kind, _, shape = name.partition(':')
  sides = [range(int(side)) for side in shape.split('x')]
  places = [types.SimpleNamespace(coords=(*place, 0)[:3]) for place in itertools.product(*sides)]
  return network.of(chips.CHIPS[kind], places)


def seconds(links, kind, groups, size=SIZE):
  return links.seconds(Collective(kind, size, np.asarray(groups), 1, ''))


def everyone(links):
  return np.arange(len(links.places))[None]


@pytest.mark.parametrize('name, rings', [
    ('v5e:4x4', (False, False)), ('v5e:8x16', (False, True)), ('v5e:16x16', (True, True)),
    ('v5p:2x2x4', (False,) * 3), ('v5p:2x4x4', (False,) * 3), ('v5p:4x4x8', (True,) * 3)])
def test_which_dimensions_are_closed(name, rings):
  assert slice_of(name).rings == rings


@pytest.mark.parametrize('name, factor', [
    ('v5e:16x16', 16 / 4),    # rings of 16: n V / 4 W, both dimensions at once
    ('v5e:4x4', 4 / 2),       # lines of 4: twice what a ring would take
    ('v5e:4x8', 8 / 2),       # the longer one decides
    ('v5p:4x4x4', 4 / 4), ('v5p:4x4x8', 8 / 4), ('v5p:2x2x2', 2 / 2)])
def test_all_to_all_over_a_slice(name, factor):
  links = slice_of(name)
  assert seconds(links, 'all-to-all', everyone(links)) == pytest.approx(factor * SIZE / links.link)


def test_all_to_all_in_boxes_stays_in_them():
  links = slice_of('v5p:4x4x4')
  halves = np.arange(64).reshape(2, 32)                      # 2 x 4 x 4: a line of 2, rings of 4
  assert seconds(links, 'all-to-all', halves) == pytest.approx(SIZE / links.link)
  apart = np.arange(64).reshape(2, 2, 16).swapaxes(0, 1).reshape(2, 32)   # planes 0 and 2, 1 and 3
  # In each ring of 4, half of what all have goes two links on, either way round.
  assert seconds(links, 'all-to-all', apart) == pytest.approx(SIZE / links.link)


def by_hand(links, pairs):
  """The busiest link, one message after the other, walked hop by hop."""
  load = {}
  for source, target in pairs:
    here, end = list(links.places[source]), links.places[target]
    for dim, size in enumerate(links.shape):
      ahead = (end[dim] - here[dim]) % size
      if links.rings[dim]:
        ways = [(1, ahead)] if 2 * ahead < size else [(-1, size - ahead)]
        ways = [(1, ahead), (-1, ahead)] if 2 * ahead == size else ways
      else:
        distance = end[dim] - here[dim]
        ways = [(1 if distance > 0 else -1, abs(distance))]
      for way, hops in ways:
        at = list(here)
        for _ in range(hops):
          key = (dim, way, tuple(at))
          load[key] = load.get(key, 0) + 1 / len(ways)
          at[dim] = (at[dim] + way) % size
      here[dim] = end[dim]
  return max(load.values())


@pytest.mark.parametrize('name', ['v5e:4x4', 'v5e:2x16', 'v5p:2x4x4', 'v5p:4x4x4'])
def test_any_messages_as_walked_one_by_one(name):
  links = slice_of(name)
  n = len(links.places)
  order = np.random.default_rng(0).permutation(n)
  groups = order.reshape(-1, 4)
  pairs = [(a, b) for group in groups for a in group for b in group]
  assert seconds(links, 'all-to-all', groups) == pytest.approx(
      by_hand(links, pairs) * SIZE / 4 / (links.link / 2))
  pairs = np.stack([np.arange(n), order], 1)
  assert seconds(links, 'collective-permute', pairs) == pytest.approx(
      by_hand(links, pairs) * SIZE / (links.link / 2))


@pytest.mark.parametrize('name, groups, bandwidth', [
    ('v5p:4x4x4', np.arange(64)[None], 3),                # three closed rings, a link's each
    ('v5p:4x4x8', np.arange(128).reshape(16, 8), 1),      # one ring of 8
    ('v5e:4x4', np.arange(16)[None], 1),                  # a corner has two links, one way each
    ('v5e:4x4', np.arange(16).reshape(4, 4), 0.5),        # the end of a line
    ('v5e:4x4', np.arange(16).reshape(8, 2), 0.5),
    ('v5p:4x4x4', np.arange(64).reshape(16, 2, 2).swapaxes(1, 2).reshape(32, 2), 0.5),  # 0 and 2
    ('v5e:4x4', np.arange(16).reshape(4, 2, 2).swapaxes(1, 2).reshape(8, 2), 0.25),     # a line's
])
def test_bandwidth_of_groups(name, groups, bandwidth):
  links = slice_of(name)
  share = (groups.shape[1] - 1) / groups.shape[1]
  expected = SIZE * share / (bandwidth * links.link)
  assert seconds(links, 'all-gather', groups) == pytest.approx(expected)
  assert seconds(links, 'reduce-scatter', groups) == pytest.approx(expected)
  assert seconds(links, 'all-reduce', groups) == pytest.approx(2 * expected)
