"""What a run leaves behind as it goes: lines cut back on resume, and seconds of its steps alone.

SIGINT and SIGTERM are tested with whole runs, in test_resume.
"""

import json
import types

import pytest

from moejax.train import metrics, run_log
from moejax.train.workdir import Workdir

WINDOW = {'loss': 6., 'correct': 1., 'weight': 4., 'steps': 2., 'layers': {}}


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when a test says so."""
  now = types.SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(run_log, 'time', types.SimpleNamespace(perf_counter=lambda: now.seconds))
  return now


def status(path):
  return json.loads((path / 'status.json').read_text())


def steps(path):
  return [line['step'] for line in metrics.read_lines(path)]


@pytest.mark.parametrize('done, kept', [
    (None, []), (4, [0, 2, 4]), (5, [0, 2, 4]), (6, [0, 2, 4, 6])])
def test_what_an_earlier_attempt_wrote_past_its_checkpoint_is_cut_off(tmp_path, done, kept):
  for name in ('metrics.jsonl', 'timing.jsonl'):
    (tmp_path / name).write_text(''.join(f'{{"step": {s}}}\n' for s in (0, 2, 4, 6)))
  with run_log.Log(Workdir(tmp_path), first=0, done=done, end=10):
    assert steps(tmp_path / 'metrics.jsonl') == kept
    assert steps(tmp_path / 'timing.jsonl') == kept


@pytest.mark.parametrize('done, purged', [(None, 0), (4, 5)])
def test_tensorboard_forgets_what_will_be_written_again_and_no_more(
    tmp_path, done, purged, monkeypatch):
  """Events of steps from purge_step on are hidden; that of `done` is not written again."""
  told = []
  monkeypatch.setattr(run_log, 'SummaryWriter', lambda path, purge_step: (
      told.append(purge_step), types.SimpleNamespace(close=lambda: None))[1])
  with run_log.Log(Workdir(tmp_path), first=0, done=done, end=10):
    assert told == [purged]


def test_reports_stand_in_metrics_jsonl_and_on_stderr(tmp_path, capsys):
  with run_log.Log(Workdir(tmp_path), 0, None, 10) as log:
    assert log.train(2, WINDOW) == {'loss': 1.5, 'accuracy': 0.25}
    log.report(2, 'validation', {'loss': 2.0, 'accuracy': 0.5, 'moe/encoder/01/z': 3.0})
    log.say('for people')
  assert metrics.read_lines(tmp_path / 'metrics.jsonl') == [
      {'step': 2, 'train/loss': 1.5, 'train/accuracy': 0.25},
      {'step': 2, 'validation/loss': 2.0, 'validation/accuracy': 0.5,
       'validation/moe/encoder/01/z': 3.0}]
  said = capsys.readouterr().err
  assert 'step 2: train loss 1.5000, accuracy 0.2500\n' in said
  assert 'step 2: validation loss 2.0000, accuracy 0.5000\n' in said and 'for people\n' in said
  assert list((tmp_path / 'tensorboard').iterdir())


def test_seconds_are_those_of_train_steps_alone(tmp_path, clock):
  with run_log.Log(Workdir(tmp_path), 0, None, 10) as log:
    clock.seconds += 50                     # compiling: before the end of the first step
    log.tick(1, 0.0)
    assert status(tmp_path)['phase'] == 'training' and status(tmp_path)['step'] == 1
    clock.seconds += 2
    log.tick(2, 0.0)
    log.train(2, WINDOW)                    # one step after the first: 2 s
    with log.pause('evaluating', 2):
      assert status(tmp_path)['phase'] == 'evaluating'
      clock.seconds += 30
    assert status(tmp_path)['phase'] == 'training'
    for step in (3, 4, 5):
      clock.seconds += 4
      log.tick(step, 0.0)
      if step == 4:
        with log.pause('saving', step):
          clock.seconds += 7
    log.train(5, WINDOW)                    # three steps of 4 s
  assert metrics.read_lines(tmp_path / 'timing.jsonl') == [
      {'step': 2, 'steps': 1, 'seconds': 2.0}, {'step': 5, 'steps': 3, 'seconds': 12.0}]


def test_a_window_of_the_first_step_alone_has_no_time(tmp_path, clock):
  with run_log.Log(Workdir(tmp_path), 0, None, 10) as log:
    with log.pause('initializing', 0):      # before any step
      clock.seconds += 5
    log.tick(1, 0.0)
    log.train(1, WINDOW)
    clock.seconds += 3
    log.tick(2, 0.0)
    log.train(2, WINDOW)
  assert metrics.read_lines(tmp_path / 'timing.jsonl') == [{'step': 2, 'steps': 1, 'seconds': 3.0}]


def test_at_most_two_steps_are_in_flight(tmp_path, monkeypatch):
  waited = []
  monkeypatch.setattr(run_log.jax, 'block_until_ready', waited.append)
  with run_log.Log(Workdir(tmp_path), 0, None, 10) as log:
    for step, expected in ((1, [1]),        # the first, for the clock
                           (2, [1]), (3, [1, 1]), (4, [1, 1, 2]), (5, [1, 1, 2, 3])):
      log.tick(step, step)
      assert waited == expected


def test_other_processes_write_nothing(tmp_path, capsys):
  there = Workdir(tmp_path)
  there.writes = False
  with run_log.Log(there, 0, None, 10) as log:
    for step in (1, 2):
      log.tick(step, 0.0)
    assert log.train(2, WINDOW)['loss'] == 1.5
    with log.pause('evaluating', 2):
      log.say('not for people')
  assert list(tmp_path.iterdir()) == []
  assert capsys.readouterr().err == ''
