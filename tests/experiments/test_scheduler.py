"""Suites trained for real: end to end, a second time, a run that fails, Ctrl-C and resume."""

import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import scheduler
from experiments import suite as suite_lib
from moejax.config import ConfigError
from moejax.train import metrics
from tests.experiments import tiny
from tests.experiments.fakes import Fake, order


@pytest.fixture
def one_device(monkeypatch):
  """Workers see one device, as a user's do, and not the test process's virtual ones."""
  monkeypatch.delenv('XLA_FLAGS', raising=False)


def start(module, *flags):
  return subprocess.Popen([sys.executable, '-m', module, *flags], env=tiny.environment(),
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(folder: pathlib.Path) -> dict:
  return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def test_quickstart_end_to_end_and_once_more(tmp_path):
  flags = ('--suite=quickstart', '--scale=smoke', f'--runs={tmp_path}')
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
  lines = map(json.loads, (made / 'results.jsonl').read_text().splitlines())
  for row in (line for line in lines if 'arm' in line):
    workdir, = tmp_path.glob(f'*-{row["key"]}-*')
    last = metrics.read_lines(workdir / 'metrics.jsonl')
    assert row['final']['test']['loss'] == last[-1]['test/loss']

  before, started = contents(tmp_path), time.monotonic()
  out, err = (second := start('experiments.main', *flags)).communicate()
  assert second.returncode == 0
  assert '8 jobs finished, 0 to do' in err   # of 10, some are the same at this scale
  assert time.monotonic() - started < 30
  assert contents(tmp_path) == before   # no worker was started, and the report is the same


def test_a_failed_run_stops_the_suite_with_its_last_lines_and_its_command(tmp_path, one_device):
  bad = tiny.parent(**{'model.num_classes': 10})
  with pytest.raises(scheduler.JobFailed) as caught:
    scheduler.Scheduler({'s': [bad]}, tmp_path, 1).do_all()
  message = str(caught.value)
  assert 'parent 0: failed with exit code 1' in message
  assert '  | moejax: config.model.num_classes: got 10, allowed: at least ' in message
  assert '  python -m moejax.main --config=configs/pretrain/vit_glyphs.py:runlocal ' in message
  assert f'--workdir={tmp_path / bad.name}' in message
  assert not bad.finished(tmp_path)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
  command = ('tests.experiments.tiny', '--suite=chain,alone', f'--runs={tmp_path}', '--jobs=1')
  parent, child = tiny.chain().runs()
  path = tmp_path / parent.name
  first = start(*command)
  while parent.done(tmp_path) < 20:
    assert first.poll() is None, first.communicate()[1]
    time.sleep(0.05)
  first.send_signal(signal.SIGINT)
  _, err = first.communicate()
  assert first.returncode == 130 and 'stopped; what was running is saved' in err, err
  assert f'python -m experiments.main --suite=chain,alone --scale=mini --runs={tmp_path}' in err
  status = json.loads((path / 'status.json').read_text())
  assert status['phase'] == 'stopped' and 20 <= status['step'] < tiny.STEPS
  assert not (tmp_path / 'chain').exists()

  out, err = (second := start(*command)).communicate()
  assert second.returncode == 0, err
  assert f'resumed at step {status["step"]} of {tiny.STEPS}' in (path / scheduler.LOG).read_text()
  assert parent.finished(tmp_path) and child.finished(tmp_path)
  assert '| child ' in (tmp_path / 'chain' / 'chain.md').read_text()
  assert (tmp_path / 'alone' / 'alone.md').exists()
  assert [line.split(':')[0] for line in out.splitlines()] == ['alone', 'chain']
  # A suite's results are there as soon as its last run is.
  assert err.index('alone: results written') < err.index('child of parent 0: finished')


@pytest.fixture
def quick(monkeypatch):
  """Looks at workers all the time."""
  monkeypatch.setattr(scheduler, 'POLL', 0.02)


def test_jobs_run_suite_by_suite_the_costliest_first_and_shared_ones_once(tmp_path, quick):
  parent = Fake('p', cost=2)
  cheap, costly = Fake('cheap', cost=1), Fake('costly', parent, cost=9)
  later, shared = Fake('later', cost=99), Fake('p', cost=2)
  reported = {}
  scheduler.Scheduler({'a': [parent, cheap, costly], 'b': [later, shared], 'c': [cheap]}, tmp_path, 1,
                report=lambda name: reported.update({name: order(tmp_path)})).do_all()
  assert order(tmp_path) == ['p', 'costly', 'cheap', 'later']
  assert reported == {'a': order(tmp_path)[:3], 'c': order(tmp_path)[:3], 'b': order(tmp_path)}


def test_a_parent_that_a_suite_does_not_name_is_done_too(tmp_path, quick):
  scheduler.Scheduler({'s': [Fake('c', Fake('p', Fake('pp')))]}, tmp_path, 2).do_all()
  assert order(tmp_path) == ['pp', 'p', 'c']


def test_a_free_worker_starts_on_the_next_suite(tmp_path, quick):
  go = tmp_path / 'go'
  parent = Fake('p', until=str(go))
  last = Fake('last', until='')
  train = scheduler.Scheduler({'a': [parent, Fake('c', parent)], 'b': [last]}, tmp_path, 2,
                        report=lambda name: name == 'b' and go.touch())
  train.do_all()
  assert sorted(order(tmp_path)[:2]) == ['last', 'p'] and order(tmp_path)[2] == 'c'


def test_jobs_of_one_folder_are_done_one_after_the_other(tmp_path, quick):
  class Twin(Fake):
    key = 'another'

    def finished(self, folder):
      return (folder / 'twin').exists()

    def command(self, folder):
      return ['-c', f'import pathlib; pathlib.Path({str(folder / "twin")!r}).touch()']

  scheduler.Scheduler({'s': [Fake('p'), Twin('p')]}, tmp_path, 2).do_all()
  assert order(tmp_path) == ['p'] and (tmp_path / 'twin').exists()


def test_a_failed_job_stops_the_others_unless_told_to_keep_going(tmp_path, quick):
  bad = Fake('bad', cost=9, code=3)
  suites = {'a': [bad, Fake('child', bad), Fake('good')],
            'b': [Fake('grandchild', Fake('child', bad))], 'c': [Fake('other')]}
  with pytest.raises(scheduler.JobFailed, match='bad: failed with exit code 1') as error:
    scheduler.Scheduler(suites, tmp_path, 1).do_all()
  assert '| no luck in bad' in str(error.value) and order(tmp_path) == ['bad']

  reported = []
  with pytest.raises(scheduler.JobFailed) as error:
    scheduler.Scheduler(suites, tmp_path, 1, keep_going=True, report=reported.append).do_all()
  assert order(tmp_path)[1:] == ['bad', 'good', 'other'] and reported == ['c']
  assert str(error.value).splitlines() == [
      '1 failed:', f'  bad: {tmp_path / "bad" / scheduler.LOG}',
      '2 not begun, since they start from these:', '  child', '  grandchild',
      'Not reported: a, b']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_workers_save_and_end(tmp_path, quick, number):
  train = scheduler.Scheduler({'s': [Fake('p', until=str(tmp_path / 'never'))]}, tmp_path, 1)

  def send():
    while not order(tmp_path):
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  threading.Thread(target=send).start()
  with pytest.raises(KeyboardInterrupt):
    train.do_all()
  assert [worker.process.returncode for worker in train.workers] == [-signal.SIGTERM]


def test_a_run_that_another_process_trains_is_refused(tmp_path):
  path = tmp_path / tiny.parent().name
  held = scheduler.try_lock(path)
  with pytest.raises(ConfigError, match='being trained by another process'):
    scheduler.Scheduler({'s': [tiny.parent()]}, tmp_path, 1).do_all()
  os.close(held)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--runs: cannot make'):
    scheduler.Scheduler({'s': [tiny.parent()]}, tmp_path / 'file', 1).do_all()


def test_a_stopped_run_goes_on_after_its_folder_moved(tmp_path):
  child = tiny.chain().arms[1].run
  path = tmp_path / child.name
  path.mkdir()
  config = path / 'config.json'
  config.write_text(suite_lib.settings.to_json(child.resolved('old/place')))
  scheduler._move_parent(child, path, tmp_path)
  assert config.read_text() == suite_lib.settings.to_json(
      child.resolved(str(tmp_path / child.parent.name)))
  config.write_text('{"init": {')
  with pytest.raises(ConfigError, match=f'{child.name}.*a run whose config.json can be read'):
    scheduler._move_parent(child, path, tmp_path)


@pytest.mark.parametrize('name', ['config.json', 'run.json', 'status.json'])
def test_a_run_with_a_damaged_file_is_neither_finished_nor_begun_anew(tmp_path, name):
  job = tiny.parent()
  path = tmp_path / job.name
  (path / 'checkpoints').mkdir(parents=True)
  (path / 'config.json').write_text(suite_lib.settings.to_json(job.settings))
  for file, content in (('run.json', {'first_step': 0, 'end_step': tiny.STEPS}),
                        ('status.json', {'phase': 'finished', 'step': tiny.STEPS})):
    (path / file).write_text(json.dumps(content))
  assert not job.finished(tmp_path) and job.done(tmp_path) == tiny.STEPS
  (path / name).write_text('{"a')
  with pytest.raises(ConfigError, match=f'{job.name}.*a run whose {name} can be read'):
    scheduler.Scheduler({'s': [job]}, tmp_path, 1)


@pytest.mark.parametrize('cores, jobs, shares', [
    ([0, 1], 2, [[0], [1]]),
    ([2, 3, 5, 7], 2, [[2, 3], [5, 7]]),
    ([0, 1, 2], 2, [[0], [1]]),
    ([4], 2, [[4], [4]]),
])
def test_workers_share_the_cores(cores, jobs, shares):
  assert [scheduler.share_of_cores(cores, jobs, slot) for slot in range(jobs)] == shares
