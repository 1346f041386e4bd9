"""Who may write into a run's directory, and what then stands in it."""

import dataclasses
import errno
import json
import os
import platform
import subprocess
import sys

import pytest

from moejax.config import ConfigError
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import workdir
from moejax.train.workdir import Workdir

CONFIG = run_config.RunConfig()
DAMAGED = {'empty': b'', 'cut': b'{"first_step": 1', 'zeros': bytes(20), 'no text': b'{"\xff": 1}',
           'list': b'[1, 2]', 'number': b'3', 'null': b'null', 'more': b'{}\n{}'}
OTHER = dataclasses.replace(CONFIG, seed=7, mesh=MeshConfig(fsdp=2), eval_splits=())


def claim(there):
  with there.claimed(CONFIG):
    pass


def test_claim_writes_every_key_and_check_accepts_the_same_config(tmp_path):
  there = Workdir(tmp_path / 'deep' / 'run')
  there.check(CONFIG)                      # nothing is here yet
  assert not there.path.exists()           # and check makes nothing
  claim(there)
  assert run_config.from_dict(json.loads((there.path / 'config.json').read_text())) == CONFIG
  there.check(CONFIG)
  claim(there)
  assert sorted(p.name for p in there.path.iterdir()) == ['config.json', 'run.lock']


def test_a_bucket_is_no_folder():
  with pytest.raises(ConfigError, match="workdir: got 'gs://b/run', allowed: a folder. Mount"):
    Workdir('gs://b/run')


def test_a_claim_is_seen_or_not(tmp_path):
  there = Workdir(tmp_path)
  assert not there.seen(seconds=0)
  claim(there)
  assert there.seen(seconds=0)


def test_another_config_is_refused_with_exactly_the_differing_keys(tmp_path):
  there = Workdir(tmp_path)
  claim(there)
  with pytest.raises(ConfigError) as error:
    there.check(OTHER)
  first, *lines = str(error.value).splitlines()
  assert first.startswith(f'workdir: {tmp_path} holds a run of another config')
  assert [line.strip() for line in lines] == [
      "eval_splits: ['test'] -> []", 'mesh.fsdp: 1 -> 2', 'seed: 0 -> 7']
  saved = json.loads(run_config.to_json(CONFIG)) | {'sed': 3}   # keys that only one of them has
  del saved['seed']
  there.write('config.json', saved)
  with pytest.raises(ConfigError, match=r"sed: 3 -> '\(absent\)'\n  seed: '\(absent\)' -> 0$"):
    there.check(CONFIG)


HOLD = '''
import sys
from moejax.train.workdir import Workdir
from tests.train.test_workdir import CONFIG
with Workdir(sys.argv[1]).claimed(CONFIG):
  print('held', flush=True)
  sys.stdin.read()
'''


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
  there = Workdir(tmp_path)
  claim(there)   # the lock of a run that has ended
  process = subprocess.Popen([sys.executable, '-c', HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == 'held\n'
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  refused = (rf"^workdir: got '{tmp_path}', allowed: a directory in which no other process trains. "
             rf'Process {process.pid} on {platform.node()} trains there. Wait for its end')
  with pytest.raises(ConfigError, match=refused):
    there.check(CONFIG)
  with pytest.raises(ConfigError, match=refused):
    claim(there)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
  process.kill()   # what it locked is free
  process.wait()
  there.check(CONFIG)
  claim(there)


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')
  monkeypatch.setattr(workdir.fcntl, 'flock', refuse)
  claim(Workdir(tmp_path))
  Workdir(tmp_path).check(CONFIG)


def test_a_damaged_config_is_said_to_be_so(tmp_path):
  there = Workdir(tmp_path)
  (tmp_path / 'config.json').write_bytes(DAMAGED['cut'])
  with pytest.raises(ConfigError, match='^workdir: .*whose config.json can be read. It is damaged: '
                                        '.* If the run here is of this very config, delete that'):
    there.check(CONFIG)
  (tmp_path / 'config.json').unlink()   # as it says
  there.check(CONFIG)


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='^workdir: .*a directory that can be written.*--workdir'):
    claim(Workdir(tmp_path / 'file' / 'run'))


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, 'Permission denied')
  monkeypatch.setattr(workdir.pathlib.Path, 'write_text', refuse)
  with pytest.raises(ConfigError, match='workdir: .*PermissionError: Permission denied'):
    claim(Workdir(tmp_path / 'run'))


