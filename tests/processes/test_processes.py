"""Several processes on this machine, with virtual CPU devices, that train one model together."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moejax import trees
from moejax.checkpoints import orbax
from moejax.cluster.watchdog import AGAIN, LOST
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import metrics, parallel
from tests.processes import together
from tests.train import small
from tests.train.small import STEPS

ROOT = pathlib.Path(__file__).parent.parent.parent


def free_port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def spawn(module, devices, *arguments):
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace(
      'device_count=8', f'device_count={devices}')}
  return subprocess.Popen([sys.executable, '-m', module, *map(str, arguments)], cwd=ROOT, env=env,
                          stderr=subprocess.PIPE, text=True)


def start(config, workdir, processes, devices, moments=None):
  """[(exit code, standard error)] of processes that train together; moments: see killed.py."""
  among = [free_port(), processes]
  running = [spawn('tests.train.killed', devices, (moments or {}).get(i, 'never'), config, workdir,
                   *([*among, i] if processes > 1 else [])) for i in range(processes)]
  try:
    return [(p.returncode, said) for p in running for said in [p.communicate(timeout=300)[1]]]
  finally:
    for p in running:
      p.kill()


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """config.json of a small MoE run with dropout on any number of devices up to 8."""
  return small.write(tmp_path_factory.mktemp('config') / 'config.json',
                     {'router': 'expert_choice', 'group_size': 32},
                     **{'log_every': 1, 'keep_checkpoints': 9, 'mesh.expert': 2})


@pytest.fixture(scope='module')
def on_8(config, tmp_path_factory):
  """The run on the 8 devices of one process."""
  workdir = tmp_path_factory.mktemp('runs') / 'on_8'
  (code, said), = start(config, workdir, 1, 8)
  assert code == 0, said
  return workdir


def resumed(config, workdir, step, to, processes, devices):
  """A copy of a run as it was at a step, trained on elsewhere."""
  shutil.copytree(workdir, to)
  for saved in orbax.finished_steps(to / orbax.SUBDIR):
    if saved > step:
      shutil.rmtree(to / orbax.SUBDIR / str(saved))
  found = start(config, to, processes, devices)
  assert [code for code, _ in found] == [0] * processes, found
  assert f'resumed at step {step} of {STEPS}' in found[0][1]
  return to


def losses(workdir, first):
  """Train losses of steps first + 1 and on."""
  return [line['train/loss'] for line in metrics.read_lines(workdir / 'metrics.jsonl')
          if line['step'] > first and 'train/loss' in line]


def batches(workdir, processes):
  """{step: {row: digest of the image}}, of all processes together."""
  found = {}
  for i in range(processes):
    for line in pathlib.Path(f'{workdir}.{i}.batches').read_text().splitlines():
      step, rows = json.loads(line)
      assert not found.setdefault(step, {}).keys() & rows.keys()   # no row is loaded twice
      found[step] |= rows
  return found


def assert_close(found, expected):
  """First loss within 1e-6, first five within 1e-5; later ones drift apart by rounding."""
  assert len(found) == len(expected) >= 5
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(found[:5], expected[:5], rtol=1e-5)


@pytest.mark.parametrize('changes', [{}, {
    'parallel': 'pmap', 'mesh.expert': 1, 'execution.scan': True}],
                         ids=['mesh', 'pmap, scanned'])
def test_two_processes_train_as_one(changes, config, on_8, tmp_path):
  changed = run_config.from_dict(trees.unflatten(trees.flatten(json.loads(config.read_text())) | {
      key.replace('.', '/'): value for key, value in changes.items()}))
  config = tmp_path / 'config.json'
  config.write_text(run_config.to_json(changed))
  (code, said), (other, quiet) = start(config, tmp_path / 'run', 2, 4)
  assert code == other == 0, said + quiet
  assert batches(tmp_path / 'run', 2) == batches(on_8, 1)
  assert_close(losses(tmp_path / 'run', 0), losses(on_8, 0))
  assert 'step 20: validation' in said and 'step' not in quiet   # one of them writes and talks
  assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == sorted(
      p.name for p in on_8.iterdir())


def test_resumed_on_8_then_4_then_2x4_devices(config, on_8, tmp_path):
  on_4 = resumed(config, on_8, 10, tmp_path / 'on_4', 1, 4)
  on_2x4 = resumed(config, on_4, 20, tmp_path / 'on_2x4', 2, 4)
  whole = batches(on_8, 1)
  assert batches(on_4, 1) == {n: whole[n] for n in range(10, STEPS)}
  assert batches(on_2x4, 2) == {n: whole[n] for n in range(20, STEPS)}
  assert_close(losses(on_4, 10), losses(on_8, 10))
  assert_close(losses(on_2x4, 20), losses(on_4, 20))


@pytest.mark.parametrize('moment, trouble', [
    ('step', 'process 1 ({host}) is gone: its connection closed'),
    ('hang', 'no process got further for 60 s: others at training, step {ahead} wait for process 1 '
             '({host}) at training, step 26')])
def test_one_that_is_killed_or_hangs_ends_the_other(moment, trouble, config, tmp_path):
  (code, said), (other, also) = start(config, tmp_path / 'run', 2, 2, {1: moment})
  assert code == LOST, said
  line = next(line for line in said.splitlines() if AGAIN in line)
  where = {'host': socket.gethostname()}
  assert line in [f'moejax: {trouble.format(ahead=n, **where)}. {AGAIN}' for n in (27, 28, 29)]
  assert other == (-signal.SIGKILL if moment == 'step' else LOST), also
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR)[-1] in (10, 20)
  found = start(config, tmp_path / 'run', 1, 4)   # and it goes on
  assert found[0][0] == 0 and 'resumed at step' in found[0][1]


def test_if_process_0_is_killed_the_other_ends_at_once(config, tmp_path):
  """By its own line; or by JAX, whose service process 0 has, if that is faster."""
  port = free_port()
  running = [spawn('tests.train.killed', 1, moment, config, tmp_path / 'run', port, 2, i)
             for i, moment in enumerate(('step', 'never'))]
  try:
    said = running[0].communicate(timeout=300)[1]
    ended = time.monotonic()
    also = running[1].communicate(timeout=60)[1]
  finally:
    for p in running:
      p.kill()
  assert time.monotonic() - ended < 20   # lost_seconds of killed.py
  assert running[0].returncode == -signal.SIGKILL, said
  assert running[1].returncode in (LOST, -signal.SIGABRT), also
  if running[1].returncode == LOST:
    assert f'moejax: process 0 is gone: its connection closed. {AGAIN}' in also


def test_told_to_stop_one_stops_all_at_the_same_step(config, tmp_path):
  found = start(config, tmp_path / 'run', 2, 2, {1: 'sigterm'})
  assert [code for code, _ in found] == [143, 143], found
  last = orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR)[-1]
  assert last in (29, 30)   # told in the 27th, agreed upon two steps later
  assert json.loads((tmp_path / 'run/status.json').read_text())['phase'] == 'stopped'


def test_a_config_of_its_own_is_refused_in_all(config, tmp_path):
  other = tmp_path / 'other.json'
  other.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
  assert other.read_text() != config.read_text()
  port = free_port()
  running = [spawn('tests.train.killed', 1, 'never', c, tmp_path / 'run', port, 2, i)
             for i, c in enumerate((config, other))]
  for process in running:
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert ("moejax: config: got 'another in process 1 than in process 0', allowed: the same in "
            "all. Start the same command on all hosts." in said)
  assert not (tmp_path / 'run').exists()


def test_a_damaged_step_is_refused_in_all(config, on_8, tmp_path):
  """Whichever of them would have read the file."""
  workdir = tmp_path / 'run'
  shutil.copytree(on_8, workdir)
  shutil.rmtree(workdir / orbax.SUBDIR / str(STEPS))
  files = (workdir / orbax.SUBDIR / '30/state').glob('ocdbt.process_*/d/*')
  max(files, key=lambda file: file.stat().st_size).unlink()
  for code, said in start(config, workdir, 2, 4):
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if 'damaged' in line]
    assert line.startswith(f"moejax: checkpoint: got '{workdir}/checkpoints/30', allowed: a ")
    assert line.endswith('Older finished steps there: 10, 20. Start again after renaming it to '
                         '30.damaged: the run resumes from step 20.')
    assert 'Traceback' not in said
  assert orbax.finished_steps(workdir / orbax.SUBDIR) == [10, 20, 30]


def test_an_error_in_one_ends_all_with_its_words_and_none_by_an_abort():
  port = free_port()
  running = [spawn('tests.train.failing', 1, port, 3, i) for i in range(3)]
  said = [process.communicate(timeout=120)[1] for process in running]
  assert [process.returncode for process in running] == [1, 1, 1], said   # 134 would be JAX's
  assert 'moejax: config.data: no such file' in said[1]
  words = f'process 1 ({socket.gethostname()}) stopped: ConfigError: config.data: no such file'
  assert words in said[0] and words in said[2]


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """What two processes of tests.processes.together found."""
  file, port = tmp_path_factory.mktemp('together') / 'found', free_port()
  running = [spawn('tests.processes.together', 2, port, i, file) for i in (0, 1)]
  for process in running:
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
  return [json.loads(pathlib.Path(f'{file}.{i}').read_text()) for i in (0, 1)]


@pytest.mark.parametrize('way', [*together.MESHES, 'pmap'])
def test_all_rows_reach_all_processes(way, found):
  """Decoded texts, and rows gathered on the host; also where processes share their rows."""
  alone = together.decoded(parallel.make('mesh', MeshConfig(), jax.devices()[:1]))
  assert len({tuple(ids) for ids in alone['ids']}) > 3 and alone['real'].count(False) == 1
  for process, seen in enumerate(found):
    assert seen[way] == alone | {'host': [0, 1] if way == 'across' else [process, 2]}
  assert alone['index'] == list(range(8))


def test_processes_agree_on_when_to_stop(found):
  for seen in found:   # two steps later, so that nobody waits for the step
    assert seen['stops'] == [None] * 5 + [15] * 3


def test_processes_on_one_host_share_its_memory(found):
  for seen in found:   # two devices each
    assert seen['free'] == [1000 // 4, 1000 // 2]


def test_processes_find_out_that_they_differ(found):
  for seen in found:
    assert seen['differing'] == (
        "data: got 'another in process 1 than in process 0', allowed: the same in all. "
        'Install the same.')
