"""A step whose files are damaged: always one line that says so, and never another error's."""

import re
import shutil
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

from moejax import trees
from moejax.checkpoints import damage, orbax
from moejax.checkpoints.orbax import Reader, Writer
from moejax.config import ConfigError
from tests import fork_server
from tests.checkpoints.test_orbax import assert_same


def make_state() -> dict:
  """Some leaves stand in the index itself, and some, too large, in files of their own."""
  rng = np.random.default_rng(0)
  return {'step': jnp.int32(7), 'params': {
      f'w{i}': jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for i in range(20)}}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  writer = Writer(workdir, 9)
  for step in (10, 20, 30, 40):
    writer.save(step, make_state(), {'step': step})
  writer.close()
  return workdir


def largest(folder):
  return max((p for p in folder.iterdir()), key=lambda p: p.stat().st_size)


def halve(file):
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def zero(file):
  file.write_bytes(bytes(file.stat().st_size))


ARRAYS, INDEX = 'state/ocdbt.process_0/d', 'state/d'
DAMAGES = {
    'array file gone': (lambda s: largest(s / ARRAYS).unlink(), r'process_0/d/\w+ is missing'),
    'array file cut': (lambda s: halve(largest(s / ARRAYS)), r'd/\w+ has \d+ bytes of \d+'),
    'array file empty': (lambda s: largest(s / ARRAYS).write_bytes(b''), r'has 0 bytes of \d+'),
    'array file zero': (lambda s: zero(largest(s / ARRAYS)), r'Error reading "params\.w\d+/0\.0"'),
    'arrays gone': (lambda s: shutil.rmtree(s / 'state/ocdbt.process_0'), 'is missing'),
    'index gone': (lambda s: shutil.rmtree(s / INDEX), 'NOT_FOUND: Error reading Byte range'),
    'index cut': (lambda s: halve(largest(s / INDEX)), 'Requested byte range .* not valid'),
    'index zero': (lambda s: zero(largest(s / INDEX)), 'Error decoding b-tree node'),
    'manifest gone': (lambda s: (s / 'state/manifest.ocdbt').unlink(), 'Manifest not found'),
    'manifest cut': (lambda s: halve(s / 'state/manifest.ocdbt'), 'Error decoding manifest'),
    'manifest empty': (lambda s: (s / 'state/manifest.ocdbt').write_bytes(b''), 'Error decoding m'),
    'metadata cut': (lambda s: halve(s / 'state/_METADATA'), '_METADATA: .*line 1 column'),
    'metadata empty': (lambda s: (s / 'state/_METADATA').write_text(''), '_METADATA: .*char 0'),
    'metadata zero': (lambda s: zero(s / 'state/_METADATA'), '_METADATA: .*line 1 column'),
    'metadata no text': (lambda s: (s / 'state/_METADATA').write_bytes(b'{"\xff'),
                         "_METADATA: 'utf-8' codec"),
    'sharding cut': (lambda s: halve(s / 'state/_sharding'), '_sharding": Invalid JSON'),
}


@pytest.fixture
def damaged(saved, tmp_path):
  """damaged(name): a workdir whose step 30 of 10, 20, 30, 40 is damaged in that way."""
  def make(name):
    shutil.copytree(saved, tmp_path / 'run')
    DAMAGES[name][0](tmp_path / 'run' / orbax.SUBDIR / '30')
    return tmp_path / 'run'
  return make


def read_all(reader):
  for path in reader.shapes:
    reader.read(path)


def on_device(state):
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state)


@pytest.mark.parametrize('how', ['leaf by leaf', 'whole'])
@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_step_is_named_with_the_older_ones(damaged, name, how):
  workdir = damaged(name)
  with pytest.raises(ConfigError) as error:
    reader = Reader(workdir, 30, 'config.x', lambda older: f'Now what of {older}?')
    read_all(reader) if how == 'leaf by leaf' else reader.restore(on_device(make_state()))
  said = str(error.value)
  assert said.startswith(f"config.x: got '{workdir}/checkpoints/30', allowed: a checkpoint whose "
                         'files are whole. It is damaged: ')
  assert said.endswith('. Older finished steps there: 10, 20. Now what of [10, 20]?')
  assert '\n' not in said and 'tensorstore_spec' not in said and len(said) < 500
  reason = said.partition('damaged: ')[2]
  assert re.search(DAMAGES[name][1], reason), reason


