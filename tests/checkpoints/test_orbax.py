"""moejax's own checkpoints: what is restored, what never is, and the messages about it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity

from moejax import trees
from moejax.checkpoints import orbax
from moejax.checkpoints.orbax import Reader, Writer
from moejax.config import ConfigError
from tests import fork_server


def make_state(value: float = 0.0) -> dict:
  """A small state with every kind of leaf that a run saves."""
  return {'step': jnp.int32(7), 'key': jax.random.key_data(jax.random.key(3)), 'window': {},
          'params': {'layers': {'00': {'wi': jnp.arange(12.0).reshape(3, 4) + value},
                                '01': {'wi': jnp.full((3, 4), 1 / 3, jnp.bfloat16)}}},
          'host': np.arange(5, dtype=np.int64), 'scalar': np.float32(0.5)}


def assert_same(a: dict, b: dict):
  a, b = trees.flatten(a), trees.flatten(b)
  assert list(a) == list(b)
  for path in a:
    assert a[path].dtype == b[path].dtype, path
    np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


def save(workdir, *steps, keep=10, **kwargs):
  writer = Writer(workdir, keep, **kwargs)
  for step in steps:
    writer.save(step, make_state(step))
  writer.close()


def run_python(code: str, *args) -> subprocess.CompletedProcess:
  return fork_server.run([sys.executable, '-c', textwrap.dedent(code), *map(str, args)],
                         capture_output=True, text=True, timeout=120)


def test_round_trip(tmp_path):
  writer = Writer(tmp_path, keep=2)
  assert writer.latest_step() is None
  state = make_state()
  assert writer.save(7, state)
  writer.wait()
  restored = writer.restore(7, state)
  assert restored['window'] == {}  # the structure of `like`, empty nodes too
  assert_same(restored, state)
  assert isinstance(restored['params']['layers']['00']['wi'], jax.Array)
  assert isinstance(restored['host'], np.ndarray)
  reader = Reader(tmp_path)
  assert reader.step == 7
  writer.close()


def test_keeps_the_last_and_the_trunk_for_ever(tmp_path):
  save(tmp_path, 2, 4, 6, 8, 10, keep=2, keep_steps=(4,))
  assert orbax.finished_steps(tmp_path / 'checkpoints') == [4, 8, 10]
  save(tmp_path, 12, keep=2, keep_steps=(4,))  # and over a restart
  assert orbax.finished_steps(tmp_path / 'checkpoints') == [4, 10, 12]


def test_a_saved_step_is_not_saved_again(tmp_path):
  writer = Writer(tmp_path, keep=2)
  assert writer.save(1, make_state(1.0))
  assert not writer.save(1, make_state(2.0))
  writer.wait()
  assert_same(writer.restore(1, make_state()), make_state(1.0))
  writer.close()


def test_arrays_may_be_overwritten_once_save_returns(tmp_path):
  """Donated to the next step, or changed in place: the values at the time of the call are saved."""
  writer = Writer(tmp_path, keep=1)
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  for step in range(1, 4):
    old = np.random.default_rng(step).normal(size=(1000, 1000)).astype(np.float32)
    state = {'device': jnp.asarray(old) + 0, 'host': old.copy()}
    writer.save(step, state)
    overwrite(state['device']).block_until_ready()
    state['host'][:] = -1
    writer.wait()
    restored = writer.restore(step, {'device': jnp.zeros_like(old), 'host': np.zeros_like(old)})
    np.testing.assert_array_equal(restored['device'], old)
    np.testing.assert_array_equal(restored['host'], old)
  writer.close()


KILLED_SAVE = '''
    import os, signal, sys
    import numpy as np
    from orbax.checkpoint._src.path import atomicity
    from moejax.checkpoints.orbax import Writer

    writer = Writer(sys.argv[1], keep=3)
    writer.save(1, {'w': np.ones(3)})
    writer.wait()

    async def die(self):  # all written, not yet renamed
      os.kill(os.getpid(), signal.SIGKILL)
    atomicity.AtomicRenameTemporaryPath.finalize = die
    writer.save(2, {'w': np.ones(3)})
    writer.wait()
'''


def test_a_killed_save_is_neither_listed_nor_restored(tmp_path):
  assert run_python(KILLED_SAVE, tmp_path).returncode == -signal.SIGKILL
  leftovers = [d for d in os.listdir(tmp_path / 'checkpoints') if d.startswith('2.')]
  assert leftovers  # the kill did interrupt a save
  assert Reader(tmp_path).step == 1
  with pytest.raises(ConfigError, match=r'checkpoint.step: got 2, allowed: 1\.'):
    Reader(tmp_path, 2)
  writer = Writer(tmp_path, keep=3)  # and the step can be saved again
  assert writer.latest_step() == 1
  assert writer.save(2, {'w': np.zeros(3)})
  writer.close()
  assert Reader(tmp_path).step == 2
  assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['1', '2']


@pytest.mark.parametrize('missing', ['_CHECKPOINT_METADATA', 'commit time', 'everything'])
def test_an_unfinished_directory_is_neither_listed_nor_restored(tmp_path, missing):
  """As after an interrupted copy between machines: the final name, but not all of the content.

  Without a commit time it is as after a killed save on storage that cannot rename directories.
  """
  save(tmp_path, 1, 2)
  broken = tmp_path / 'checkpoints' / '2'
  if missing == 'everything':
    shutil.rmtree(broken)
    broken.mkdir()
  elif missing == 'commit time':
    metadata = json.loads((broken / '_CHECKPOINT_METADATA').read_text())
    assert metadata['commit_timestamp_nsecs'] > 0
    (broken / '_CHECKPOINT_METADATA').write_text(
        json.dumps(metadata | {'commit_timestamp_nsecs': None}))
  else:
    (broken / missing).unlink()
  assert Reader(tmp_path).step == 1
  writer = Writer(tmp_path, keep=5)
  assert writer.latest_step() == 1
  assert writer.save(2, make_state(2.5))
  writer.wait()
  assert_same(writer.restore(2, make_state()), make_state(2.5))
  writer.close()
  assert (tmp_path / 'checkpoints' / '2.unfinished').exists()


def test_an_error_in_the_background_is_raised(tmp_path, monkeypatch):
  async def fail(self):
    raise OSError('no space left on device')
  writer = Writer(tmp_path, keep=1)
  monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, 'finalize', fail)
  writer.save(1, make_state())
  with pytest.raises(Exception, match='no space left'):
    writer.wait()
  assert writer.latest_step() is None


@pytest.mark.parametrize('finish', ['save', 'close'])
def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch, finish):
  async def fail(self):
    raise OSError('no space left on device')
  writer = Writer(tmp_path, keep=1)
  with monkeypatch.context() as patch:
    patch.setattr(atomicity.AtomicRenameTemporaryPath, 'finalize', fail)
    writer.save(1, make_state())
    while writer._manager.is_saving_in_progress():
      time.sleep(0.01)
  with pytest.raises(Exception, match='no space left'):
    if finish == 'save':
      writer.save(2, make_state())
    else:
      writer.close()


def test_restore_lists_every_difference(tmp_path):
  save(tmp_path, 1)
  like = make_state()
  like['params']['layers']['02'] = like['params']['layers'].pop('01')
  like['params']['layers']['00']['wi'] = jnp.zeros((3, 5))
  like['step'] = jnp.float32(0)
  with pytest.raises(ConfigError) as error:
    Reader(tmp_path).restore(like)
  for line in ('only in the first: params/layers/01/wi (3, 4)',
               'only in the second: params/layers/02/wi (3, 4)',
               'shapes differ: params/layers/00/wi (3, 4) and (3, 5)',
               'dtypes differ: step int32 and float32'):
    assert line in str(error.value)


def test_reader_accepts_workdir_checkpoints_and_step_directory(tmp_path):
  save(tmp_path, 1, 3)
  for directory, step in ((tmp_path, 3), (tmp_path / 'checkpoints', 3),
                          (tmp_path / 'checkpoints' / '1', 1)):
    reader = Reader(directory)
    assert reader.step == step
    np.testing.assert_array_equal(reader.read('params/layers/00/wi'),
                                  make_state(step)['params']['layers']['00']['wi'])
  assert Reader(tmp_path, 1).step == 1


def test_reader_errors(tmp_path):
  with pytest.raises(ConfigError, match='nowhere.*No such directory; run the parent first'):
    Reader(tmp_path / 'nowhere')
  with pytest.raises(ConfigError, match='a finished checkpoint'):
    Reader(tmp_path)
  save(tmp_path, 1, 3)
  with pytest.raises(ConfigError, match=r'checkpoint.step: got 2, allowed: 1, 3\.'):
    Reader(tmp_path, 2)
  with pytest.raises(ConfigError, match='the directory of that one step'):
    Reader(tmp_path / 'checkpoints' / '1', 3)
  with pytest.raises(ConfigError, match='params/wo: no such leaf'):
    Reader(tmp_path).read('params/wo')


def test_writer_errors(tmp_path):
  with pytest.raises(ConfigError, match='checkpoint.keep: got 0'):
    Writer(tmp_path, keep=0)
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='workdir.*a directory that can be written'):
    Writer(tmp_path / 'file' / 'run', keep=1)
  writer = Writer(tmp_path, keep=1)
  for state, message in (({'a.b': np.ones(1)}, r'a\.b.*must not'), ({'': np.ones(1)}, 'empty'),
                         ({1: np.ones(1)}, 'str'), ({'a': 3}, 'a: a int cannot be saved'),
                         ({'key': jax.random.key(0)}, 'jax.random.key_data')):
    with pytest.raises(ValueError, match=message):
      writer.save(1, state)
  writer.close()
  assert orbax.finished_steps(tmp_path / 'checkpoints') == []


def test_small_leaves_are_read_together_and_each_is_right(tmp_path, monkeypatch):
  writer = Writer(tmp_path, keep=1)
  writer.save(1, {f'w{i:03d}': np.full((64,), i, np.float32) for i in range(100)})
  writer.close()
  monkeypatch.setattr(orbax, '_AHEAD', 64 * 4 * 10)   # ten leaves
  reader, calls = Reader(tmp_path), []
  read = reader._read
  monkeypatch.setattr(reader, '_read', lambda leaves: calls.append(len(leaves)) or read(leaves))
  for i, path in enumerate(reader.shapes):
    np.testing.assert_array_equal(reader.read(path), np.full((64,), i, np.float32))
  assert calls == [10] * 10
  assert reader.read('w042')[0] == 42   # out of order, and again


def test_reader_reads_one_leaf_at_a_time(tmp_path):
  """Peak memory of reading 10 leaves of 40 MiB in turn stays far below their 400 MiB."""
  writer = Writer(tmp_path, keep=1)
  writer.save(1, {f'w{i:02d}': np.full((10, 1024, 1024), i, np.float32) for i in range(10)})
  writer.close()
  result = run_python('''
      import sys
      from moejax.checkpoints.orbax import Reader

      def peak():  # KiB; unlike ru_maxrss not inherited from the parent process
        return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])

      reader = Reader(sys.argv[1])
      before = peak()
      for i, path in enumerate(reader.shapes):
        assert reader.read(path)[0, 0, 0] == i
      print((peak() - before) / 1024)
  ''', tmp_path)
  assert result.returncode == 0, result.stderr
  assert float(result.stdout) < 260
