"""Rule tables on hand-made trees: plans, values, strictness, and no more memory than a slice."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.trees import rules
from moejax.trees.rules import Entry
from moejax.trees.transforms import Repeat, Stack, Subset, Tile, Transpose


def run(table, source, target, fresh=None, **kwargs):
  """rules.apply on flat dicts of arrays; those of `target` only have the right shapes."""
  return rules.apply(rules.plan(table, source, target), source.__getitem__,
                     lambda path: (fresh or {})[path], **kwargs)


def arange(*shape, dtype=np.float32):
  return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


def test_every_kind():
  source = {'a/w': arange(2, 3), 'a/b': arange(3), 'old/x': arange(1), 'q/kernel': arange(2, 3, 4),
            'h/2/v': arange(2) + 2, 'h/10/v': arange(2) + 10, 'n': np.int32(3)}
  target = {'a/w': arange(2, 3), 'e/b': arange(4, 3), 'q': arange(4, 2, 3), 'h/v': arange(2, 2),
            'router': arange(2, 4), 'm': arange(4, dtype=np.int32)}
  table = [rules.copy('a/w'), rules.derive('a/(b)', {r'e/\1': Tile()}), rules.drop('old/.*'),
           rules.derive('(q)/kernel', {r'\1': Transpose((2, 0, 1))}),
           rules.derive(r'h/\d+/v', {'h/v': Stack()}), rules.fresh('router'),
           rules.derive('n', {'m': Tile()})]
  random = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
  made, entries = run(table, source, target, {'router': random})
  assert list(made) == sorted(target)
  np.testing.assert_array_equal(made['a/w'], source['a/w'])
  np.testing.assert_array_equal(made['e/b'], [[0, 1, 2]] * 4)
  np.testing.assert_array_equal(made['h/v'], [[2, 3], [10, 11]])  # 2 before 10
  assert made['q'][3, 1, 2] == source['q/kernel'][1, 2, 3]
  np.testing.assert_array_equal(made['router'], random)
  np.testing.assert_array_equal(made['m'], [3, 3, 3, 3])
  assert made['m'].dtype == np.int32
  assert entries == [
      Entry('a/w', ('a/w',), 'copied', (2, 3), 'float32'),
      Entry('e/b', ('a/b',), 'tiled', (4, 3), 'float32'),
      Entry('h/v', ('h/2/v', 'h/10/v'), 'stacked', (2, 2), 'float32'),
      Entry('m', ('n',), 'tiled', (4,), 'int32'),
      Entry('q', ('q/kernel',), 'transposed', (4, 2, 3), 'float32'),
      Entry('router', (), 'fresh', (2, 4), 'float32'),
      Entry('', ('old/x',), 'dropped', (1,), 'float32')]


def test_a_plan_lists_a_move_per_leaf_and_which_are_fresh():
  """Targets in order, then dropped leaves; new in part counts as fresh. Nothing is read."""
  source = {'w': arange(2, 3), 'v': arange(3), 'old': arange(1)}
  target = {'z': arange(2, 3), 'y': arange(2, 3), 'experts': arange(4, 3), 'router': arange(2, 4)}
  planned = rules.plan(
      [rules.drop('old'), rules.copy('w', ('z', 'y')), rules.fresh('router', Repeat(2)),
       rules.derive('v', {'experts': Subset(1)})], source, target)
  assert [(move.target, move.sources, move.how.fate) for move in planned.moves] == [
      ('experts', ('v',), 'tiled in part'), ('router', (), 'fresh'), ('y', ('w',), 'repeated'),
      ('z', ('w',), 'repeated'), ('', ('old',), 'dropped')]
  assert [str(move.rule) for move in planned.moves] == [
      "derive 'v' -> 'experts'", "fresh 'router'", "copy 'w' -> 'z' -> 'y'",
      "copy 'w' -> 'z' -> 'y'", "drop 'old'"]
  assert planned.fresh == {'experts', 'router'}
  assert (planned.source_shapes, planned.target_shapes) == (source, target)
  made, entries = rules.apply(planned, source.__getitem__, target.__getitem__)
  np.testing.assert_array_equal(made['experts'], [[0, 1, 2], *target['experts'][1:]])
  np.testing.assert_array_equal(made['router'], [[0, 0, 1, 1], [4, 4, 5, 5]])
  assert [(e.target, e.sources, e.fate) for e in entries] == [
      (move.target, move.sources, move.how.fate) for move in planned.moves]


def test_casts_between_floats_are_recorded():
  made, [entry] = run([rules.copy('w')], {'w': arange(3)}, {'w': jnp.zeros(3, jnp.bfloat16)})
  assert made['w'].dtype == jnp.bfloat16
  assert (entry.source_dtype, entry.dtype) == ('float32', 'bfloat16')


def test_tiling_does_not_make_the_copies():
  """The slice that place gets is a view of one expert, however many there are."""
  source = {'w': arange(6, 6)}
  made, _ = run([rules.derive('w', {'w': Tile()})], source, {'w': arange(9, 6, 6)},
                place=lambda path, make, shape, dtype: make((slice(None),) * 3))
  assert made['w'].shape == (9, 6, 6) and np.shares_memory(made['w'], source['w'])


def test_each_leaf_is_read_once_and_in_turn():
  source = {'a': arange(2), 'b': arange(2), 'gone': arange(2)}
  target = {'a': arange(2), 'b': arange(2), 'c': arange(2)}
  events = []

  def read(path):
    events.append(f'read {path}')
    return source[path]

  def place(path, make, shape, dtype):
    make((slice(0, 1),)), make((slice(1, 2),))
    events.append(f'placed {path}')

  table = [rules.copy('b'), rules.copy('a', ('a', 'c')), rules.drop('gone')]
  rules.apply(rules.plan(table, source, target), read, None, place)
  assert events == ['read a', 'placed a', 'placed c', 'read b', 'placed b']


W, V = arange(2, 3), arange(3)
STRICT = {
    'source leaf left over': (
        [rules.copy('a')], {'a': W, 'b': V}, {'a': W},
        ['source leaves that no rule takes (1):', 'b (3,) float32']),
    'target leaf that nothing makes': (
        [rules.copy('a')], {'a': W}, {'a': W, 'b': V},
        ['target leaves that nothing makes (1):', 'b (3,) float32']),
    'misspelt: both sides are shown': (
        [rules.copy('.*')], {'layers/1/w': W}, {'layers/01/w': W},
        ['layers/1/w -> layers/1/w', 'target leaves that nothing makes (1):', 'layers/01/w']),
    'two rules on a source leaf': (
        [rules.copy('a'), rules.copy('(a)', 'b')], {'a': W}, {'a': W, 'b': W},
        ['source leaves taken twice (1):', "a: by copy 'a'", "; by copy '(a)' -> 'b'"]),
    'two sources to one target': (
        [rules.copy(r'(\w)/\d', r'\1')], {'a/0': W, 'a/1': W}, {'a': W},
        ['target leaves made twice (1):', 'a: from a/0; from a/1']),
    'fresh and copied': (
        [rules.copy('a'), rules.fresh('.*')], {'a': W}, {'a': W},
        ['target leaves made twice (1):', "a: from a; from fresh '.*'"]),
    'rule that matches nothing': (
        [rules.copy('a'), rules.drop('b')], {'a': W}, {'a': W},
        ['rules that match nothing (1):', "drop 'b'"]),
    'only part of the path matches': (
        [rules.copy('a')], {'xa': W}, {'xa': W}, ['rules that match nothing', 'xa (2, 3)']),
    'only its beginning matches': (
        [rules.copy('a'), rules.fresh('b')], {'ax': W}, {'ax': W, 'bx': W},
        ['rules that match nothing (2):', 'bx (2, 3)']),
    'shape of a copy': (
        [rules.copy('a')], {'a': W}, {'a': V},
        ['do not fit (1):', 'copy a (2, 3) float32 -> a (3,) float32']),
    'number stacked': (
        [rules.derive('.', {'a': Stack()})], {'a': V, 'b': V}, {'a': arange(3, 3)},
        ['stack a (3,) float32 (x2) -> a (3, 3)']),
    'integer to float': (
        [rules.copy('a')], {'a': np.arange(3)}, {'a': V}, ['copy a (3,) int64 -> a (3,) float32']),
}


@pytest.mark.parametrize('case', STRICT)
def test_strict(case):
  """Every case is refused before anything is read, with both sides named."""
  table, source, target, messages = STRICT[case]

  def read(path):
    raise AssertionError(f'{path} was read')

  with pytest.raises(ConfigError) as error:
    rules.apply(rules.plan(table, source, target), read, read)
  for message in messages:
    assert message in str(error.value)


def test_all_problems_at_once_and_long_lists_cut():
  source = {f'opt_state/x{i:02d}/mu': V for i in range(30)} | {
      'params/x00': V, 'params/x01': V, 'a': W}
  with pytest.raises(ConfigError) as error:
    rules.plan([rules.copy('a'), rules.drop('b')], source, {'a': V, 'c': V})
  assert str(error.value).splitlines()[1:] == [
      'rules that match nothing (1):', "  drop 'b'",
      'shapes or dtypes that do not fit (1):', '  copy a (2, 3) float32 -> a (3,) float32',
      'source leaves that no rule takes (32):',
      '  params/x00 (3,) float32', '  params/x01 (3,) float32',   # parameters first
      '  opt_state/x00/mu (3,) float32', '  opt_state/x01/mu (3,) float32',
      '  opt_state/x02/mu (3,) float32', '  ... and 27 more',
      'target leaves that nothing makes (1):', '  c (3,) float32']


def test_a_read_or_fresh_value_of_another_shape():
  with pytest.raises(ConfigError, match=r'a: read an array of shape \(2, 3\), expected \(3,\)'):
    rules.apply(rules.plan([rules.copy('a')], {'a': V}, {'a': V}), lambda path: W, None)
  with pytest.raises(ConfigError, match=r'a: read an array of shape'):
    run([rules.fresh('a')], {}, {'a': V}, {'a': W})
