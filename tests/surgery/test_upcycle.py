"""Upcycling tables on hand-made states of both backbones, with optimizer state of both kinds."""

import numpy as np
import pytest

from moejax import trees
from moejax.config import ConfigError
from moejax.surgery import upcycle
from moejax.surgery.config import InitConfig
from tests.surgery import states
from tests.surgery.states import ADAFACTOR, ADAMW, T5, VIT, E, make_params, make_state, surgery


@pytest.mark.parametrize('config', [ADAMW, ADAFACTOR], ids=['adamw', 'adafactor'])
@pytest.mark.parametrize('mlp', [T5, VIT], ids=['t5', 'vit'])
def test_carry(mlp, config):
  stacks, moe = ('encoder', 'decoder'), {'encoder': (1, 3), 'decoder': (3,)}
  source = make_state(make_params(mlp, {}, stacks), config)
  target = make_state(make_params(mlp, moe, stacks), config, steps=0)
  made, entries = surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)
  assert sorted(made) == sorted(target)
  for path, leaf in made.items():
    assert leaf.shape == target[path].shape and leaf.dtype == target[path].dtype
    if '/moe/experts/' in path:
      for e in range(E):
        np.testing.assert_array_equal(leaf[e], source[path.replace('/moe/experts/', '/mlp/')])
    elif '/moe/router/' in path:
      np.testing.assert_array_equal(leaf, 0 if path.startswith('opt_state/') else 7)
    else:
      np.testing.assert_array_equal(leaf, source[path])
  fates = {(e.target.split('/')[0], e.fate) for e in entries}
  assert fates == {(top, fate) for top in ('params', 'opt_state')
                   for fate in ('copied', 'tiled', 'fresh')} | {('step', 'copied')}
  name = next(iter(mlp))
  counts = f'opt_state/encoder/layers/01/moe/experts/{name}/count'
  np.testing.assert_array_equal(made[counts], [3] * E)
  assert made['opt_state/encoder/layers/01/moe/router/kernel/count'] == 0


def test_reset():
  source = make_state(make_params(VIT, {}), ADAMW)
  target = make_state(make_params(VIT, {'encoder': (2, 3)}), ADAFACTOR, steps=0)
  made, entries = surgery(upcycle.upcycle_rules(source, target, 'reset'), source, target)
  for path in target:
    if path.startswith('opt_state/'):
      np.testing.assert_array_equal(made[path], 0)
  np.testing.assert_array_equal(made['params/encoder/layers/03/moe/experts/wo'][1],
                                source['params/encoder/layers/03/mlp/wo'])
  assert made['step'] == 3
  dropped = [e.sources[0] for e in entries if e.fate == 'dropped']
  assert dropped == sorted(p for p in source if p.startswith('opt_state/'))


def test_layers_that_are_already_moe_are_copied():
  source = make_state(make_params(T5, {'encoder': (1,)}), ADAMW)
  target = make_state(make_params(T5, {'encoder': (1, 3)}, seed=1), ADAMW, steps=0)
  made, entries = surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)
  fate = {e.target: e.fate for e in entries}
  for path in target:
    if '/layers/01/moe/' in path:
      assert fate[path] == 'copied'
      np.testing.assert_array_equal(made[path], source[path])
    if '/layers/03/moe/' in path:
      assert fate[path] == ('tiled' if '/experts/' in path else 'fresh')


def test_only_the_named_layers_are_touched():
  """Layer 1 is not taken for 11, and a later layer does not overwrite an earlier one.

  These are trees without optimizer state, and paths without a prefix.
  """
  source = trees.flatten(make_params(T5, {}, depth=12))
  target = trees.flatten(make_params(T5, {'encoder': (1, 2)}, depth=12))
  made, _ = surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)
  for layer in range(12):
    for name in T5:
      path = f'encoder/layers/{layer:02d}'
      copied = f'{path}/moe/experts/{name}' if layer in (1, 2) else f'{path}/mlp/{name}'
      leaf = made[copied][0] if layer in (1, 2) else made[copied]
      np.testing.assert_array_equal(leaf, source[f'{path}/mlp/{name}'])


@pytest.mark.parametrize('old, new, message', [
    ('/layers/01/', '/layers/1/', 'encoder/layers/01: the parent has neither.*'
                                  'Its layers: encoder/layers/00, encoder/layers/02'),
    ('/01/mlp/wi_up', '/01/mlp/w_up',
     r'01/mlp/w_up -> encoder/layers/01/moe/experts/w_up(.|\n)*experts/wi_up \(3, 4, 6\)')])
def test_misnamed(old, new, message):
  source = {p.replace(old, new): v for p, v in trees.flatten(make_params(T5, {})).items()}
  target = trees.flatten(make_params(T5, {'encoder': (1,)}))
  with pytest.raises(ConfigError, match=message):
    surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)


def test_misfits():
  dense, moe = make_params(T5, {}), make_params(T5, {'encoder': (1,)})
  wide = make_params(T5 | {'wo': (states.F + 1, states.D)}, {'encoder': (1,)})
  deep = make_params(T5, {'encoder': (1,)}, depth=5)
  more = make_params(T5, {'encoder': (1, 2)}, E=E + 1)
  for source, target, message in ((dense, wide, r'tile .*wo \(6, 4\).* -> .*wo \(3, 7, 4\)'),
                                  (dense, deep, r'nothing makes(.|\n)*encoder/layers/04/mlp/wo'),
                                  (moe, more, r"experts of .*/01: got 4, allowed: the parent's 3")):
    source, target = trees.flatten(source), trees.flatten(target)
    with pytest.raises(ConfigError, match=message):
      surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)


def test_nothing_to_upcycle():
  for moe in ({}, {'encoder': (1,)}):
    paths = trees.flatten(make_params(T5, moe))
    with pytest.raises(ConfigError, match='no layer of the model is a new MoE layer'):
      upcycle.upcycle_rules(paths, paths, 'carry')


def test_optimizer_choice():
  dense, moe = make_params(T5, {}), make_params(T5, {'encoder': (1,)})
  bare = trees.flatten({'params': dense})
  with pytest.raises(ConfigError, match="config.init.optimizer: got 'keep'.*carry, reset"):
    InitConfig(mode='upcycle', parent='dense', optimizer='keep')
  with pytest.raises(ConfigError, match="no optimizer state; set config.init.optimizer to 'reset'"):
    upcycle.upcycle_rules(bare, make_state(moe, ADAMW), 'carry')
  target = make_state(moe, ADAMW, steps=0)
  del target['step']
  made, _ = surgery(upcycle.upcycle_rules(bare, target, 'reset'), bare, target)
  assert sorted(made) == sorted(target)


@pytest.mark.parametrize('choice', ['carry', 'reset'])
def test_continue(choice):
  source = make_state(make_params(T5, {'encoder': (1,)}), ADAMW)
  target = make_state(make_params(T5, {'encoder': (1,)}), ADAMW, steps=0)
  made, entries = surgery(upcycle.continue_rules(source, target, choice), source, target)
  for path, leaf in made.items():
    reset = choice == 'reset' and path.startswith('opt_state/')
    np.testing.assert_array_equal(leaf, 0 if reset else source[path])
  fates = {e.fate for e in entries}
  assert fates == ({'copied'} if choice == 'carry' else {'copied', 'fresh', 'dropped'})
