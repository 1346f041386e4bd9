"""Runs the jobs of suites: one process per job, several at a time, under one progress bar.

This file defines, in this order: a job; the lock on a job's folder, so that no two processes do the
job at once; the shard, which is one machine's part of the jobs; and the scheduler, which starts
workers, each on its own share of the cores.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from tqdm import tqdm

from experiments.suite import Run
from moejax.config import ConfigError, fail
from moejax.train import metrics, workdir

POLL = 0.5        # seconds between looks at the workers
REFRESH = 20.0    # seconds between looks at what other machines have done
LOG_LINES = 20    # shown of a failed job
LOG = 'log.txt'   # in a job's folder: what its worker printed
LOCK = 'lock'     # in a job's folder


class Job(Protocol):
  """Work for one process, which leaves its result in a folder: suite.Run, untrained.EvaluationJob.

  A job that was stopped goes on where it was; a finished one is left as it is.

  Attributes:
    label: what people call it.
    key: identifies it: two jobs of one key are the same.
    name: of its folder. Jobs that share a folder are done one after the other.
    parent: the job whose result it starts from, or None.
    work: units of the progress bar, such as steps.
    cost: FLOPs, for the order and for the shards.
  """
  label: str
  key: str
  name: str
  parent: 'Job | None'
  work: int
  cost: float

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that does it, with the jobs' folders in `folder`."""

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether `folder` holds its whole result."""

  def done(self, folder: pathlib.Path) -> int:
    """How much of `work` is done, according to its files."""


def merge(suites: Mapping[str, Sequence[Job]]) -> tuple[dict[str, Job], dict[str, set[str]]]:
  """Jobs of several suites, shared ones once.

  Args:
    suites: {suite: its jobs}.

  Returns:
    {key: job}, parents before children, suite after suite; {suite: keys of its jobs and of all
    their ancestors}.
  """
  merged: dict[str, Job] = {}
  keys = {}
  for name, jobs in suites.items():
    with_ancestors = list(_with_ancestors(jobs))
    keys[name] = {job.key for job in with_ancestors}
    for job in with_ancestors:
      merged.setdefault(job.key, job)
  return merged, keys


def _with_ancestors(jobs: Iterable[Job]) -> Iterator[Job]:
  for job in jobs:
    if job.parent:
      yield from _with_ancestors([job.parent])
    yield job


# Locks are flock's, on a file that is never deleted: the kernel releases one when the last process
# that holds it ends, however it ends. The file system must support flock between the machines:
# local disks, NFSv4 and Lustre mounted with flock do; object stores, mounted or not, do not.


def try_lock(folder: pathlib.Path) -> int | None:
  """A descriptor that holds the lock of a folder, made if missing; None if it is locked already.

  A process that inherits the descriptor holds the lock too. Raises ConfigError if the folder cannot
  be written, or cannot be locked.
  """
  return _lock(folder, fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
  """Waits for the lock of a folder and holds it in a with block. Raises ConfigError as try_lock."""
  descriptor = _lock(folder)
  try:
    yield
  finally:
    os.close(descriptor)


def _lock(folder: pathlib.Path, flags: int = 0) -> int | None:
  # NFS gives exclusive locks only on what is open for writing, so a directory will not do.
  try:
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
  except OSError as error:
    raise ConfigError(f'--runs: cannot make {folder} ({error.strerror}). Choose a folder that can '
                      'be written.') from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
  except OSError as error:
    os.close(descriptor)
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      return None
    raise ConfigError(f'--runs: cannot lock {folder / LOCK} ({error.strerror}). Choose a folder on '
                      'a file system that supports flock.') from error
  return descriptor


@dataclasses.dataclass(frozen=True)
class Shard:
  """Machine number `index` of `count` that share the jobs, 1 <= index <= count.

  Every machine computes all shards alike, so they need not talk to each other.
  """
  index: int
  count: int

  @classmethod
  def parse(cls, text: str) -> 'Shard':
    """'2/8' -> Shard(2, 8). Raises ConfigError."""
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
      fail('--shard', text, 'i/n with 1 <= i <= n', 'The second of eight machines is --shard=2/8.')
    return cls(int(match[1]), int(match[2]))

  def __str__(self) -> str:
    return f'{self.index}/{self.count}'

  def own(self, jobs: Iterable[Job]) -> set[str]:
    """Returns keys of the jobs this machine does first.

    Jobs that descend from one root stay on one machine, which then has the root's checkpoint.
    These families are assigned from the most expensive on, each to the machine with the least work.
    """
    families: dict[str, list[Job]] = {}
    for job in jobs:
      root = next(_with_ancestors([job]))
      families.setdefault(root.key, []).append(job)
    cost = {root: sum(job.cost for job in family) for root, family in families.items()}
    load, shards = [0.0] * self.count, [set() for _ in range(self.count)]
    for root in sorted(families, key=lambda root: (-cost[root], root)):
      least = load.index(min(load))
      load[least] += cost[root]
      shards[least] |= {job.key for job in families[root]}
    return shards[self.index - 1]


def cores() -> list[int]:
  """Numbers of the cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def share_of_cores(cores: Sequence[int], workers: int, index: int) -> Sequence[int]:
  """The cores of worker `index`: an equal part each, or one core in turn if there are too few."""
  size = max(1, len(cores) // workers)
  start = index * size % len(cores)
  return cores[start:start + size]


class JobFailed(Exception):
  """Jobs failed; the message has the last lines of each and the command that reproduces it."""


@dataclasses.dataclass
class Worker:
  """A process that does a job, on share number `index` of the cores."""
  job: Job
  index: int
  process: subprocess.Popen


class Scheduler:
  """Runs the jobs that are not finished yet.

  A job starts when its parent is finished and a worker is free. Jobs of earlier suites go first;
  within a suite, the most expensive. A shard does its own jobs first; when none of these can start,
  it takes those of other shards that nobody does: their machine may be gone.

  Args:
    suites: {suite: its jobs}, in order.
    folder: of the jobs' folders.
    max_workers: workers at a time; each gets an equal share of the cores.
    shard: this machine's part, if others work on the same jobs in the same folder.
    keep_going: whether jobs that do not descend from a failed one go on.
    report: called with the name of each suite as soon as all its jobs are finished.

  Attributes:
    pending: {key: job} of what is neither finished nor running.
    finished_before: number of jobs that were finished from the start.
  """

  def __init__(self, suites: Mapping[str, Sequence[Job]], folder: pathlib.Path, max_workers: int, *,
               shard: Shard | None = None, keep_going: bool = False,
               report: Callable[[str], None] = lambda name: None):
    self.folder, self.max_workers, self.shard = folder, max_workers, shard
    self.keep_going, self.report = keep_going, report
    jobs, self.unreported = merge(suites)
    own = shard.own(jobs.values()) if shard else set(jobs)
    self.pending = {key: job for key, job in jobs.items() if not job.finished(folder)}
    self.finished_before = len(jobs) - len(self.pending)
    self.workers: list[Worker] = []
    self.failed: dict[str, Job] = {}
    self.skipped: dict[str, Job] = {}   # descendants of the failed
    first_suite = {key: place for place, keys in reversed(list(enumerate(self.unreported.values())))
                   for key in keys}
    self.order = {key: (key not in own, first_suite[key], -job.cost)
                  for key, job in self.pending.items()}
    self.progress = {key: job.done(folder) for key, job in self.pending.items()}
    self.total_work = sum(job.work for job in self.pending.values())
    self.refreshed = time.monotonic()   # when this machine last saw what others have done
    self.not_before = {key: self.refreshed + REFRESH for key in self.pending if key not in own}
    self.waiting = 0                    # jobs of others that the last message counted

  def do_all(self) -> None:
    """Does all jobs, and waits for those that other shards do.

    Raises:
      JobFailed: a job failed. Without keep_going, the others were stopped and saved.
      KeyboardInterrupt: after SIGINT or SIGTERM, when every worker has saved and ended.
    """
    with self._bar() as bar, _sigterm_as_interrupt():
      try:
        self._report_finished()
        while self.pending or self.workers:
          self._start_ready(bar)
          self._refresh(bar)
          time.sleep(POLL)
          self._collect(bar)
          self._show(bar)
          self._report_finished()
      finally:
        self._stop()
    if self.failed:
      raise JobFailed(self._summary())

  def _bar(self) -> tqdm:
    return tqdm(total=self.total_work, initial=sum(self.progress.values()), unit='step',
                dynamic_ncols=True, smoothing=0.05,
                disable=not self.pending or not sys.stderr.isatty())

  def _show(self, bar: tqdm) -> None:
    for worker in self.workers:
      self.progress[worker.job.key] = worker.job.done(self.folder)
    bar.set_postfix_str('; '.join(f'{w.job.label} {self.progress[w.job.key]}/{w.job.work}'
                                  for w in self.workers), refresh=False)
    bar.update(max(0, sum(self.progress.values()) - bar.n))
    bar.refresh()

  def _report_finished(self) -> None:
    unfinished = {*self.pending, *self.failed, *self.skipped, *(w.job.key for w in self.workers)}
    for name in [name for name, keys in self.unreported.items() if not keys & unfinished]:
      del self.unreported[name]
      self.report(name)

  def _start_ready(self, bar: tqdm) -> None:
    """Starts the jobs that can start, in order, while there is room."""
    now = time.monotonic()
    for key in sorted(self.pending, key=self.order.__getitem__):
      if len(self.workers) == self.max_workers:
        return
      job = self.pending[key]
      unfinished = {*self.pending, *(w.job.key for w in self.workers)}
      same_folder = any(w.job.name == job.name for w in self.workers)
      if (not job.parent or job.parent.key not in unfinished) and not same_folder and (
          now >= self.not_before.get(key, now)):
        self._start(job, bar)

  def _start(self, job: Job, bar: tqdm) -> None:
    """Starts a job, unless another process does it or has just finished it."""
    path = self.folder / job.name
    lock = try_lock(path)
    if lock is None:
      if not self.shard:
        raise ConfigError(f'--runs: {path} is being trained by another process. Wait for it, or '
                          'end it, or choose another folder.')
      self.not_before[job.key] = time.monotonic() + REFRESH
      return
    try:
      if job.finished(self.folder):
        self._finish(job)
        return
      self.workers.append(self._worker(job, path, lock))
    finally:
      os.close(lock)   # the worker's copy keeps it locked
    del self.pending[job.key]
    done = self.progress[job.key]
    how = f'goes on from {done:,} of {job.work:,}' if done else f'{job.work:,} to do'
    _print(bar, f'{job.label}: {how} in {path}')

  def _worker(self, job: Job, path: pathlib.Path, lock: int) -> Worker:
    index = min(set(range(self.max_workers)) - {w.index for w in self.workers})
    if isinstance(job, Run):
      _move_parent(job, path, self.folder)
    with (path / LOG).open('a') as log:
      process = subprocess.Popen(
          [sys.executable, *job.command(self.folder)], stdin=subprocess.DEVNULL, stdout=log,
          stderr=log, pass_fds=(lock,),
          start_new_session=True)   # so that a Ctrl-C reaches it once, through this process
    if hasattr(os, 'sched_setaffinity'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, share_of_cores(cores(), self.max_workers, index))
    return Worker(job, index, process)

  def _collect(self, bar: tqdm) -> None:
    for worker in [w for w in self.workers if w.process.poll() is not None]:
      self.workers.remove(worker)
      if worker.job.finished(self.folder):
        self._finish(worker.job)
        evaluation = metrics.last_evaluation(self.folder / worker.job.name)
        _print(bar, f'{worker.job.label}: finished. {evaluation}'.rstrip())
      else:
        self._fail(worker, bar)

  def _finish(self, job: Job) -> None:
    self.pending.pop(job.key, None)
    self.progress[job.key] = job.work

  def _fail(self, worker: Worker, bar: tqdm) -> None:
    job = worker.job
    log = (self.folder / job.name / LOG).read_text().splitlines()[-LOG_LINES:]
    message = '\n'.join([
        f'{job.label}: failed with exit code {worker.process.returncode}. Its last lines:',
        *(f'  | {line}' for line in log),
        'This runs it alone:', f'  python {shlex.join(job.command(self.folder))}'])
    if not self.keep_going:
      raise JobFailed(message)
    _print(bar, message)
    self.failed[job.key] = job
    for key, other in list(self.pending.items()):   # parents before children
      if other.parent and other.parent.key in {*self.failed, *self.skipped}:
        self.skipped[key] = self.pending.pop(key)

  def _summary(self) -> str:
    """What failed, and what could not be done for that reason."""
    lines = [f'{len(self.failed)} failed:', *(f'  {job.label}: {self.folder / job.name / LOG}'
                                              for job in self.failed.values())]
    if self.skipped:
      lines += [f'{len(self.skipped)} not begun, since they start from these:',
                *(f'  {job.label}' for job in self.skipped.values())]
    return '\n'.join([*lines, 'Not reported: ' + ', '.join(self.unreported)])

  def _refresh(self, bar: tqdm) -> None:
    """Sees what other shards have done, every REFRESH seconds."""
    if not self.shard or time.monotonic() < self.refreshed + REFRESH:
      return
    self.refreshed = time.monotonic()
    for key, job in list(self.pending.items()):
      if job.finished(self.folder):
        self._finish(job)
      else:
        self.progress[key] = job.done(self.folder)
    waiting = 0 if self.workers else len(self.pending)
    if waiting not in (0, self.waiting):
      _print(bar, f'waiting for other machines: {waiting} jobs are not finished')
    self.waiting = waiting

  def _stop(self) -> None:
    """Lets the workers save and end; a second Ctrl-C kills them."""
    for worker in self.workers:
      worker.process.terminate()   # a process that a shell started with & ignores SIGINT
    try:
      for worker in self.workers:
        worker.process.wait()
    except KeyboardInterrupt:
      for worker in self.workers:
        worker.process.kill()
      raise


def _print(bar: tqdm, text: str) -> None:
  bar.write(text, file=sys.stderr)
  sys.stderr.flush()


def _move_parent(run: Run, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Writes the parent's present path into config.json, so that a run resumes in a moved folder."""
  file = path / 'config.json'
  if run.parent and file.exists():
    config = workdir.read_json(file)
    if config['init']['parent'] != run.parent_path(folder):
      config['init']['parent'] = run.parent_path(folder)
      file.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')


@contextlib.contextmanager
def _sigterm_as_interrupt():
  """Makes SIGTERM raise KeyboardInterrupt, as Ctrl-C does.

  Only the first: SLURM may send it to this process and to the shell around it, which passes it on,
  and a second KeyboardInterrupt would end the workers before they have saved.
  """
  def receive(number, _frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt
  old = signal.signal(signal.SIGTERM, receive)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)