def test_other_steps_are_read_as_ever(damaged):
  workdir = damaged('array file cut')
  for step in (10, 20, 40):
    assert_same(Reader(workdir, step).restore(on_device(make_state())), make_state())


def test_the_own_run_is_told_to_rename_it(damaged):
  workdir = damaged('array file gone')
  writer = Writer(workdir, 9)
  with pytest.raises(ConfigError, match=r': 10, 20\. Start again after renaming it to 30\.damaged: '
                                        'the run resumes from step 20'):
    writer.restore(30, on_device(make_state()))
  writer.close()
  assert orbax.set_away(10, [], 'the run') == 'renaming it to 10.damaged: the run begins anew'


def test_a_step_renamed_so_is_in_nobodys_way(damaged):
  workdir = damaged('manifest cut')
  step = workdir / orbax.SUBDIR / '30'
  step.rename(step.with_name('30.damaged'))
  assert orbax.finished_steps(step.parent) == [10, 20, 40]
  writer = Writer(workdir, 9)
  assert writer.save(30, make_state(), {})
  writer.close()
  assert orbax.finished_steps(step.parent) == [10, 20, 30, 40]
  assert step.with_name('30.damaged').exists() and not writer.aside


def test_damaged_extra(damaged):
  workdir = damaged('array file zero')
  reader = Reader(workdir, 20)
  halve(workdir / orbax.SUBDIR / '20/extra/metadata')
  with pytest.raises(ConfigError, match="checkpoints/20', .*damaged: .*Older.*: 10. Take one of"):
    _ = reader.extra
  (workdir / orbax.SUBDIR / '20/extra/metadata').unlink()
  with pytest.raises(ConfigError, match='damaged: File .*extra/metadata not found. Older'):
    _ = reader.extra
  assert Reader(workdir, 40).extra == {'step': 40}


def test_the_first_step_damaged_leaves_none(saved, tmp_path):
  shutil.copytree(saved / orbax.SUBDIR / '10', tmp_path / orbax.SUBDIR / '10')
  halve(tmp_path / orbax.SUBDIR / '10/state/_METADATA')
  with pytest.raises(ConfigError, match='Older finished steps there: none. Copy it again.'):
    Reader(tmp_path)


@pytest.mark.parametrize('content', ['[]', 'null', '3', '', '{"commit'])
def test_a_commit_file_of_another_kind_is_of_no_finished_step(saved, tmp_path, content):
  shutil.copytree(saved, tmp_path / 'run')
  (tmp_path / 'run' / orbax.SUBDIR / '40/_CHECKPOINT_METADATA').write_text(content)
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR) == [10, 20, 30]


def caused(error, cause):
  error.__cause__ = cause
  return error


@pytest.mark.parametrize('error', [
    MemoryError(), KeyboardInterrupt(), TypeError('NOT_FOUND: x'), KeyError('a'), OSError(5, 'EIO'),
    PermissionError(13, 'Permission denied'), ValueError('shapes differ'), AssertionError(),
    ValueError('RESOURCE_EXHAUSTED: Error reading "a/0": out of memory'),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver'),
    jax.errors.JaxRuntimeError('FAILED_PRECONDITION: device'),
    caused(Exception('Encountered error while reading array index'), KeyboardInterrupt()),
    caused(Exception('Encountered error while reading array index'), MemoryError()),
], ids=repr)
def test_another_error_is_no_damage(saved, monkeypatch, error):
  assert damage.of_error(error) is None
  reader = Reader(saved)

  def broken(*_, **__):
    raise error
  monkeypatch.setattr(reader._handler, 'restore', broken)
  with pytest.raises(type(error)) as raised:
    reader.read('step')
  assert raised.value is error


