"""A step whose files are not those that were saved: always one line that names the file."""

import random
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.checkpoints import digests, orbax
from moejax.checkpoints.orbax import Reader, Writer
from moejax.config import ConfigError
from tests.checkpoints.test_orbax import assert_same


def make_state(step: int) -> dict:
  """Small leaves, which the index contains, and large ones, which have files of their own."""
  rng = np.random.default_rng(step)
  return {'step': jnp.int32(step), 'params': {
      f'w{i}': jnp.asarray(rng.normal(size=(64, 64)), jnp.float32) for i in range(4)}}


STEPS = (10, 20, 30, 40)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('saved')
  writer = Writer(workdir, 9)
  for step in STEPS:
    writer.save(step, make_state(step))
  writer.close()
  return workdir


@pytest.fixture
def copy(saved, tmp_path):
  """A copy of the saved workdir."""
  return shutil.copytree(saved, tmp_path / 'run')


def files(step):
  """All files of a step but those of its commit, which say no more than that it is finished."""
  return sorted(path for path in step.rglob('*') if path.is_file() and path.parent != step or
                path.name == digests.FILE)


def flip(path, other, rng):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def cut(path, other, rng):
  path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])


MUTATIONS = {
    'a bit flipped': flip, 'cut': cut,
    'zeroed': lambda path, other, rng: path.write_bytes(bytes(path.stat().st_size)),
    'emptied': lambda path, other, rng: path.write_bytes(b''),
    'removed': lambda path, other, rng: path.unlink(),
    'of JSON of another shape': lambda path, other, rng: path.write_text('[]'),
    'of another step': lambda path, other, rng: shutil.copy(other, path)}


@pytest.mark.parametrize('how', MUTATIONS)
def test_every_file_of_a_step_is_guarded(copy, how):
  step = copy / orbax.SUBDIR / '30'
  rng, whole = random.Random(how), {path: path.read_bytes() for path in files(step)}
  others = [path for path in files(copy / orbax.SUBDIR / '20')]
  assert len(whole) > 8
  for path, content in whole.items():
    other = step.parent / '20' / path.relative_to(step)
    MUTATIONS[how](path, other if other.exists() else rng.choice(others), rng)
    if path.exists() and path.read_bytes() == content:   # some files of two steps are equal
      continue
    with pytest.raises(ConfigError) as error:
      Reader(copy, 30, 'config.x', lambda older: f'Now what of {older}?')
    message = str(error.value)
    assert message.startswith(f"config.x: got '{step}', allowed: a checkpoint whose files are "
                              'whole. It ')
    assert message.endswith(' Older finished steps there: 10, 20. Now what of [10, 20]?')
    assert '\n' not in message and len(message) < 500
    if path.name != digests.FILE:
      assert re.search(f'{re.escape(str(path.relative_to(step)))} is (missing|not as it was saved)',
                       message), message
    path.write_bytes(content)
  assert_same(Reader(copy, 30).restore(make_state(30)), make_state(30))


def test_a_step_is_the_one_that_it_is_called(copy):
  steps = copy / orbax.SUBDIR
  (steps / '10').rename(steps / 'x')
  (steps / '40').rename(steps / '10')
  (steps / 'x').rename(steps / '40')
  for step, saved_as in ((10, 40), (40, 10)):
    with pytest.raises(ConfigError, match=f'It is damaged: it was saved as step {saved_as}'):
      Reader(copy, step)


def test_its_own_run_is_advised_to_rename_it_and_saves_it_again(copy):
  step = copy / orbax.SUBDIR / '30'
  max(files(step), key=lambda path: path.stat().st_size).unlink()
  for other in (10, 20, 40):
    assert_same(Reader(copy, other).restore(make_state(other)), make_state(other))
  writer = Writer(copy, 9)
  with pytest.raises(ConfigError, match=r': 10, 20\. Start again after renaming it to 30\.damaged: '
                                        'the run resumes from step 20'):
    writer.restore(30, make_state(30))
  step.rename(step.with_name('30.damaged'))
  assert orbax.finished_steps(step.parent) == [10, 20, 40]
  assert writer.save(30, make_state(30)) is False   # the manager knew it
  writer.close()
  writer = Writer(copy, 9)
  assert writer.save(30, make_state(30))
  writer.close()
  assert_same(Reader(copy, 30).restore(make_state(30)), make_state(30))
  assert step.with_name('30.damaged').exists() and not writer.aside
  assert orbax.set_away(10, [], 'the run') == 'renaming it to 10.damaged: the run begins anew'


@pytest.mark.parametrize('content', ['[]', 'null', '3', '', '{"commit'])
def test_a_commit_file_of_another_kind_is_of_no_finished_step(copy, content):
  (copy / orbax.SUBDIR / '40/_CHECKPOINT_METADATA').write_text(content)
  assert orbax.finished_steps(copy / orbax.SUBDIR) == [10, 20, 30]


@pytest.fixture
def earlier(copy):
  """The step of a version that saved no digests."""
  step = copy / orbax.SUBDIR / '10'
  (step / digests.FILE).unlink()
  (step / 'extra/metadata').write_text('{}')
  return step


def test_a_step_of_an_earlier_version_is_read(earlier):
  assert_same(Reader(earlier).restore(make_state(10)), make_state(10))
  with pytest.raises(ConfigError, match='It was saved as step 10.'):
    Reader(earlier.rename(earlier.with_name('15')))


@pytest.mark.parametrize('how', MUTATIONS)
def test_damage_in_a_step_of_an_earlier_version_is_one_line_where_it_shows(earlier, how):
  rng = random.Random(how)
  for path in files(earlier):
    content = path.read_bytes()
    MUTATIONS[how](path, rng.choice(files(earlier)), rng)
    try:
      Reader(earlier).restore(make_state(10))   # a wrong value cannot be told from a right one
    except ConfigError as error:
      assert '\n' not in str(error) and re.search('files are whole|finished', str(error))
    path.write_bytes(content)


@pytest.mark.parametrize('error', [
    MemoryError(), KeyboardInterrupt(), PermissionError(13, 'Permission denied'),
    ValueError('shapes differ'), AssertionError()], ids=repr)
def test_another_error_is_no_damage(saved, monkeypatch, error):
  reader = Reader(saved)

  def broken(*_, **__):
    raise error
  monkeypatch.setattr(reader._handler, 'restore', broken)
  with pytest.raises(type(error)) as raised:
    reader.read('step')
  assert raised.value is error


def test_wrong_shapes_are_no_damage(saved):
  like = make_state(40)
  like['params']['w1'] = jax.ShapeDtypeStruct((64, 65), jnp.float32)
  with pytest.raises(ConfigError, match='shapes differ: params/w1') as error:
    Reader(saved).restore(like)
  assert 'damaged' not in str(error.value)


@pytest.mark.parametrize('name', ['a[1]', 'b*', 'c?', 'd\\e'])
def test_a_path_that_orbax_would_take_for_a_pattern_is_refused(tmp_path, name):
  for make in (lambda: Writer(tmp_path / name, 1), lambda: Reader(tmp_path / name)):
    with pytest.raises(ConfigError, match=r'allowed: a path without the characters \[ \] \* \? '):
      make()
  assert not list(tmp_path.iterdir())
