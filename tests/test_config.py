"""Conversion between ConfigDict and dataclasses: values, refusals and their messages."""

import dataclasses
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from configs.upcycle import t5_stdlib_upcycled
from moejax import config
from moejax.config import ConfigError
from moejax.models.t5 import T5Config
from moejax.train import config as settings


@dataclasses.dataclass(frozen=True)
class Inner:
  rate: float = 0.5
  flag: bool = False

  def __post_init__(self):
    config.check(self.rate >= 0, 'inner.rate', self.rate, '>= 0', 'Raise it.')


@dataclasses.dataclass(frozen=True)
class Circle:
  family: str = 'circle'
  radius: float = 1.0


@dataclasses.dataclass(frozen=True)
class Square:
  family: str = 'square'
  side: int = 1
  inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int = 10
  name: str = 'x'
  splits: tuple = ('test',)
  sizes: tuple[int, ...] = ()
  inner: Inner = Inner()
  shape: Circle | Square = Circle()
  derived: int = dataclasses.field(default=7, init=False)


def refusal(values):
  with pytest.raises(ConfigError) as error:
    config.build(Outer, values)
  return str(error.value)


def test_missing_keys_take_their_defaults():
  assert config.build(Outer, {}) == Outer()
  assert config.build(Outer, ConfigDict({'inner': {'flag': True}})) == Outer(inner=Inner(0.5, True))


def test_an_int_where_a_float_belongs_becomes_one():
  rate = config.build(Outer, {'inner': {'rate': 2}}).inner.rate
  assert rate == 2.0 and type(rate) is float


def test_lists_become_tuples():
  built = config.build(Outer, {'splits': ['a', 'b'], 'sizes': (1, 2)})
  assert built.splits == ('a', 'b') and built.sizes == (1, 2)
  assert hash(built) == hash(dataclasses.replace(built))   # a list inside could not be hashed


def test_family_chooses_among_the_dataclasses_of_a_union():
  circle = config.build(Outer, {'shape': {'family': 'circle', 'radius': 3}})
  assert circle.shape == Circle(radius=3.0)
  square = config.build(Outer, {'shape': {'family': 'square', 'side': 3, 'inner': {'rate': 1}}})
  assert square.shape == Square(side=3, inner=Inner(1.0))


@pytest.mark.parametrize('values, key, words', [
    ({'steps': 1.5}, 'config.steps', 'got 1.5, allowed: a value of type int. A float was given'),
    ({'steps': True}, 'config.steps', 'got True, allowed: a value of type int. A bool was given'),
    ({'steps': '3'}, 'config.steps', "got '3', allowed: a value of type int"),
    ({'steps': None}, 'config.steps', 'A NoneType was given'),
    ({'name': 3}, 'config.name', 'a value of type str'),
    ({'splits': 'test'}, 'config.splits', "got 'test', allowed: a value of type tuple"),
    ({'sizes': 3}, 'config.sizes', 'a value of type tuple'),
    ({'inner': {'rate': True}}, 'config.inner.rate', 'a value of type float. A bool was given'),
    ({'inner': {'rate': '0.1'}}, 'config.inner.rate', 'a value of type float'),
    ({'inner': {'flag': 1}}, 'config.inner.flag', 'a value of type bool. A int was given'),
    ({'inner': 3}, 'config.inner', 'got 3, allowed: a group of keys'),
    ({'shape': 3}, 'config.shape.family', 'missing'),
    ({'shape': {'radius': 1.0}}, 'config.shape.family', 'missing'),
    ({'shape': {'family': 'squar'}}, 'config.shape.family', "Did you mean 'square'?"),
    ({'shape': {'family': 'circle', 'side': 1}}, 'config.shape.side',
     'no such key; Known keys in config.shape: family, radius'),
    ({'stesp': 1}, 'config.stesp', "no such key; did you mean 'steps'? Known keys in config:"),
    ({'inner': {'rat': 1}}, 'config.inner.rat', "did you mean 'rate'? Known keys in config.inner:"),
    ({'derived': 1}, 'config.derived', 'no such key'),
    ({'inner': {'rate': -1}}, 'config.inner.rate', 'got -1.0, allowed: >= 0. Raise it.'),
])
def test_refusals_are_one_line_that_begins_with_the_key(values, key, words):
  message = refusal(values)
  assert message.startswith(f'{key}: ') and words in message and '\n' not in message


