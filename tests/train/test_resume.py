"""A run that is killed, at any moment, and started again ends bit for bit where it would have."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from moejax.checkpoints import orbax
from moejax.train import run_log
from tests.train import small
from tests.train.small import STEPS

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """config.json of a small MoE run with dropout, both losses, and a cooldown."""
  return small.write(tmp_path_factory.mktemp('config') / 'config.json',
                     {'router': 'top_k', 'balance_weight': 0.02, 'z_weight': 1e-3},
                     log_every=10, keep_checkpoints=1)


def start(moment, config, workdir):
  """Exit code and standard error of tests.train.killed, on one device."""
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8',
                                                                   'device_count=1')}
  done = subprocess.run([sys.executable, '-m', 'tests.train.killed', moment, str(config),
                         str(workdir)], cwd=ROOT, env=env, capture_output=True, text=True,
                        timeout=300, check=False)
  return done.returncode, done.stderr


@pytest.fixture(scope='module')
def uninterrupted(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('uninterrupted') / 'run'
  code, said = start('never', config, workdir)
  assert code == 0, said
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


@pytest.mark.parametrize('moment, saved', [
    ('compiling', {None}), ('step', {10, 20}), ('saving', {10}), ('evaluating', {None, 10})])
def test_killed(moment, saved, config, uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  code, said = start(moment, config, workdir)
  assert code == -signal.SIGKILL, said
  last = (orbax.finished_steps(workdir / orbax.SUBDIR) or [None])[-1]
  assert last in saved   # saves are asynchronous: the one before the moment may not be finished
  if moment == 'saving':   # the torn save really is there
    assert list((workdir / orbax.SUBDIR).glob('20*tmp*'))
  code, said = start('never', config, workdir)
  assert code == 0, said
  assert (f'resumed at step {last} ' in said) == bool(last)
  assert_same(uninterrupted, workdir)


def test_stopped_by_sigterm(config, uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  code, said = start('sigterm', config, workdir)
  assert code == 143, said
  assert orbax.finished_steps(workdir / orbax.SUBDIR)[-1] == 27
  assert json.loads((workdir / 'status.json').read_text())['phase'] == 'stopped'
  code, said = start('never', config, workdir)
  assert code == 0 and 'resumed at step 27' in said
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
  assert run['end_step'] == STEPS and run['trunk_step'] == STEPS - 10
  assert 0 < run['parameters_active_per_token'] < run['parameters']
  assert run['train_flops_per_step'] > 0 and len(run['data_fingerprint']) == 64
  assert run['versions']['jax'] and 'tests.train.killed' in run['command']
  assert (uninterrupted / 'config.json').read_text() == config.read_text()
  assert json.loads((uninterrupted / 'status.json').read_text())['phase'] == 'finished'
  assert list((uninterrupted / 'tensorboard').iterdir())
  # Trunk and end are kept whatever keep_checkpoints says.
  assert orbax.finished_steps(uninterrupted / orbax.SUBDIR) == [30, 40]


def test_a_damaged_step_is_not_resumed_nor_passed_over(config, uninterrupted, tmp_path):
  """And once it is renamed, as the line says, the run ends where it would have."""
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  last = workdir / orbax.SUBDIR / str(STEPS)
  shutil.copytree(last, last.with_name('35'))   # as good as any
  shutil.rmtree(last)
  manifest = last.with_name('35') / 'state/manifest.ocdbt'
  manifest.write_bytes(manifest.read_bytes()[:20])
  before = (workdir / 'metrics.jsonl').read_bytes()
  code, said = start('never', config, workdir)
  assert code == 1
  assert said.splitlines()[-1].startswith(
      f"moejax.config.ConfigError: checkpoint: got '{workdir}/checkpoints/35', allowed: a ")
  assert said.endswith('. Older finished steps there: 30. Start again after renaming it to '
                       '35.damaged: the run resumes from step 30.\n')
  assert orbax.finished_steps(workdir / orbax.SUBDIR) == [30, 35]
  last.with_name('35').rename(last.with_name('35.damaged'))
  code, said = start('never', config, workdir)
  assert code == 0 and 'resumed at step 30 ' in said
  assert before == (workdir / 'metrics.jsonl').read_bytes()
  assert_same(uninterrupted, workdir)


def test_a_step_that_is_not_finished_is_renamed_and_said(config, uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(uninterrupted, workdir)
  (workdir / orbax.SUBDIR / str(STEPS) / '_CHECKPOINT_METADATA').unlink()
  for name in ('metrics.jsonl', 'timing.jsonl'):
    with (workdir / name).open('a') as file:
      file.write('{"step": 30, "tor')
  code, said = start('never', config, workdir)
  assert code == 0 and 'resumed at step 30 ' in said
  assert (f'{workdir}/checkpoints/{STEPS}.unfinished: not a finished checkpoint, and so renamed'
          in said)
  assert_same(uninterrupted, workdir)   # and the torn lines are gone


def test_the_same_command_again_says_so(uninterrupted, config):
  before = {p: p.read_bytes() for p in uninterrupted.glob('*.json*')}
  code, _ = start('never', config, uninterrupted)
  assert code == 0
  assert {p: p.read_bytes() for p in uninterrupted.glob('*.json*')} == before


def test_another_config_is_refused_with_the_differing_keys(uninterrupted, config, tmp_path):
  changed = json.loads(config.read_text())
  changed['optimizer']['learning_rate'] = 0.5
  other = tmp_path / 'config.json'
  other.write_text(json.dumps(changed))
  code, said = start('never', other, uninterrupted)
  assert code == 1
  assert 'optimizer.learning_rate: 0.004 -> 0.5' in said
