"""How experts start, on hand-made states: values, optimizer state, and refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import trees
from moejax.config import ConfigError
from moejax.surgery import upcycle
from moejax.surgery.config import ExpertInit
from tests.surgery import states
from tests.surgery.states import ADAFACTOR, ADAMW, T5, VIT, make_params, make_state, surgery

E = 4
LAYER = 'encoder/layers/01'
BIASED = T5 | {'wi_gate_bias': (6,), 'wi_up_bias': (6,), 'wo_bias': (4,)}
OPTIMIZERS = pytest.mark.parametrize('config', [ADAMW, ADAFACTOR], ids=['adamw', 'adafactor'])


def upcycled(mlp, config, optimizer='carry', init=None, moe=(1,), **sizes):
  """(source, made, entries): a dense parent and what became of it, flat."""
  source = make_state(make_params(mlp, {}), config)
  target = make_state(make_params(mlp, {'encoder': moe}, E=E, **sizes), config, steps=0)
  table = upcycle.upcycle_rules(source, target, optimizer, init or ExpertInit())
  made, entries = surgery(table, source, target)
  assert sorted(made) == sorted(target)
  return source, made, entries


def experts(made, name, layer=LAYER, top='params'):
  return made[f'{top}/{layer}/moe/experts/{name}']


def parent_of(path):
  return path.replace('/moe/experts/', '/mlp/')


def check_optimizer_state(source, made, copied):
  """copied(name of the leaf, e): whether expert e's is the parent's; otherwise it is 0."""
  checked = 0
  for path, leaf in made.items():
    m = re.fullmatch(r'opt_state/.+/moe/experts/([^/]+)/\w+', path)
    for e in range(E) if m else ():
      checked += 1
      np.testing.assert_array_equal(leaf[e], source[parent_of(path)] if copied(m[1], e) else 0,
                                    err_msg=path)
    if '/moe/' not in path:
      np.testing.assert_array_equal(leaf, source[path])
    elif '/router/' in path:
      np.testing.assert_array_equal(leaf, 0 if path.startswith('opt_state') else 7, err_msg=path)
  assert checked


def first_updates(made, config):
  """Largest change of each expert leaf in a first update at rate 1, (E,) per name."""
  state = states.nested(made)
  grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), state['params'])
  new, _ = states.update(config, grads, state['opt_state'], state['params'], 1.0)
  return {p.split('/')[-1]: np.abs(leaf - made[f'params/{p}']).reshape(E, -1).max(1)
          for p, leaf in trees.flatten(new).items() if f'{LAYER}/moe/experts/' in p}


@OPTIMIZERS
def test_random(config):
  source, made, entries = upcycled(VIT, config, init=ExpertInit('random'))
  for name in VIT:
    np.testing.assert_array_equal(experts(made, name), 7)
  check_optimizer_state(source, made, lambda name, e: False)
  dropped = {e.sources[0] for e in entries if e.fate == 'dropped'}
  assert dropped == {p for p in source if f'{LAYER}/mlp/' in p}


@OPTIMIZERS
def test_subset(config):
  """Copies keep their moments and counts, fresh experts start from zero."""
  source, made, entries = upcycled(T5, config, init=ExpertInit('subset', copied_experts=3))
  for name in T5:
    for e in range(E):
      expected = source[f'params/{LAYER}/mlp/{name}'] if e < 3 else 7
      np.testing.assert_array_equal(experts(made, name)[e], expected)
    np.testing.assert_array_equal(experts(made, f'{name}/count', top='opt_state'), [3, 3, 3, 0])
  check_optimizer_state(source, made, lambda name, e: e < 3)
  assert {e.fate for e in entries if '/experts/' in e.target} == {'tiled in part'}


def test_a_fresh_expert_moves_at_most_lr_in_its_first_update():
  """Adam's first step is 1 with no history; a count without moments would make it 1.6 and more."""
  _, made, _ = upcycled(T5, ADAMW, init=ExpertInit('subset', copied_experts=3))
  for moved in first_updates(made, ADAMW).values():
    assert 0.9 < moved[3] <= 1.001
  _, made, _ = upcycled(T5, ADAMW, init=ExpertInit('drop'))
  for moved in first_updates(made, ADAMW).values():
    assert (moved > 0.9).all() and (moved <= 1.001).all()


@OPTIMIZERS
def test_noise(config):
  source, made, entries = upcycled(BIASED, config, init=ExpertInit('noise', noise_std=0.01))
  for name in BIASED:
    old, new = source[f'params/{LAYER}/mlp/{name}'], experts(made, name)
    added = (new - old) / old.std()
    assert (np.abs(added).reshape(E, -1).max(1) > 0.002).all() and np.abs(added).max() < 0.05
    assert not np.isclose(added[0], added[1]).all()
  check_optimizer_state(source, made, lambda name, e: True)
  assert {e.fate for e in entries if e.target.startswith(f'params/{LAYER}/moe/experts')} == {
      'tiled with noise'}
  wi, up = (experts(made, n) - source[f'params/{LAYER}/mlp/{n}'] for n in ('wi_gate', 'wi_up'))
  assert abs(np.corrcoef(wi.ravel(), up.ravel())[0, 1]) < 0.5   # noise of their own