def test_a_key_of_an_earlier_version_is_answered_with_its_new_name(monkeypatch):
  monkeypatch.setitem(config.RENAMED, 'config.inner.ratio', 'config.inner.rate')
  for values, message in (({'inner': {'ratio': 1.0}},
                           'config.inner.ratio: is called config.inner.rate now.'),
                          ({'ratio': 1.0}, 'config.ratio: no such key;')):   # of another group
    assert refusal(values).startswith(message)
  assert str(config.unknown_key('config.steps_per_dispatch', ['steps_per_call', 'steps'])) == (
      'config.steps_per_dispatch: is called config.steps_per_call now.')


def test_settings_of_an_earlier_version_are_read_under_the_new_names(monkeypatch):
  monkeypatch.setitem(config.RENAMED, 'config.inner.ratio', 'config.inner.rate')
  values = {'steps': 3, 'inner': {'ratio': 0.25, 'flag': True},
            'shape': {'family': 'square', 'inner': {'rate': 1.0}}, 'splits': ['a']}
  given = json.dumps(values)
  assert config.renamed(values) == {
      'steps': 3, 'inner': {'rate': 0.25, 'flag': True},
      'shape': {'family': 'square', 'inner': {'rate': 1.0}}, 'splits': ['a']}
  assert json.dumps(values) == given
  assert config.build(Outer, config.renamed(values)).inner == Inner(0.25, True)


def test_every_new_name_is_a_key_of_a_run_and_no_old_one_is():
  keys = set(settings.default(T5Config()).to_dict())
  for old, new in config.RENAMED.items():
    assert old.rpartition('.')[0] == new.rpartition('.')[0] == 'config'   # else extend this test
    assert new.removeprefix('config.') in keys and old.removeprefix('config.') not in keys
  run = settings.from_dict({'steps_per_dispatch': 4, 'model': {'family': 't5'}})
  assert run.steps_per_call == 4


def test_where_names_the_root():
  with pytest.raises(ConfigError, match=r'^other\.stesp: '):
    config.build(Outer, {'stesp': 1}, where='other')


def test_as_config_dict_has_every_key_and_builds_back():
  settings = Outer(steps=3, sizes=(1, 2), shape=Square(side=4, inner=Inner(0.25, True)))
  edited = config.as_config_dict(settings)
  assert edited.to_dict() == {
      'steps': 3, 'name': 'x', 'splits': ('test',), 'sizes': (1, 2),
      'inner': {'rate': 0.5, 'flag': False},
      'shape': {'family': 'square', 'side': 4, 'inner': {'rate': 0.25, 'flag': True}}}
  assert config.build(Outer, edited) == settings
  edited.shape.inner.rate = 0.75
  assert config.build(Outer, edited).shape.inner == Inner(0.75, True)
  assert settings.shape.inner.rate == 0.25
  edited.shape.inner.rat = 1.0
  with pytest.raises(ConfigError, match=r"config\.shape\.inner\.rat: .*did you mean 'rate'"):
    config.build(Outer, edited)


def test_check_and_check_choice():
  config.check(True, 'a.b', 1, '0', 'No.')
  with pytest.raises(ConfigError, match=r"^a\.b: got 'x', allowed: y\. Use y\.$"):
    config.check(False, 'a.b', 'x', 'y', 'Use y.')
  config.check_choice('a', 'one', ('one', 'two'))
  with pytest.raises(ConfigError, match=r"^a: got 'twoo', allowed: one, two\. Did you mean 'two'"):
    config.check_choice('a', 'twoo', ('one', 'two'))
  with pytest.raises(ConfigError, match=r"^a: got 'zzz', allowed: one, two\. Choose one of these"):
    config.check_choice('a', 'zzz', ('one', 'two'))
  assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize('key, value, message', [
    ('model.decoder_moe.k', 99, 'config.model.decoder_moe.k: got 99'),
    ('model.encoder_moe.layers', 'last_9', "config.model.encoder_moe.layers: got 'last_9'"),
    ('optimizer.b1', 2.0, 'config.optimizer.b1: got 2.0'),
    ('data.text.window', 1, 'config.data.text.window: got 1'),
    ('init.experts', 'copie', "config.init.experts: got 'copie'")])
def test_a_message_has_the_full_key(key, value, message):
  edited = t5_stdlib_upcycled.get_config()
  edited.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError) as error:
    settings.resolve(edited)
  assert str(error.value).startswith(message)


def test_a_path_is_expanded_or_refused(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert config.path('workdir', '~/a~/b[1]') == pathlib.Path('/home/me/a~/b[1]')
  assert config.path('workdir', pathlib.Path('x' * 255)).name == 'x' * 255
  for wrong, allowed in (('a/' + 'x' * 256, '255 bytes'), ('é' * 128, '255 bytes'),
                         ('a\0b', '255 bytes'), ('a\udcff', 'UTF-8')):
    with pytest.raises(ConfigError, match=f'^workdir: got .*{allowed}'):
      config.path('workdir', wrong)
