"""Several machines over one folder: who does what, what is left of the dead, nothing twice."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from experiments import main, results, scheduler
from experiments.scheduler import Shard
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.train import metrics
from tests.experiments import tiny
from tests.experiments.fakes import Fake, order


@pytest.fixture
def quick(monkeypatch):
  """Looks at workers and at other machines all the time."""
  monkeypatch.setattr(scheduler, 'POLL', 0.02)
  monkeypatch.setattr(scheduler, 'REFRESH', 0.1)


def chains(*costs):
  """A parent and a child per cost."""
  parents = [Fake(f'p{i}', cost=cost) for i, cost in enumerate(costs)]
  return [job for p in parents for job in (p, Fake(f'c{p.name}', p, cost=0.5))]


def test_chains_stay_together_and_costs_are_balanced():
  jobs = chains(8, 1, 5, 3)   # with their children 8.5, 1.5, 5.5, 3.5
  hands = [Shard(i, 2).own(jobs) for i in (1, 2)]
  assert hands == [{'p0', 'cp0', 'p1', 'cp1'}, {'p2', 'cp2', 'p3', 'cp3'}]   # 10, 9


def test_a_deal_deals_all_once_whatever_the_order_and_number():
  jobs = chains(*(cost // 2 for cost in range(7)))   # some of equal cost
  for count in (1, 2, 3, 20):
    hands = [Shard(i + 1, count).own(jobs) for i in range(count)]
    assert sorted(key for hand in hands for key in hand) == sorted(job.key for job in jobs)
    assert hands == [Shard(i + 1, count).own(jobs[::-1]) for i in range(count)]


@pytest.mark.parametrize('text', ['0/2', '3/2', 'a/b', '2', '', '1/2/3', '-1/2', '0/0'])
def test_wrong_shards_are_refused(text):
  with pytest.raises(ConfigError, match=r'--shard: got .* allowed: i/n with 1 <= i <= n') as error:
    Shard.parse(text)
  assert '\n' not in str(error.value)


def test_a_shard_does_its_own_first_and_then_what_others_have_left(tmp_path, quick):
  jobs = chains(8, 1, 5, 3)
  scheduler.Scheduler({'s': jobs}, tmp_path, 1, shard=Shard(2, 2)).do_all()
  assert order(tmp_path) == ['p2', 'p3', 'cp2', 'cp3', 'p0', 'p1', 'cp0', 'cp1']


def test_others_have_time_to_begin_and_a_worker_keeps_its_lock(tmp_path):
  go = tmp_path / 'go'
  own, other = Fake('own', cost=2, until=str(go)), Fake('other')
  train = scheduler.Scheduler({'s': [own, other]}, tmp_path, 2, shard=Shard(1, 2))
  train._start_ready(train._bar())
  assert [worker.job for worker in train.workers] == [own]   # with room for another
  assert scheduler.try_lock(tmp_path / 'own') is None
  go.touch()
  train.workers[0].process.wait()
  assert scheduler.try_lock(tmp_path / 'own') is not None


def test_a_shard_waits_for_what_another_does(tmp_path, quick):
  """Locked is no error under --shard; a child waits for a parent that another finishes."""
  parent, child = Fake('p'), Fake('c', Fake('p'))
  (tmp_path / 'p').mkdir()
  held = scheduler.try_lock(tmp_path / 'p')

  def finish():
    (tmp_path / 'p' / 'done').write_text('')
    os.close(held)

  other = threading.Timer(0.5, finish)
  other.start()
  train = scheduler.Scheduler({'s': [parent, child]}, tmp_path, 2, shard=Shard(1, 1))
  train.do_all()
  assert order(tmp_path) == ['c'] and not other.is_alive()


def test_what_another_finished_before_the_lock_was_free_is_not_done_again(tmp_path, quick):
  train = scheduler.Scheduler({'s': [Fake('late')]}, tmp_path, 1)
  assert list(train.pending) == ['late']
  (tmp_path / 'late').mkdir()
  (tmp_path / 'late' / 'done').write_text('')
  train.do_all()
  assert order(tmp_path) == []


def test_a_file_system_without_flock_is_named(tmp_path, monkeypatch):
  def refuse(*_):
    raise OSError(38, 'Function not implemented')
  monkeypatch.setattr(scheduler.fcntl, 'flock', refuse)
  with pytest.raises(ConfigError, match='cannot lock .*Function not implemented.*supports flock'):
    scheduler.try_lock(tmp_path)


class Machine:
  """A shard's process, and what it has said so far."""

  def __init__(self, folder: pathlib.Path, shard: str):
    self.said = folder.parent / f'said-{shard.replace("/", "-")}'
    with self.said.open('w') as file:
      self.process = subprocess.Popen(
          [sys.executable, '-m', 'tests.experiments.tiny', '--suite=chains', f'--runs={folder}',
           '--jobs=1', f'--shard={shard}'], env=tiny.environment(), stdout=file, stderr=file)

  def until(self, condition) -> None:
    while not condition(self.said.read_text()):
      assert self.process.poll() is None, self.said.read_text()
      time.sleep(0.05)


def worker(path: pathlib.Path) -> int:
  """Process that trains in a workdir."""
  return json.loads((path / 'status.json').read_text())['pid']


def contents(folder: pathlib.Path) -> dict:
  return {f: f.read_bytes() for f in folder.rglob('*') if f.is_file()}


def test_one_of_two_shards_is_killed_and_the_other_finishes_everything_once(tmp_path, monkeypatch):
  folder = tmp_path / 'runs'
  suite = tiny.chains()
  alone, parent, child = jobs = suite.runs()
  assert Shard(1, 2).own(jobs) == {parent.key, child.key}   # the costlier chain
  dying, living = Machine(folder, '1/2'), Machine(folder, '2/2')
  # It dies with a checkpoint made. Its worker lives on, and nobody else may train that run.
  saved = lambda: orbax.finished_steps(folder / parent.name / orbax.SUBDIR)
  dying.until(lambda _: saved())
  dying.process.kill()
  dying.process.wait()
  orphan = worker(folder / parent.name)
  os.kill(orphan, signal.SIGSTOP)
  living.until(lambda said: 'waiting for other machines: 2 jobs' in said)
  assert alone.finished(folder) and not parent.finished(folder)
  assert worker(folder / parent.name) == orphan
  last = saved()[-1]
  os.kill(orphan, signal.SIGKILL)
  assert living.process.wait() == 0, living.said.read_text()

  assert all(job.finished(folder) for job in jobs)
  assert f'resumed at step {last} of' in (folder / parent.name / scheduler.LOG).read_text()
  for job in jobs:
    path, every = folder / job.name, job.settings.log_every
    first = json.loads((path / 'run.json').read_text())['first_step']
    steps = [line['step'] for line in metrics.read_lines(path / 'metrics.jsonl')
             if 'train/loss' in line]
    assert steps == list(range(first + every, first + job.work + 1, every))
    assert (path / scheduler.LOG).read_text().count('finished at step') == 1
  assert [row['key'] for row in results.read(folder / 'chains').rows] == [
      arm.run.key for arm in suite.arms]

  before = contents(folder)   # the killed one again
  tiny.use(monkeypatch.setattr)
  assert main.main(['--suite=chains', f'--runs={folder}', '--shard=1/2']) == 0
  assert contents(folder) == before