def lost_units(made, source, layer, e):
  """{leaf: the hidden units in which expert e differs from the MLP}."""
  found = {}
  for name in BIASED:
    new, old = experts(made, name, layer)[e], source[f'params/{layer}/mlp/{name}']
    if name == 'wo_bias':
      np.testing.assert_array_equal(new, old)
    else:
      changed = (new != old) if new.ndim == 1 else (new != old).T if name != 'wo' else new != old
      changed = changed.reshape(6, -1)
      assert (changed.all(1) == changed.any(1)).all()   # a unit is drawn anew as a whole
      found[name] = tuple(np.flatnonzero(changed.any(1)))
  return found


@OPTIMIZERS
def test_drop_shares_one_set_of_units(config):
  source, made, entries = upcycled(BIASED, config, init=ExpertInit('drop'), moe=(1, 3))
  sets = {}
  for layer in (LAYER, 'encoder/layers/03'):
    for e in range(E):
      units = set(lost_units(made, source, layer, e).values())
      assert len(units) == 1 and len(*units) == 3   # r = 0.5 of 6, the same ones in all matrices
      sets[layer, e] = units.pop()
  assert len(set(sets.values())) > 4   # experts differ, layers differ
  assert [sets[LAYER, e] for e in range(E)] != [sets['encoder/layers/03', e] for e in range(E)]
  check_optimizer_state(source, made, lambda name, e: name == 'wo_bias')
  fates = {e.target: e.fate for e in entries}
  assert fates[f'params/{LAYER}/moe/experts/wo'] == 're-initialised'
  assert fates[f'params/{LAYER}/moe/experts/wo_bias'] == 'tiled'
  assert fates[f'opt_state/{LAYER}/moe/experts/wo/count'] == 'fresh'


def test_drop_redraws_matrices_independently_and_by_seed():
  init = ExpertInit('drop', reinit_fraction=1.0)
  source, made, _ = upcycled(T5, ADAMW, init=init)
  gate, up = experts(made, 'wi_gate'), experts(made, 'wi_up')
  assert not np.isclose(gate, source[f'params/{LAYER}/mlp/wi_gate']).any()   # r = 1 redraws all
  assert abs(np.corrcoef(gate.ravel(), up.ravel())[0, 1]) < 0.5
  assert not np.isin(gate[0], gate[1]).any()   # nor a permutation of another expert's
  again = upcycled(T5, ADAMW, init=init)[1]
  np.testing.assert_array_equal(experts(again, 'wi_gate'), gate)
  other = upcycled(T5, ADAMW, init=ExpertInit('drop', reinit_fraction=1.0, seed=1))[1]
  assert not np.isclose(experts(other, 'wi_gate'), gate).any()
  alone = upcycled(T5, ADAMW, init=init, moe=(0, 1, 2))[1]   # other layers change nothing here
  np.testing.assert_array_equal(experts(alone, 'wi_gate'), gate)


@OPTIMIZERS
def test_drop_of_nothing_is_a_copy(config):
  _, dropped, entries = upcycled(BIASED, config, init=ExpertInit('drop', reinit_fraction=0.0))
  _, copied, expected = upcycled(BIASED, config)
  jax.tree.map(np.testing.assert_array_equal, dropped, copied)
  assert entries == expected


@OPTIMIZERS
@pytest.mark.parametrize('init', [ExpertInit(), ExpertInit('random'), ExpertInit('subset', 2)],
                         ids=lambda init: init.experts)
def test_shared_experts_are_the_first_units(init, config):
  source, made, entries = upcycled(VIT, config, init=init, shared=3)
  fates = {e.target: e.fate for e in entries}
  for name, first in (('wi', np.s_[:, :3]), ('wi_bias', np.s_[:3]), ('wo', np.s_[:3]),
                      ('wo_bias', np.s_[:])):
    share = 0.5 if name == 'wo_bias' else 1   # three of the six units, half of the bias
    path = f'params/{LAYER}/moe/shared/{name}'
    np.testing.assert_array_equal(made[path], share * source[f'params/{LAYER}/mlp/{name}'][first])
    assert fates[path] == 'sliced'
  assert not any(np.any(v) for p, v in made.items() if re.match('opt_state/.+/shared/', p))
  assert sum(bool(re.match('opt_state/.+/shared/.+/count', p)) for p in made) == len(VIT)