def test_wrong_shapes_are_no_damage(saved):
  like = on_device(make_state())
  like['params']['w1'] = jax.ShapeDtypeStruct((64, 65), jnp.float32)
  with pytest.raises(ConfigError, match='shapes differ: params/w1') as error:
    Reader(saved).restore(like)
  assert 'damaged' not in str(error.value)


def test_an_index_of_many_nodes(tmp_path):
  """As of a very large state: its root only points at other nodes."""
  store = ts.KvStore.open({
      'driver': 'ocdbt', 'base': f'file://{tmp_path}/',
      'config': {'max_decoded_node_bytes': 256, 'max_inline_value_bytes': 1}}).result()
  with ts.Transaction() as transaction:
    for i in range(200):
      store.with_transaction(transaction)[f'key{i}'] = b'x' * 100
  (tmp_path / '_METADATA').write_text('{}')
  base = ts.KvStore.open({'driver': 'file', 'path': f'{tmp_path}/'}).result()
  assert ts.ocdbt.dump(base).result()['versions'][-1]['root_height'] > 1
  sizes = damage._sizes(epath.Path(tmp_path))
  assert sum(sizes.values()) >= 200 * 100
  assert damage.of_files(epath.Path(tmp_path)) is None
  file = largest(tmp_path / 'd')
  file.write_bytes(file.read_bytes()[:-1])
  assert damage.of_files(epath.Path(tmp_path))


def test_nothing_but_the_line_is_printed(damaged):
  """Where an array cannot be read, reads of others that are still going on say nothing."""
  workdir = damaged('array file zero')
  done = fork_server.run([sys.executable, '-c', textwrap.dedent('''
      import sys
      import jax
      from moejax import trees
      from moejax.checkpoints.orbax import Reader

      where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      reader = Reader(sys.argv[1], 30)
      like = {path: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)
              for path, s in reader.shapes.items()}
      try:
        reader.restore(trees.unflatten(like))
      except ValueError as error:
        sys.exit(str(error))
  '''), str(workdir)], capture_output=True, text=True, timeout=120)
  assert done.returncode == 1 and done.stdout == ''
  assert done.stderr.startswith('checkpoint: got ') and len(done.stderr.splitlines()) == 1


def test_quiet_gives_the_hook_back_unless_there_was_an_error(monkeypatch):
  seen = []
  monkeypatch.setattr(sys, 'unraisablehook', seen.append)
  before = sys.unraisablehook
  with damage.quiet():
    assert sys.unraisablehook != before
  assert sys.unraisablehook == before
  with pytest.raises(KeyError), damage.quiet():
    raise KeyError
  given_up = caused(Exception('Encountered error while reading array index'), GeneratorExit())
  errors = [RuntimeError('Event loop is closed'), given_up, RuntimeError('another'), None]
  for error in errors:
    sys.unraisablehook(type('Raised', (), {'exc_value': error})())
  assert [raised.exc_value for raised in seen] == errors[2:]


def test_leaves_in_the_index_need_no_file(tmp_path):
  writer = Writer(tmp_path, 1)
  writer.save(1, {'a': np.arange(3)}, {})
  writer.close()
  shutil.rmtree(tmp_path / orbax.SUBDIR / '1/state/ocdbt.process_0')
  np.testing.assert_array_equal(
      trees.flatten(Reader(tmp_path).restore({'a': np.zeros(3, np.int64)}))['a'], np.arange(3))


@pytest.mark.parametrize('dump', [{}, {'versions': []}, {'versions': [{'root': None}]}, None])
def test_an_index_of_a_version_that_is_not_known_is_left_to_the_read(saved, monkeypatch, dump):
  class Done:
    def result(self):
      return dump
  monkeypatch.setattr(ts.ocdbt, 'dump', lambda *_: Done())
  assert_same(Reader(saved, 20).restore(make_state()), make_state())
