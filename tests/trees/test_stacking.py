"""Names of stacked blocks, and trees stacked and unstacked by hand."""

import numpy as np
import pytest

from moejax.trees import stacking


@pytest.mark.parametrize('kinds, names', [
    ([0] * 4, [['00+1x4']]),
    ([0, 32] * 12, [['00+2x12', '01+2x12']]),
    ([0] * 6 + [32] * 6, [['00+1x6'], ['06+1x6']]),
    ([0, 0, 0, 8] * 3 + [0], [['00+4x3', '01+4x3', '02+4x3', '03+4x3'], ['12']]),
    ([0, 8], [['00'], ['01']]),
    ([4, 8, 8, 16], [['00'], ['01+1x2'], ['03']]),   # another number of experts is another kind
    ([7], [['00']]),
])
def test_what_repeats_is_named_together(kinds, names):
  assert stacking.names(kinds) == names
  blocks = sorted(block for repetition in names for name in repetition
                  for block in stacking.members(name))
  assert blocks == [f'{i:02d}' for i in range(len(kinds))]


def test_a_name_lists_its_blocks():
  assert stacking.members('encoder/layers/01+2x3/moe/wo/nu') == [
      f'encoder/layers/{i}/moe/wo/nu' for i in ('01', '03', '05')]
  assert stacking.members('encoder/layers/01/moe/wo') == ['encoder/layers/01/moe/wo']
  assert stacking.members('layers/98+1x3/w')[2] == 'layers/100/w'
  assert stacking.is_stacked('layers/98+1x3/w') and not stacking.is_stacked('layers/98/w')


PATHS = ['encoder/layers/00+2x2/a', 'encoder/layers/01+2x2/b', 'encoder/layers/04/a',
        'decoder/layers/00+1x2/a', 'head/kernel']
SINGLE = {
    'encoder': {'layers': {'00': {'a': 0}, '01': {'b': 1}, '02': {'a': 2}, '03': {'b': 3},
                           '04': {'a': 4}}},
    'decoder': {'layers': {'00': {'a': 5}, '01': {'a': 6}}}, 'head': {'kernel': 7}}
STACKED = {
    'encoder': {'layers': {'00+2x2': {'a': [0, 2]}, '01+2x2': {'b': [1, 3]}, '04': {'a': 4}}},
    'decoder': {'layers': {'00+1x2': {'a': [5, 6]}}}, 'head': {'kernel': 7}}


def copy(tree):
  return {k: copy(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_trees_are_stacked_and_unstacked():
  given = copy(SINGLE)
  assert stacking.stack(given, PATHS, lambda path, leaves: leaves) == STACKED
  assert not given                  # so that nothing keeps the single blocks' arrays
  assert stacking.unstack(copy(STACKED), lambda path, leaf: leaf) == SINGLE
  assert stacking.stack(copy(SINGLE), ['head/kernel'], None) == SINGLE


def test_optimizer_state_is_stacked_with_its_parameters():
  state = {'opt_state': {'encoder': {'layers': {f'0{i}': {'ab'[i % 2]: {'nu': np.full(3, i)}}
                                                for i in range(5)}}}}
  stacked = stacking.stack(state, PATHS, lambda path, leaves: np.stack(leaves))
  blocks = stacked['opt_state']['encoder']['layers']
  assert list(blocks) == ['00+2x2', '01+2x2', '04']
  assert blocks['01+2x2']['b']['nu'].tolist() == [[1, 1, 1], [3, 3, 3]]