def test_other_layers_of_an_moe_sparse():
  """Layer 1 was sparse and becomes dense, layer 3 the other way round, layer 0 stays."""
  source = make_state(make_params(VIT, {'encoder': (0, 1)}), ADAMW)
  target = make_state(make_params(VIT, {'encoder': (0, 3)}, seed=1), ADAMW, steps=0)
  made, entries = surgery(upcycle.upcycle_rules(source, target, 'carry'), source, target)
  fates = {e.target: e.fate for e in entries if e.target}
  for name in VIT:
    old = source[f'params/{LAYER}/moe/experts/{name}']
    np.testing.assert_allclose(made[f'params/{LAYER}/mlp/{name}'], old.mean(0), rtol=1e-5,
                               atol=1e-6)
    assert fates[f'params/{LAYER}/mlp/{name}'] == 'averaged'
    for moment in ('mu', 'nu', 'count'):
      assert fates[f'opt_state/{LAYER}/mlp/{name}/{moment}'] == 'fresh'
      assert not np.any(made[f'opt_state/{LAYER}/mlp/{name}/{moment}'])
    np.testing.assert_array_equal(made[f'params/encoder/layers/03/moe/experts/{name}'][2],
                                  source[f'params/encoder/layers/03/mlp/{name}'])
  for path in source:
    if '/layers/00/' in path:
      np.testing.assert_array_equal(made[path], source[path])
  dropped = {e.sources[0] for e in entries if e.fate == 'dropped'}
  assert f'params/{LAYER}/moe/router/kernel' in dropped
  assert all('/layers/01/moe/' in path for path in dropped)


def test_averaging_undoes_upcycling():
  """Dense -> sparse -> dense is the parent bit for bit; no layer need be new."""
  source, made, _ = upcycled(T5, ADAFACTOR)
  back, _ = surgery(upcycle.upcycle_rules(made, source, 'carry'), made, source)
  for path in (path for path in source if path.startswith('params/')):
    np.testing.assert_array_equal(back[path], source[path], err_msg=path)


@OPTIMIZERS
@pytest.mark.parametrize('optimizer', ['carry', 'reset'])
def test_a_new_head(optimizer, config):
  source = make_state(make_params(T5, {}), config)
  for moe in ((), (1,)):
    target = make_state(make_params(T5, {'encoder': moe}, E=E, classes=9), config, steps=0)
    make = upcycle.upcycle_rules if moe else upcycle.continue_rules
    made, entries = surgery(make(source, target, optimizer, new_head=True), source, target)
    np.testing.assert_array_equal(made['params/head/kernel'], np.full((4, 9), 7))
    for path in made:
      if path.startswith('opt_state/') and ('head/' in path or optimizer == 'reset'):
        np.testing.assert_array_equal(made[path], 0)
      elif '/moe/' not in path and 'head/' not in path:
        np.testing.assert_array_equal(made[path], source[path])
    assert ('', ('params/head/kernel',), 'dropped') in {
        (e.target, e.sources, e.fate) for e in entries}
    with pytest.raises(ConfigError, match=r'copy params/head/kernel \(4, 5\).*\(4, 9\)'):
      surgery(make(source, target, optimizer), source, target)


SETTINGS = [
    (dict(experts='copies'), "config.init.experts: got 'copies'.*Did you mean 'copy'"),
    (dict(scaling='wo'), 'config.init.scaling'),
    (dict(experts='subset'), "config.init.copied_experts: got 0, allowed: above 0"),
    (dict(copied_experts=2), "config.init.copied_experts: got 2.*0 otherwise"),
    (dict(experts='noise'), 'config.init.noise_std: got 0.0, allowed: above 0'),
    (dict(experts='noise', noise_std=-1.0), 'config.init.noise_std: got -1.0'),
    (dict(noise_std=0.1), 'config.init.noise_std: got 0.1'),
    (dict(experts='drop', reinit_fraction=1.5), 'config.init.reinit_fraction: got 1.5'),
    (dict(reinit_fraction=0.25), "config.init.reinit_fraction.*unless experts='drop'"),
    (dict(experts='drop', scaling='all'), "config.init.scaling: got 'all', allowed: 'none'"),
]


@pytest.mark.parametrize('settings, message', SETTINGS)
def test_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    ExpertInit(**settings)


def test_layers_that_do_not_fit():
  for init, sizes, message in (
      (ExpertInit('subset', 4), {}, f'copied_experts: got 4, allowed: fewer than the 4 .*{LAYER}'),
      (ExpertInit('subset', 2), dict(G=2), "experts: got 'subset'.*2 times narrower"),
      (ExpertInit('drop'), dict(G=2), "experts: got 'drop'.*2 times narrower"),
      (ExpertInit(), dict(G=3), f'experts of params/{LAYER}: got 4, allowed: a multiple of .*3'),
      (ExpertInit(), dict(shared=12), r'shared experts of .*: got 12, allowed: at most the 6'),
      (ExpertInit(scaling='output'), {}, "scaling: got 'output', allowed: 'none' in encoder")):
    with pytest.raises(ConfigError, match=message):
      upcycled(T5, ADAMW, init=init, **sizes)
  sparse = make_state(make_params(T5, {'encoder': (1,)}, shared=6), ADAMW)
  dense = make_state(make_params(T5, {}), ADAMW, steps=0)
  with pytest.raises(ConfigError, match='shared experts.*Keep it sparse'):
    upcycle.upcycle_rules(sparse, dense, 'carry')
  more = make_state(make_params(T5, {'encoder': (1,)}, E=E), ADAMW)
  few = make_state(make_params(T5, {'encoder': (1,)}), ADAMW, steps=0)
  with pytest.raises(ConfigError, match=f"experts of params/{LAYER}: got 3, allowed: the parent's"):
    upcycle.continue_rules(more, few, 'carry')
