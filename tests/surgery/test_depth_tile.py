"""Depth tiling on hand-made states: order of the blocks, optimizer state, and refusals."""

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.surgery import upcycle
from tests.surgery.states import ADAFACTOR, ADAMW, T5, VIT, make_params, make_state, surgery

STACKS = ('encoder', 'decoder')


def tile(source, target, tiling='stack', optimizer='carry'):
  return surgery(upcycle.depth_tile_rules(source, target, optimizer, tiling), source, target)


@pytest.mark.parametrize('config', [ADAMW, ADAFACTOR], ids=['adamw', 'adafactor'])
@pytest.mark.parametrize('tiling, order', [('stack', [0, 1, 2, 0, 1, 2]),
                                           ('layer', [0, 0, 1, 1, 2, 2])])
def test_order(tiling, order, config):
  source = make_state(make_params(T5, {'encoder': (1,)}, STACKS, depth=3), config)
  new_moe = {'encoder': [i for i, old in enumerate(order) if old == 1]}
  target = make_state(make_params(T5, new_moe, STACKS, depth=6, seed=1), config, steps=0)
  made, entries = tile(source, target, tiling)
  assert sorted(made) == sorted(target)
  for path, leaf in made.items():
    old = path
    for new, parent in enumerate(order):
      if f'/layers/{new:02d}/' in path:
        old = path.replace(f'/layers/{new:02d}/', f'/layers/{parent:02d}/')
    np.testing.assert_array_equal(leaf, source[old], err_msg=path)
  for e in entries:
    assert e.fate == ('repeated' if '/layers/' in e.target else 'copied')


def test_more_than_nine_blocks_and_stacks_of_different_depth():
  source = make_state(make_params(VIT, {}, depth=4), ADAMW)
  target = make_state(make_params(VIT, {}, depth=12, seed=1), ADAMW, steps=0)
  made, _ = tile(source, target, 'layer')
  for new in range(12):
    for name in VIT:
      np.testing.assert_array_equal(made[f'params/encoder/layers/{new:02d}/mlp/{name}'],
                                    source[f'params/encoder/layers/{new // 3:02d}/mlp/{name}'])
  both = make_params(T5, {}, STACKS, depth=2)
  deeper = {'encoder': make_params(T5, {}, depth=4)['encoder']}
  made, _ = tile(make_state(both, ADAMW), make_state(both | deeper, ADAMW, steps=0))
  assert sum(path.endswith('wo/mu') for path in made) == 4 + 2


def test_reset():
  source = make_state(make_params(VIT, {}, depth=2), ADAFACTOR)
  target = make_state(make_params(VIT, {}, depth=4), ADAMW, steps=0)
  made, entries = tile(source, target, optimizer='reset')
  assert not any(np.any(leaf) for path, leaf in made.items() if path.startswith('opt_state/'))
  np.testing.assert_array_equal(made['params/encoder/layers/03/mlp/wi'],
                                source['params/encoder/layers/01/mlp/wi'])
  assert {e.fate for e in entries} == {'copied', 'repeated', 'fresh', 'dropped'}


def test_refusals():
  state = lambda depth, moe=(): make_state(make_params(T5, {'encoder': moe}, depth=depth), ADAMW)
  for old, new, message in (
      (state(2), state(5), "blocks of encoder: got 5, allowed: a multiple of the parent's 2"),
      (state(4), state(2), 'blocks of encoder: got 2'),
      (state(2), state(2), 'allowed: a model with more blocks.*continue'),
      (state(2), state(4, (3,)), r'does not exist(.|\n)*layers/03/mlp(.|\n)*nothing makes')):
    with pytest.raises(ConfigError, match=message):
      tile(old, new)
