"""What runs when, alone and as one of several machines; a suite trained for real and stopped."""

import json
import os
import pathlib
import shlex
import signal
import sys
import threading
import time

import pytest

from experiments import main, results, scheduler
from experiments import suite as suite_lib
from experiments.scheduler import JobFailed, Scheduler, Shard
from moejax.config import ConfigError
from moejax.train import metrics
from tests import fork_server
from tests.experiments import tiny
from tests.experiments.fakes import Fake, chains, order


def contents(folder: pathlib.Path) -> dict:
  return {f.relative_to(folder): f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def wait_for(condition, process) -> None:
  while not condition():
    assert process.poll() is None, process.communicate()
    time.sleep(0.02)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
  def start():
    return fork_server.Popen([sys.executable, '-m', 'tests.experiments.tiny', *flags], text=True,
                             env=tiny.environment(), stdout=-1, stderr=-1)
  flags = ['--suite=alone', f'--runs={tmp_path}', '--jobs=1']
  run, = tiny.alone().runs()
  path = tmp_path / run.name
  first = start()
  wait_for(lambda: run.done(tmp_path) >= 10, first)
  first.send_signal(signal.SIGINT)
  _, err = first.communicate()
  assert first.returncode == 130 and 'stopped; what was running is saved' in err, err
  assert f'python -m experiments.main --suite=alone --scale=mini --runs={tmp_path}' in err
  status = json.loads((path / 'status.json').read_text())
  assert status['phase'] == 'stopped' and 10 <= status['step'] < tiny.STEPS
  assert not (tmp_path / 'alone').exists()

  out, err = (second := start()).communicate()
  assert second.returncode == 0 and run.finished(tmp_path), err
  log = (path / scheduler.LOG).read_text()
  assert f'resumed at step {status["step"]} of {tiny.STEPS}' in log
  assert log.count('finished at step') == 1
  assert '| parent *' in out and 'alone: 1 jobs; no claims. Written to' in out
  assert '| parent *' in (tmp_path / 'alone' / 'alone.md').read_text()
  record, = results.read(tmp_path / 'alone').records
  *_, last = metrics.read_lines(path / 'metrics.jsonl')
  assert record['final']['test']['loss'] == last['test/loss']

  before = contents(tmp_path)   # once more: no worker is started, and the report is the same
  tiny.use(monkeypatch.setattr)
  assert main.main(flags) == 0
  assert contents(tmp_path) == before


@pytest.fixture
def quick(monkeypatch):
  """Looks at workers and at other machines all the time."""
  monkeypatch.setattr(scheduler, 'POLL', 0.02)
  monkeypatch.setattr(scheduler, 'REFRESH', 0.1)


def test_jobs_run_suite_by_suite_the_costliest_first_and_shared_ones_once(tmp_path, quick):
  parent = Fake('p', Fake('unnamed', cost=5), cost=2)
  cheap, costly = Fake('cheap', cost=1), Fake('costly', parent, cost=9)
  later, shared = Fake('later', cost=99), Fake('p', Fake('unnamed', cost=5), cost=2)
  reported = {}
  Scheduler({'a': [parent, cheap, costly], 'b': [later, shared], 'c': [cheap]}, tmp_path, 1,
            report=lambda name: reported.update({name: order(tmp_path)})).do_all()
  assert order(tmp_path) == ['unnamed', 'p', 'costly', 'cheap', 'later']
  assert reported == {'a': order(tmp_path)[:4], 'c': order(tmp_path)[:4], 'b': order(tmp_path)}


def test_a_free_worker_starts_on_the_next_suite(tmp_path, quick):
  go = tmp_path / 'go'
  parent = Fake('p', until=str(go))
  last = Fake('last', until='')
  Scheduler({'a': [parent, Fake('c', parent)], 'b': [last]}, tmp_path, 2,
            report=lambda name: name == 'b' and go.touch()).do_all()
  assert sorted(order(tmp_path)[:2]) == ['last', 'p'] and order(tmp_path)[2] == 'c'


def test_jobs_of_one_folder_are_done_one_after_the_other(tmp_path, quick):
  class Twin(Fake):
    key = 'another'

    def finished(self, folder):
      return (folder / 'twin').exists()

    def command(self, folder):
      return ['-c', f'import pathlib; pathlib.Path({str(folder / "twin")!r}).touch()']

  Scheduler({'s': [Fake('p'), Twin('p')]}, tmp_path, 2).do_all()
  assert order(tmp_path) == ['p'] and (tmp_path / 'twin').exists()


def test_a_failed_job_stops_the_others_without_keep_going(tmp_path, quick):
  bad = Fake('bad', cost=9, code=3)
  suites = {'a': [bad, Fake('child', bad), Fake('good')],
            'b': [Fake('grandchild', Fake('child', bad))], 'c': [Fake('other')]}
  with pytest.raises(JobFailed, match='bad: failed with exit code 1') as error:
    Scheduler(suites, tmp_path, 1).do_all()
  assert '| no luck in bad' in str(error.value) and order(tmp_path) == ['bad']
  assert f'  python {shlex.join(bad.command(tmp_path))}' in str(error.value)

  reported = []
  with pytest.raises(JobFailed) as error:
    Scheduler(suites, tmp_path, 1, keep_going=True, report=reported.append).do_all()
  assert order(tmp_path)[1:] == ['bad', 'good', 'other'] and reported == ['c']
  assert str(error.value).splitlines() == [
      '1 failed:', f'  bad: {tmp_path / "bad" / scheduler.LOG}',
      '2 not begun, since they start from these:', '  child', '  grandchild',
      'Not reported: a, b']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_workers_save_and_end(tmp_path, quick, number):
  work = Scheduler({'s': [Fake('p', until=str(tmp_path / 'never'))]}, tmp_path, 1)

  def send():
    while not order(tmp_path):
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  threading.Thread(target=send).start()
  with pytest.raises(KeyboardInterrupt):
    work.do_all()
  assert [worker.process.returncode for worker in work.workers] == [-signal.SIGTERM]


def test_a_run_that_another_process_trains_is_refused(tmp_path):
  lock = scheduler.try_lock(tmp_path / tiny.parent().name)
  with pytest.raises(ConfigError, match='being trained by another process'):
    Scheduler({'s': [tiny.parent()]}, tmp_path, 1).do_all()
  os.close(lock)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--runs: cannot make'):
    Scheduler({'s': [tiny.parent()]}, tmp_path / 'file', 1).do_all()


def test_a_file_system_without_flock_is_named(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(38, 'Function not implemented')
  monkeypatch.setattr(scheduler.fcntl, 'flock', refuse)
  with pytest.raises(ConfigError, match='cannot lock .*Function not implemented.*supports flock'):
    scheduler.try_lock(tmp_path)


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
    Scheduler({'s': [job]}, tmp_path, 1)


@pytest.mark.parametrize('cores, workers, shares', [
    ([0, 1], 2, [[0], [1]]),
    ([2, 3, 5, 7], 2, [[2, 3], [5, 7]]),
    ([0, 1, 2], 2, [[0], [1]]),
    ([4], 2, [[4], [4]]),
])
def test_workers_share_the_cores(cores, workers, shares):
  assert [scheduler.share_of_cores(cores, workers, i) for i in range(workers)] == shares


def test_chains_stay_together_and_costs_are_balanced():
  jobs = chains(8, 1, 5, 3)   # with their children 8.5, 1.5, 5.5, 3.5
  shards = [Shard(i, 2).own(jobs) for i in (1, 2)]
  assert shards == [{'p0', 'cp0', 'p1', 'cp1'}, {'p2', 'cp2', 'p3', 'cp3'}]   # 10, 9


def test_every_job_is_in_one_shard_whatever_the_order_and_number():
  jobs = chains(*(cost // 2 for cost in range(7)))   # some of equal cost
  for count in (1, 2, 3, 20):
    shards = [Shard(i + 1, count).own(jobs) for i in range(count)]
    assert sorted(key for shard in shards for key in shard) == sorted(job.key for job in jobs)
    assert shards == [Shard(i + 1, count).own(jobs[::-1]) for i in range(count)]


@pytest.mark.parametrize('text', ['0/2', '3/2', 'a/b', '2', '', '1/2/3', '-1/2', '0/0'])
def test_wrong_shards_are_refused(text):
  with pytest.raises(ConfigError, match=r'--shard: got .* allowed: i/n with 1 <= i <= n') as error:
    Shard.parse(text)
  assert '\n' not in str(error.value)


def test_a_shard_does_its_own_first_and_then_what_others_have_left(tmp_path, quick):
  Scheduler({'s': chains(8, 1, 5, 3)}, tmp_path, 1, shard=Shard(2, 2)).do_all()
  assert order(tmp_path) == ['p2', 'p3', 'cp2', 'cp3', 'p0', 'p1', 'cp0', 'cp1']


def test_others_have_time_to_begin_and_a_worker_keeps_its_lock(tmp_path):
  go = tmp_path / 'go'
  own, other = Fake('own', cost=2, until=str(go)), Fake('other')
  work = Scheduler({'s': [own, other]}, tmp_path, 2, shard=Shard(1, 2))
  work._start_ready(work._bar())
  assert [worker.job for worker in work.workers] == [own]   # with room for another
  assert scheduler.try_lock(tmp_path / 'own') is None
  go.touch()
  work.workers[0].process.wait()
  assert scheduler.try_lock(tmp_path / 'own') is not None


def test_a_shard_waits_for_what_another_does(tmp_path, quick):
  """Locked is no error under --shard; a child waits for a parent that another finishes."""
  (tmp_path / 'p').mkdir()
  lock = scheduler.try_lock(tmp_path / 'p')

  def finish():
    (tmp_path / 'p' / 'done').write_text('')
    os.close(lock)

  other = threading.Timer(0.5, finish)
  other.start()
  Scheduler({'s': [Fake('p'), Fake('c', Fake('p'))]}, tmp_path, 2, shard=Shard(1, 1)).do_all()
  assert order(tmp_path) == ['c'] and not other.is_alive()


def test_what_another_finished_before_the_lock_was_free_is_not_done_again(tmp_path, quick):
  work = Scheduler({'s': [Fake('late')]}, tmp_path, 1)
  assert list(work.pending) == ['late']
  (tmp_path / 'late').mkdir()
  (tmp_path / 'late' / 'done').write_text('')
  work.do_all()
  assert order(tmp_path) == []


def test_one_of_two_machines_is_killed_and_the_other_finishes_everything_once(tmp_path):
  """The dead machine's worker lives on for a while, and until then nobody else may do its job."""
  def machine(shard):
    log = (tmp_path / shard.replace('/', '-')).open('w+')
    return fork_server.Popen([sys.executable, '-m', 'tests.experiments.fakes', runs, shard],
                             stdout=log, stderr=log), pathlib.Path(log.name)
  runs = tmp_path / 'runs'
  jobs = chains(8, 1, until=str(tmp_path / 'go'))
  assert Shard(1, 2).own(jobs) == {'p0', 'cp0'}   # the costlier chain
  dying, _ = machine('1/2')
  wait_for((runs / 'p0' / 'pid').exists, dying)
  dying.kill()
  dying.wait()
  living, log = machine('2/2')
  wait_for(lambda: 'waiting for other machines: 2 jobs' in log.read_text(), living)
  assert order(runs) == ['p0', 'p1', 'cp1']
  os.kill(int((runs / 'p0' / 'pid').read_text()), signal.SIGKILL)
  wait_for(lambda: len(order(runs)) == 4, living)
  (tmp_path / 'go').touch()
  assert living.wait() == 0, log.read_text()
  assert order(runs) == ['p0', 'p1', 'cp1', 'p0', 'cp0']
  assert all(job.finished(runs) for job in jobs)
  again, _ = machine('1/2')
  assert again.wait() == 0 and len(order(runs)) == 5
