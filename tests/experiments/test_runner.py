"""Suites trained for real: end to end, a second time, a run that fails, Ctrl-C and resume."""

import csv
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments import runner
from experiments import suite as suite_lib
from moejax.config import ConfigError
from moejax.train import metrics
from tests.experiments import tiny


@pytest.fixture
def one_device(monkeypatch):
  """Workers see one device, as a user's do, and not the test process's virtual ones."""
  monkeypatch.delenv('XLA_FLAGS', raising=False)


def start(module, *flags):
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return subprocess.Popen([sys.executable, '-m', module, '--suite=quickstart', *flags],
                          env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)


def contents(folder: pathlib.Path) -> dict:
  return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def test_quickstart_end_to_end_and_once_more(tmp_path):
  flags = ('--scale=smoke', f'--runs={tmp_path}')
  out, err = (first := start('experiments.main', *flags)).communicate()
  assert first.returncode == 0, err
  made = tmp_path / 'quickstart-smoke'
  assert '| upcycled ' in out and '| MoE from scratch ' in out
  assert out.startswith((made / 'quickstart.md').read_text().split('\n![')[0].rstrip())
  assert (made / 'quickstart.png').read_bytes().startswith(b'\x89PNG')

  rows = list(csv.DictReader((made / 'quickstart.csv').open()))
  assert [row['domain'] for row in rows] == ['ViT on glyphs'] * 5 + ['T5 on stdlib_text'] * 5
  by_arm = {(row['domain'][:2], row['arm']): row for row in rows}
  for domain in ('Vi', 'T5'):
    steps, up = by_arm[domain, 'dense, equal steps'], by_arm[domain, 'upcycled']
    assert float(steps['extra_flops_percent']) == pytest.approx(20)
    assert float(up['extra_flops_percent']) > 20
    assert float(steps['step0_gap']) == 0.0 and float(up['step0_gap']) != 0.0
    assert by_arm[domain, 'MoE from scratch']['step0_gap'] == ''
    assert float(up['validation_loss']) < float(
        by_arm[domain, 'MoE from scratch']['validation_loss']) + 0.5
  for line in (made / 'results.jsonl').read_text().splitlines():
    row = json.loads(line)
    workdir = tmp_path / f'{row["command"].split("configs/")[1].split(".py")[0]}-{row["key"]}'
    last = metrics.read_lines(workdir / 'metrics.jsonl')
    assert row['final']['test']['loss'] == last[-1]['test/loss']

  before, started = contents(tmp_path), time.monotonic()
  out, err = (second := start('experiments.main', *flags)).communicate()
  assert second.returncode == 0 and '0 to train' in err
  assert time.monotonic() - started < 30
  assert contents(tmp_path) == before   # no worker was started, and the report is the same


def test_a_failed_run_stops_the_suite_with_its_last_lines_and_its_command(tmp_path, one_device):
  bad = tiny.parent(**{'model.num_classes': 10})
  with pytest.raises(runner.Failed) as caught:
    runner.Runner([bad], tmp_path, jobs=1).train()
  message = str(caught.value)
  assert 'parent: failed with exit code 1' in message
  assert '  | moejax: config.model.num_classes: got 10, allowed: at least ' in message
  assert '  python -m moejax.main --config=configs/vit_glyphs.py:runlocal ' in message
  assert f'--workdir={tmp_path / bad.name}' in message
  assert not bad.finished(tmp_path)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
  flags = (f'--runs={tmp_path}', '--jobs=1')
  path = tmp_path / tiny.parent().name
  first = start('tests.experiments.tiny', *flags)
  while runner.steps_done(path) < 20:
    assert first.poll() is None, first.communicate()[1]
    time.sleep(0.05)
  first.send_signal(signal.SIGINT)
  _, err = first.communicate()
  assert first.returncode == 130 and 'stopped; what was running is saved' in err, err
  status = json.loads((path / 'status.json').read_text())
  assert status['phase'] == 'stopped' and 20 <= status['step'] < tiny.STEPS
  assert not (tmp_path / 'quickstart').exists()

  out, err = (second := start('tests.experiments.tiny', *flags)).communicate()
  assert second.returncode == 0, err
  assert f'resumed at step {status["step"]} of {tiny.STEPS}' in (path / runner.LOG).read_text()
  assert '| child ' in out
  assert all(run.finished(tmp_path) for run in tiny.suite().runs())


def test_a_run_that_another_process_trains_is_refused(tmp_path):
  path = tmp_path / tiny.parent().name
  path.mkdir()
  held = os.open(path, os.O_RDONLY)
  fcntl.flock(held, fcntl.LOCK_EX)
  with pytest.raises(ConfigError, match='being trained by another process'):
    runner.Runner([tiny.parent()], tmp_path, jobs=1).train()
  os.close(held)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--runs: cannot make'):
    runner.Runner([tiny.parent()], tmp_path / 'file', jobs=1).train()


def test_a_stopped_run_goes_on_after_its_folder_moved(tmp_path):
  child = tiny.suite().arms[1].run
  path = tmp_path / child.name
  path.mkdir()
  config = path / 'config.json'
  config.write_text(suite_lib.settings.to_json(child.resolved('old/place')))
  runner._move_parent(child, path, tmp_path)
  assert config.read_text() == suite_lib.settings.to_json(
      child.resolved(str(tmp_path / child.parent.name)))


@pytest.mark.parametrize('cores, jobs, shares', [
    ([0, 1], 2, [[0], [1]]),
    ([2, 3, 5, 7], 2, [[2, 3], [5, 7]]),
    ([0, 1, 2], 2, [[0], [1]]),
    ([4], 2, [[4], [4]]),
])
def test_workers_share_the_cores(cores, jobs, shares):
  assert [runner.share(cores, jobs, slot) for slot in range(jobs)] == shares
