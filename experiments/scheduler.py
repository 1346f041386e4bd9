"""Does the jobs of suites: a process per job, several at a time, under one progress bar.

Each worker has its own share of the cores, so that two of them do not fight over one. It holds a
lock on its job's folder for as long as it lives, so that a second suite, another machine, or one
started over an orphaned worker cannot do the same job at the same time.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from tqdm import tqdm

from experiments import jobs as jobs_lib
from experiments import locks
from experiments.jobs import Job
from experiments.shards import Shard
from experiments.suite import Run
from moejax.config import ConfigError
from moejax.train import metrics, workdir

POLL = 0.5        # seconds between looks at the workers
LOOK = 20.0       # seconds between looks at what other machines do
LOG_LINES = 20    # shown of a failed job
LOG = 'log.txt'   # in a job's folder: what its worker printed


class Failed(Exception):
  """A job failed; the message has its last lines and the command that reproduces it."""


@dataclasses.dataclass
class Worker:
  """A process that does a job, on its share of the cores."""
  job: Job
  slot: int
  process: subprocess.Popen


def cores() -> list[int]:
  """The cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


class Runner:
  """Does jobs that are not finished yet.

  A job starts when its parent is finished and a worker is free. Jobs of earlier suites go first;
  within a suite the costliest. A shard does its own jobs first; when none of these can start, those
  of the others that nobody is at: their machine may be gone.

  Args:
    groups: {suite: its jobs}, the suites in order.
    folder: of the jobs' folders.
    slots: workers at a time; each gets an equal share of the cores.
    shard: this machine's, if others work on the same jobs in the same folder.
    keep_going: whether jobs that need nothing of a failed one go on.
    report: called with the name of each suite whose jobs are all finished, as soon as they are.

  Attributes:
    pending: {key: job} of what is neither finished nor running.
    found: how many were finished before.
  """

  def __init__(self, groups: Mapping[str, Sequence[Job]], folder: pathlib.Path, slots: int, *,
               shard: Shard | None = None, keep_going: bool = False,
               report: Callable[[str], None] = lambda name: None):
    self.folder, self.slots, self.shard, self.keep_going = folder, slots, shard, keep_going
    jobs, self.unreported = jobs_lib.merge(groups)
    self.report = report
    self.own = shard.own(list(jobs.values())) if shard else set(jobs)
    self.pending = {key: job for key, job in jobs.items() if not job.finished(folder)}
    self.found = len(jobs) - len(self.pending)
    self.workers: list[Worker] = []
    self.failed: dict[str, Job] = {}
    self.left: dict[str, Job] = {}   # what descends from the failed
    first = {key: place for place, keys in reversed(list(enumerate(self.unreported.values())))
             for key in keys}
    self.order = {key: (key not in self.own, first[key], -job.cost)
                  for key, job in self.pending.items()}
    self.progress = {key: job.done(folder) for key, job in self.pending.items()}
    self.total = sum(job.work for job in self.pending.values())
    self.looked = time.monotonic()   # when this machine last saw what others do
    self.not_before = {key: self.looked + LOOK for key in self.pending if key not in self.own}
    self.waiting = 0                 # jobs of others it last said to wait for

  def run(self) -> None:
    """Does them all, those that other shards are at included: it waits for these.

    Raises:
      Failed: a job failed. Without keep_going, the others were stopped and saved.
      KeyboardInterrupt: after SIGINT or SIGTERM, when every worker has saved and ended.
    """
    with self._bar() as bar, _terminate_as_interrupt():
      try:
        self._report_finished()
        while self.pending or self.workers:
          self._start_ready(bar)
          self._look_around(bar)
          time.sleep(POLL)
          self._collect(bar)
          self._show(bar)
          self._report_finished()
      finally:
        self._stop()
    if self.failed:
      raise Failed(self._summary())

  def _bar(self) -> tqdm:
    return tqdm(total=self.total, initial=sum(self.progress.values()), unit='step',
                dynamic_ncols=True, smoothing=0.05,
                disable=not self.pending or not sys.stderr.isatty())

  def _show(self, bar: tqdm) -> None:
    for job in (worker.job for worker in self.workers):
      self.progress[job.key] = job.done(self.folder)
    bar.set_postfix_str('; '.join(f'{w.job.label} {self.progress[w.job.key]}/{w.job.work}'
                                  for w in self.workers), refresh=False)
    bar.update(max(0, sum(self.progress.values()) - bar.n))
    bar.refresh()

  def _report_finished(self) -> None:
    ahead = {*self.pending, *self.failed, *self.left, *(w.job.key for w in self.workers)}
    for name in [name for name, keys in self.unreported.items() if not keys & ahead]:
      del self.unreported[name]
      self.report(name)

  def _start_ready(self, bar: tqdm) -> None:
    """Starts what can be started while there is room."""
    now = time.monotonic()
    for key in sorted(self.pending, key=self.order.__getitem__):
      if len(self.workers) == self.slots:
        return
      job = self.pending[key]
      ahead = {*self.pending, *(w.job.key for w in self.workers)}
      same_folder = any(w.job.name == job.name for w in self.workers)
      if (not job.parent or job.parent.key not in ahead) and not same_folder and (
          now >= self.not_before.get(key, now)):
        self._start(job, bar)

  def _start(self, job: Job, bar: tqdm) -> None:
    """Starts a job, unless another process is at it or has just finished it."""
    path = self.folder / job.name
    lock = locks.take(path)
    if lock is None:
      if not self.shard:
        raise ConfigError(f'--runs: {path} is being trained by another process. Wait for it, or '
                          'end it, or choose another folder.')
      self.not_before[job.key] = time.monotonic() + LOOK
      return
    try:
      if job.finished(self.folder):
        self._finish(job)
        return
      self.workers.append(self._work(job, path, lock))
    finally:
      os.close(lock)   # the worker's copy keeps it locked
    del self.pending[job.key]
    done = self.progress[job.key]
    how = f'goes on from {done:,} of {job.work:,}' if done else f'{job.work:,} to do'
    self._say(bar, f'{job.label}: {how} in {path}')

  def _work(self, job: Job, path: pathlib.Path, lock: int) -> Worker:
    slot = min(set(range(self.slots)) - {w.slot for w in self.workers})
    if isinstance(job, Run):
      _move_parent(job, path, self.folder)
    with (path / LOG).open('a') as log:
      process = subprocess.Popen(
          [sys.executable, *job.command(self.folder)], stdin=subprocess.DEVNULL, stdout=log,
          stderr=log, pass_fds=(lock,),
          start_new_session=True)   # so that a Ctrl-C reaches it once, through us
    if hasattr(os, 'sched_setaffinity'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, share(cores(), self.slots, slot))
    return Worker(job, slot, process)

  def _collect(self, bar: tqdm) -> None:
    for worker in [w for w in self.workers if w.process.poll() is not None]:
      self.workers.remove(worker)
      if worker.job.finished(self.folder):
        self._finish(worker.job)
        said = metrics.last_evaluation(self.folder / worker.job.name)
        self._say(bar, f'{worker.job.label}: finished. {said}'.rstrip())
      else:
        self._fail(worker, bar)

  def _finish(self, job: Job) -> None:
    self.pending.pop(job.key, None)
    self.progress[job.key] = job.work

  def _fail(self, worker: Worker, bar: tqdm) -> None:
    message = self._failure(worker)
    if not self.keep_going:
      raise Failed(message)
    self._say(bar, message)
    self.failed[worker.job.key] = worker.job
    for key, job in list(self.pending.items()):   # parents before children
      if job.parent and job.parent.key in {*self.failed, *self.left}:
        self.left[key] = self.pending.pop(key)

  def _failure(self, worker: Worker) -> str:
    lines = (self.folder / worker.job.name / LOG).read_text().splitlines()[-LOG_LINES:]
    return '\n'.join([
        f'{worker.job.label}: failed with exit code {worker.process.returncode}. Its last lines:',
        *(f'  | {line}' for line in lines),
        'This runs it alone:', f'  python {shlex.join(worker.job.command(self.folder))}'])

  def _summary(self) -> str:
    """What failed, and what that kept from being done."""
    lines = [f'{len(self.failed)} failed:', *(f'  {job.label}: {self.folder / job.name / LOG}'
                                              for job in self.failed.values())]
    if self.left:
      lines += [f'{len(self.left)} not begun, since they start from these:',
                *(f'  {job.label}' for job in self.left.values())]
    return '\n'.join([*lines, 'Not reported: ' + ', '.join(self.unreported)])

  def _look_around(self, bar: tqdm) -> None:
    """Sees what other shards have done, every now and then."""
    if not self.shard or time.monotonic() < self.looked + LOOK:
      return
    self.looked = time.monotonic()
    for key, job in list(self.pending.items()):
      if job.finished(self.folder):
        self._finish(job)
      else:
        self.progress[key] = job.done(self.folder)
    waiting = 0 if self.workers else len(self.pending)
    if waiting not in (0, self.waiting):
      self._say(bar, f'waiting for other machines: {waiting} jobs are not finished')
    self.waiting = waiting

  def _stop(self) -> None:
    """Lets the workers save and end; a second Ctrl-C ends them at once."""
    for worker in self.workers:
      worker.process.terminate()   # SIGINT is ignored by what a shell has started with &
    try:
      for worker in self.workers:
        worker.process.wait()
    except KeyboardInterrupt:
      for worker in self.workers:
        worker.process.kill()
      raise

  def _say(self, bar: tqdm, text: str) -> None:
    bar.write(text, file=sys.stderr)
    sys.stderr.flush()


def share(cores: list[int], jobs: int, slot: int) -> list[int]:
  """The cores of worker number `slot` of `jobs`: an equal part, or one in turn if too few."""
  size = max(1, len(cores) // jobs)
  start = slot * size % len(cores)
  return cores[start:start + size]


def _move_parent(run: Run, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Lets a run that was stopped go on after its folder moved: the parent is the one of its key."""
  file = path / 'config.json'
  if run.parent and file.exists():
    there = workdir.read_json(file)
    if there['init']['parent'] != run.parent_path(folder):
      there['init']['parent'] = run.parent_path(folder)
      file.write_text(json.dumps(there, indent=2, sort_keys=True) + '\n')


@contextlib.contextmanager

def _terminate_as_interrupt():
  """SIGTERM raises KeyboardInterrupt, as Ctrl-C does.

  Only the first does: a scheduler may tell this process and the shell around it, which passes it
  on, and a second KeyboardInterrupt would end the workers before they have saved.
  """
  def receive(number, _frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
  old = signal.signal(signal.SIGTERM, receive)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)
