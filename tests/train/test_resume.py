"""A run that is killed, at any moment, and started again ends bit for bit where it would have."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest

from moejax.checkpoints import orbax
from moejax.train import run_log
from tests import fork_server
from tests.train import small
from tests.train.small import AT_STEP, STEPS

TRUNK = STEPS - 5


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """config.json of a small MoE run with dropout, both losses, and a cooldown."""
  return small.write(tmp_path_factory.mktemp('config') / 'config.json',
                     {'router': 'top_k', 'balance_weight': 0.02, 'z_weight': 1e-3},
                     keep_checkpoints=1)


def start(moment, config, workdir):
  """Exit code and standard error of tests.train.killed, on one device."""
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8',
                                                                   'device_count=1')}
  done = fork_server.run([sys.executable, '-m', 'tests.train.killed', moment, config, workdir],
                         cwd=fork_server.ROOT, env=env, capture_output=True, timeout=300)
  return done.returncode, done.stderr


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  code, printed = start('never', config, workdir)
  assert code == 0, printed
  return workdir


def leaves(workdir):
  reader = orbax.Reader(workdir, STEPS)
  return {path: reader.read(path) for path in reader.shapes}


def assert_same(a, b):
  assert (a / 'metrics.jsonl').read_bytes() == (b / 'metrics.jsonl').read_bytes()
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for path, value in a.items():
    np.testing.assert_array_equal(value, b[path], err_msg=path)


def test_killed_at_any_moment_and_told_to_stop(config, uninterrupted, tmp_path):
  """One run that is ended six times; each start goes on from what the last one left."""
  workdir, last = tmp_path / 'run', None
  for moment, code, saved in (
      ('compiling', -signal.SIGKILL, {None}), ('saving', -signal.SIGKILL, {5}),
      ('evaluating', -signal.SIGKILL, {5}), ('step', -signal.SIGKILL, {5, 10}),
      ('sigterm', 143, {AT_STEP}), ('never', 0, {STEPS})):
    found, printed = start(moment, config, workdir)
    assert found == code, (moment, printed)
    assert (f'resumed at step {last} ' in printed) == bool(last)
    # Saves are asynchronous: the one before a kill may not be finished.
    last = (orbax.finished_steps(workdir / orbax.SUBDIR) or [None])[-1]
    assert last in saved, moment
    if moment == 'saving':   # the torn save really is there
      assert list((workdir / orbax.SUBDIR).glob('10*tmp*'))
    if moment == 'sigterm':
      assert json.loads((workdir / 'status.json').read_text())['phase'] == 'stopped'
  assert_same(uninterrupted, workdir)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number):
  old = signal.getsignal(number)
  with run_log.stop_signals() as stop:
    assert stop.signal is None
    signal.raise_signal(number)
    assert stop.signal == number
    assert signal.getsignal(number) == (   # a second Ctrl-C is not caught
        old if number == signal.SIGINT else signal.SIG_IGN)
  assert signal.getsignal(number) == old


def test_what_a_run_leaves(uninterrupted, config):
  run = json.loads((uninterrupted / 'run.json').read_text())
  assert run['end_step'] == STEPS and run['trunk_step'] == TRUNK
  assert 0 < run['parameters_active_per_token'] < run['parameters']
  assert run['train_flops_per_step'] > 0 and len(run['data_fingerprint']) == 64
  assert run['versions']['jax'] and 'tests.train.killed' in run['command']
  assert (uninterrupted / 'config.json').read_text() == config.read_text()
  assert json.loads((uninterrupted / 'status.json').read_text())['phase'] == 'finished'
  assert list((uninterrupted / 'tensorboard').iterdir())
  # Trunk and end are kept whatever keep_checkpoints says.
  assert orbax.finished_steps(uninterrupted / orbax.SUBDIR) == [TRUNK, STEPS]


def test_a_damaged_step_is_not_resumed_and_an_unfinished_one_is_renamed(
    config, uninterrupted, tmp_path):
  """Once the damaged one is renamed too, as the line says, the run ends where it would have."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  steps = workdir / orbax.SUBDIR
  shutil.copytree(steps / str(STEPS), steps / '18')
  manifest = steps / '18/state/manifest.ocdbt'
  manifest.write_bytes(manifest.read_bytes()[:20])
  (steps / str(STEPS) / '_CHECKPOINT_METADATA').unlink()
  for name in ('metrics.jsonl', 'timing.jsonl'):
    with (workdir / name).open('a') as file:
      file.write(f'{{"step": {TRUNK}, "tor')
  code, printed = start('never', config, workdir)
  assert code == 1
  assert f'{steps}/{STEPS}.unfinished: not a finished checkpoint, and so renamed' in printed
  assert f"moejax.config.ConfigError: checkpoint: got '{steps}/18', allowed: a " in (
      printed.splitlines()[-1])
  assert printed.endswith(f'. Older finished steps there: {TRUNK}. Start again after renaming it '
                          f'to 18.damaged: the run resumes from step {TRUNK}.\n')
  assert orbax.finished_steps(steps) == [TRUNK, 18]
  (steps / '18').rename(steps / '18.damaged')
  code, printed = start('never', config, workdir)
  assert code == 0 and f'resumed at step {TRUNK} ' in printed
  assert_same(uninterrupted, workdir)   # and the torn lines are gone