def test_write_replaces_at_once_or_not_at_all(tmp_path, monkeypatch):
  there = Workdir(tmp_path)
  there.write('a.json', {'x': 1})
  there.write('b.txt', 'text')
  assert there.read('a.json') == {'x': 1} and (tmp_path / 'b.txt').read_text() == 'text'
  assert (tmp_path / 'a.json').read_text() == '{\n  "x": 1\n}\n'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.json', 'b.txt']

  whole = workdir.pathlib.Path.write_text

  def tear(path, text):
    whole(path, text[:3])
    raise OSError(28, 'No space left on device')
  monkeypatch.setattr(workdir.pathlib.Path, 'write_text', tear)
  with pytest.raises(OSError, match='No space'):
    there.write('a.json', {'x': 2})
  assert there.read('a.json') == {'x': 1}


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir.jax, 'process_index', lambda: 1)
  there = Workdir(tmp_path)
  there.write('a.json', {'x': 1})
  there.status('training', 3)
  assert list(tmp_path.iterdir()) == []


def test_status_adds_up_the_cpu_time_of_all_processes(tmp_path, monkeypatch):
  clock = iter([100.0, 102.5, 104.0, 7.0, 8.25])
  monkeypatch.setattr(workdir.time, 'process_time', lambda: next(clock))
  there = Workdir(tmp_path)
  for phase, cpu in (('training', 2.5), ('stopped', 4.0)):
    there.status(phase, 3)
    assert there.read('status.json') == {
        'phase': phase, 'step': 3, 'pid': os.getpid(), 'cpu_seconds': cpu}
  again = Workdir(tmp_path)   # another process, whose clock began anew
  again.status('finished', 4)
  assert again.read('status.json')['cpu_seconds'] == 5.2   # 4 + 1.25, to a tenth


def test_a_workdir_is_whole_with_all_that_a_start_writes(tmp_path):
  there = Workdir(tmp_path)
  for name in ('config.json', 'run.json', 'status.json'):
    assert not there.whole
    there.write(name, {})
  assert there.whole


def test_provenance(monkeypatch):
  monkeypatch.setattr(workdir.sys, 'argv', ['main.py', '--workdir=x'])
  found = workdir.provenance(steps=3)
  assert found['steps'] == 3 and found['command'].endswith(' --workdir=x')
  assert found['command'].startswith('python ') and found['devices'].startswith('8 x ')
  assert set(workdir.PACKAGES) | {'python', 'platform'} == set(found['versions'])
  assert found['versions']['jax'] == workdir.jax.__version__
  assert '(not installed)' not in found['versions']['moejax']
  monkeypatch.setattr(workdir, 'PACKAGES', ('no-such-package',))
  assert workdir.versions()['no-such-package'] == '(not installed)'


@pytest.mark.parametrize('content', DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_line_that_names_the_file_and_the_fix(tmp_path, content):
  (tmp_path / 'run.json').write_bytes(content)
  with pytest.raises(ConfigError) as error:
    workdir.read_json(tmp_path / 'run.json', 'config.x', 'Do this.')
  said = str(error.value)
  assert said.startswith(f"config.x: got '{tmp_path}', allowed: a run whose run.json can be read. "
                         'It is damaged: ')
  assert said.endswith('. Do this.') and '\n' not in said
  with pytest.raises(ConfigError, match='^workdir: .* Delete that file and start that run again'):
    workdir.read_json(tmp_path / 'run.json')


def test_an_object_without_what_is_needed_is_damaged(tmp_path):
  (tmp_path / 'run.json').write_text('{"a": 1}')
  assert workdir.read_json(tmp_path / 'run.json', needs=['a']) == {'a': 1}
  with pytest.raises(ConfigError, match='run.json can be read. It is damaged: it has no b, c. '):
    workdir.read_json(tmp_path / 'run.json', needs=['a', 'b', 'c'])


@pytest.mark.parametrize('path', ['run.json', 'none/run.json', 'file/run.json'])
def test_what_is_not_there(tmp_path, path):
  (tmp_path / 'file').touch()
  with pytest.raises(ConfigError, match='config.x: .*the directory of a run, with run.json in it'):
    workdir.read_json(tmp_path / path, 'config.x')
