"""Several processes on this machine, with virtual CPU devices, that train one model together."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
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
from tests import fork_server
from tests.processes import together
from tests.train import killed, small
from tests.train.small import AT_STEP, STEPS

PAIR = ('never', 'never')


def free_port():
  with socket.create_server(('', 0)) as server:
    return server.getsockname()[1]


def run_all(*commands, devices=2):
  """[(exit code, standard error, time at which it was seen to end)] of processes."""
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace(
      'device_count=8', f'device_count={devices}')}
  running = [fork_server.Popen([str(word) for word in words], cwd=fork_server.ROOT, env=env,
                               stderr=subprocess.PIPE) for words in commands]
  try:
    return [(process.returncode, printed, time.monotonic()) for process in running
            for _, printed in [process.communicate(timeout=300)]]
  finally:
    for process in running:
      process.kill()


def start(config, workdir, *moments, devices=2):
  """What `run_all` returns of a process for each moment of killed.py; they train together."""
  configs = config if isinstance(config, tuple) else (config,) * len(moments)
  among = [free_port(), len(moments)]
  return run_all(*(['tests.train.killed', moment, configs[i], workdir,
                    *([*among, i] if len(moments) > 1 else [])]
                   for i, moment in enumerate(moments)), devices=devices)


def codes(ended):
  return [code for code, *_ in ended]


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """config.json of a small MoE run with dropout on any number of devices up to 8."""
  return small.write(tmp_path_factory.mktemp('config') / 'config.json',
                     {'router': 'expert_choice', 'group_size': 32},
                     **{'log_every': 1, 'keep_checkpoints': 9, 'mesh.expert': 2,
                        'model.num_layers': 3})


@pytest.fixture(scope='module')
def alone(config, tmp_path_factory):
  """The run on the 4 devices of one process."""
  workdir = tmp_path_factory.mktemp('runs') / 'alone'
  ended = start(config, workdir, 'never', devices=4)
  assert codes(ended) == [0], ended
  return workdir


def losses(workdir, first=0):
  """Train losses of steps first + 1 and on."""
  return [line['train/loss'] for line in metrics.read_lines(workdir / 'metrics.jsonl')
          if line['step'] > first and 'train/loss' in line]


def batches(workdir, processes):
  """{step: {example: digest of the image}}, of all processes together."""
  by_step = {}
  for i in range(processes):
    for line in pathlib.Path(f'{workdir}.{i}.batches').read_text().splitlines():
      step, images = json.loads(line)
      loaded = by_step.setdefault(step, {})
      assert not loaded.keys() & images.keys()   # no example is loaded twice
      loaded |= images
  return by_step


def assert_close(ours, expected):
  """First loss within 1e-6, first five within 1e-5; later ones drift apart by rounding."""
  assert len(ours) == len(expected) >= 5
  np.testing.assert_allclose(ours[0], expected[0], rtol=1e-6)
  np.testing.assert_allclose(ours[:5], expected[:5], rtol=1e-5)
  np.testing.assert_allclose(ours, expected, rtol=1e-2)


def test_told_to_stop_one_stops_all_and_one_on_fewer_devices_goes_on(config, alone, tmp_path):
  """All at the same step; in the end it is the run of one process."""
  ended = start(config, tmp_path / 'run', 'never', 'sigterm')
  assert codes(ended) == [143, 143], ended
  last = orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR)[-1]
  assert last in (AT_STEP + 2, AT_STEP + 3)   # all agree two steps later
  assert json.loads((tmp_path / 'run/status.json').read_text())['phase'] == 'stopped'
  ended = start(config, tmp_path / 'run', 'never')
  assert codes(ended) == [0] and f'resumed at step {last} of {STEPS}' in ended[0][1], ended
  assert batches(tmp_path / 'run', 2) == batches(alone, 1)
  assert_close(losses(tmp_path / 'run'), losses(alone))


def test_two_processes_train_as_one_under_pmap_with_scanned_blocks(config, alone, tmp_path):
  changes = {'parallel': 'pmap', 'mesh/expert': 1, 'execution/scan': True}
  changed = trees.flatten(json.loads(config.read_text())) | changes
  config = tmp_path / 'config.json'
  config.write_text(run_config.to_json(run_config.from_dict(trees.unflatten(changed))))
  ended = start(config, tmp_path / 'run', *PAIR)
  assert codes(ended) == [0, 0], ended
  assert batches(tmp_path / 'run', 2) == batches(alone, 1)
  assert_close(losses(tmp_path / 'run'), losses(alone))
  (_, printed, _), (_, quiet, _) = ended   # one of them writes and prints
  assert f'step {STEPS}: validation' in printed and 'step' not in quiet
  assert sorted(p.name for p in (tmp_path / 'run').iterdir()) == sorted(
      p.name for p in alone.iterdir())


def test_a_damaged_step_is_refused_in_all_and_once_it_is_renamed_they_go_on(
    config, alone, tmp_path):
  """Whichever of them would have read the file. Then two processes resume the run of one."""
  workdir, steps = tmp_path / 'run', tmp_path / 'run' / orbax.SUBDIR
  shutil.copytree(alone, workdir)
  shutil.rmtree(steps / str(STEPS))
  files = (steps / '15/state').glob('ocdbt.process_*/d/*')
  max(files, key=lambda file: file.stat().st_size).unlink()
  for code, printed, _ in start(config, workdir, *PAIR):
    assert code == 1, printed
    (line,) = [line for line in printed.splitlines() if 'damaged' in line]
    assert line.startswith(f"moejax: checkpoint: got '{steps}/15', allowed: a ")
    assert line.endswith('Older finished steps there: 5, 10. Start again after renaming it to '
                         '15.damaged: the run resumes from step 10.')
    assert 'Traceback' not in printed
  assert orbax.finished_steps(steps) == [5, 10, 15]
  (steps / '15').rename(steps / '15.damaged')
  ended = start(config, workdir, *PAIR)
  assert codes(ended) == [0, 0] and f'resumed at step 10 of {STEPS}' in ended[0][1], ended
  whole = batches(alone, 1)
  assert batches(workdir, 2) == {n: whole[n] for n in range(10, STEPS)}
  assert_close(losses(workdir, 10), losses(alone, 10))


HOST = socket.gethostname()


@pytest.mark.parametrize('moments, trouble', [
    (('never', 'step'), rf'process 1 \({re.escape(HOST)}\) is gone: its connection closed'),
    (('waits', 'hang'), rf'no process got further for {killed.STALL} s: others at training, step '
     rf'1[345] wait for process 1 \({re.escape(HOST)}\) at training, step 12')],
                         ids=['killed', 'hangs'])
def test_one_that_is_killed_or_hangs_ends_the_other(moments, trouble, config, tmp_path):
  (code, printed, _), (other, also, _) = start(config, tmp_path / 'run', *moments)
  assert code == LOST, printed
  assert re.search(f'^moejax: {trouble}. {AGAIN}$', printed, re.MULTILINE)
  assert other == (LOST if 'hang' in moments else -signal.SIGKILL), also
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR)[-1] in (5, 10)
  if 'step' in moments:
    ended = start(config, tmp_path / 'run', 'never')   # and it goes on
    assert codes(ended) == [0] and 'resumed at step' in ended[0][1]


def test_if_process_0_is_killed_the_other_ends_at_once(config, tmp_path):
  """By its own line; or by JAX, whose service process 0 has, if that is faster."""
  (code, printed, dead), (other, also, ended) = start(config, tmp_path / 'run', 'step', 'never')
  assert code == -signal.SIGKILL, printed
  assert ended - dead < 20   # lost_seconds of killed.py
  assert other in (LOST, -signal.SIGABRT), also
  if other == LOST:
    assert f'moejax: process 0 is gone: its connection closed. {AGAIN}' in also


def test_a_config_of_its_own_is_refused_in_all(config, tmp_path):
  other = tmp_path / 'other.json'
  other.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
  assert other.read_text() != config.read_text()
  for code, printed, _ in start((config, other), tmp_path / 'run', *PAIR, devices=1):
    assert code == 1, printed
    assert ("moejax: config: got 'another in process 1 than in process 0', allowed: the same in "
            "all. Start the same command on all hosts." in printed)
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def ended_together(tmp_path_factory):
  """What two processes of tests.processes.together found, and what `run_all` returns of them."""
  file, port = tmp_path_factory.mktemp('together') / 'found', free_port()
  ended = run_all(*(['tests.processes.together', port, i, file] for i in (0, 1)))
  assert all(pathlib.Path(f'{file}.{i}').exists() for i in (0, 1)), ended
  return [json.loads(pathlib.Path(f'{file}.{i}').read_text()) for i in (0, 1)], ended


@pytest.mark.parametrize('way', [*together.MESHES, 'pmap'])
def test_all_examples_reach_all_processes(way, ended_together):
  """Decoded texts, and examples gathered on the host; also where processes share them."""
  expected = together.decoded(parallel.make('mesh', MeshConfig(), jax.devices()[:1]))
  assert len({tuple(ids) for ids in expected['ids']}) > 3 and expected['real'].count(False) == 1
  for process, seen in enumerate(ended_together[0]):
    assert seen[way] == expected | {'host': [0, 1] if way == 'across' else [process, 2]}
  assert expected['index'] == list(range(8))


def test_what_processes_agree_on(ended_together):
  for seen in ended_together[0]:
    assert seen['stops'] == [None] * 5 + [15] * 3   # two steps later, so that none waits for a step
    assert seen['differing'] == (
        "data: got 'another in process 1 than in process 0', allowed: the same in all. "
        'Install the same.')


def test_an_error_in_one_ends_all_with_its_words_and_none_by_an_abort(ended_together):
  (code, waiting, _), (other, failing, _) = ended_together[1]
  assert code == other == 1, waiting + failing   # 134 would be JAX's
  assert 'moejax: config.data: no such file' in failing
  assert f'process 1 ({HOST}) stopped: ConfigError: config.data: no such file' in waiting
