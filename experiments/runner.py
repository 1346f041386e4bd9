"""Trains the runs of a suite: one process per run, several at a time, under one progress bar.

Each worker is `python -m moejax.main` with its own share of the cores, so that two of them do not
fight over one. A worker holds a lock on its run's workdir for as long as it lives, so that a second
suite, or one started over an orphaned worker, cannot train the same run at the same time.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

from tqdm import tqdm

from experiments.suite import Run
from moejax.config import ConfigError
from moejax.train import metrics

POLL = 0.5        # seconds between looks at the workers
LOG_LINES = 20    # shown of a failed run
LOG = 'log.txt'   # in a run's workdir: what its worker printed


class Failed(Exception):
  """A run failed; the message has its last lines and the command that reproduces it."""


@dataclasses.dataclass
class Worker:
  """A process that trains a run, on `cores` (None: wherever the system puts it)."""
  run: Run
  path: pathlib.Path
  slot: int
  process: subprocess.Popen

  def steps_done(self) -> int:
    return steps_done(self.path)


def cores() -> list[int]:
  """The cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def steps_done(path: pathlib.Path) -> int:
  """Steps a run has taken, as far as its files say."""
  try:
    first = json.loads((path / 'run.json').read_text())['first_step']
    status = json.loads((path / 'status.json').read_text())['step']
  except (OSError, ValueError):   # not there yet
    return 0
  timed = metrics.read_lines(path / 'timing.jsonl')
  return max(status, timed[-1]['step'] if timed else 0) - first


class Runner:
  """Trains runs that are not finished yet.

  Args:
    runs: parents before children.
    folder: of the workdirs.
    jobs: workers at a time; each gets an equal share of the cores.
  """

  def __init__(self, runs: list[Run], folder: pathlib.Path, jobs: int):
    self.folder, self.jobs = folder, jobs
    self.pending = [run for run in runs if not run.finished(folder)]
    self.found = len(runs) - len(self.pending)
    self.workers: list[Worker] = []
    self.total = sum(run.settings.steps for run in self.pending)
    self.past = 0   # steps of the runs this call finished

  def train(self) -> None:
    """Trains them all.

    Raises:
      Failed: a run failed; the others were stopped and saved.
      KeyboardInterrupt: after SIGINT or SIGTERM, when every worker has saved and ended.
    """
    if not self.pending:
      return
    with self._bar() as bar, _terminate_as_interrupt():
      try:
        while self.pending or self.workers:
          self._start_ready(bar)
          time.sleep(POLL)
          self._collect(bar)
          self._show(bar)
      finally:
        self._stop()

  def _bar(self) -> tqdm:
    done = sum(steps_done(self.folder / run.name) for run in self.pending)
    return tqdm(total=self.total, initial=done, unit='step', dynamic_ncols=True, smoothing=0.05,
                disable=not sys.stderr.isatty())

  def _show(self, bar: tqdm) -> None:
    ahead = sum(steps_done(self.folder / run.name) for run in self.pending)   # stopped earlier
    running = [(w.run, w.steps_done()) for w in self.workers]
    bar.set_postfix_str('; '.join(f'{run.label} {n}/{run.settings.steps}' for run, n in running),
                        refresh=False)
    bar.update(max(0, self.past + ahead + sum(n for _, n in running) - bar.n))
    bar.refresh()

  def _start_ready(self, bar: tqdm) -> None:
    """Starts pending runs whose parent is finished while there is room; the costliest first."""
    waiting = {run.key for run in self.pending} | {w.run.key for w in self.workers}
    ready = [run for run in self.pending if not run.parent or run.parent.key not in waiting]
    ready.sort(key=lambda run: run.settings.steps * run.step_flops, reverse=True)
    for run in ready[:self.jobs - len(self.workers)]:
      self.pending.remove(run)
      self.workers.append(self._start(run))
      self._say(bar, f'{run.label}: {run.settings.steps:,} steps in {self.folder / run.name}')

  def _start(self, run: Run) -> Worker:
    path = self.folder / run.name
    slot = min(set(range(self.jobs)) - {w.slot for w in self.workers})
    lock = _lock(path)
    try:
      _move_parent(run, path, self.folder)
      with (path / LOG).open('a') as log:
        process = subprocess.Popen(
            [sys.executable, *run.command(self.folder)], stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, env=_environment(), pass_fds=(lock,),
            start_new_session=True)   # so that a Ctrl-C reaches it once, through us
    finally:
      os.close(lock)   # the worker's copy keeps it locked
    if hasattr(os, 'sched_setaffinity'):
      with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process.pid, share(cores(), self.jobs, slot))
    return Worker(run, path, slot, process)

  def _collect(self, bar: tqdm) -> None:
    for worker in [w for w in self.workers if w.process.poll() is not None]:
      self.workers.remove(worker)
      if not worker.run.finished(self.folder):
        raise Failed(self._failure(worker))
      self.past += worker.run.settings.steps
      self._say(bar, f'{worker.run.label}: finished. {metrics.last_evaluation(worker.path)}')

  def _failure(self, worker: Worker) -> str:
    lines = (worker.path / LOG).read_text().splitlines()[-LOG_LINES:]
    return '\n'.join([
        f'{worker.run.label}: failed with exit code {worker.process.returncode}. Its last lines:',
        *(f'  | {line}' for line in lines),
        'This runs it alone:', f'  python {shlex.join(worker.run.command(self.folder))}'])

  def _stop(self) -> None:
    """Lets the workers save and end; a second Ctrl-C ends them at once."""
    for worker in self.workers:
      worker.process.send_signal(signal.SIGINT)
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


def _environment() -> dict[str, str]:
  """A worker's environment: without these settings malloc returns memory at every step."""
  return {'MALLOC_TRIM_THRESHOLD_': str(2**30), 'MALLOC_MMAP_THRESHOLD_': str(2**28), **os.environ}


def _lock(path: pathlib.Path) -> int:
  """A descriptor that holds the lock of a run's workdir. Raises ConfigError if another does."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
  except OSError as error:
    raise ConfigError(f'--runs: cannot make {path} ({error.strerror}). Choose a folder that can be '
                      'written.') from error
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    os.close(descriptor)
    raise ConfigError(f'--runs: {path} is being trained by another process. Wait for it, or end '
                      'it, or choose another folder.') from error
  return descriptor


def _move_parent(run: Run, path: pathlib.Path, folder: pathlib.Path) -> None:
  """Lets a run that was stopped go on after its folder moved: the parent is the one of its key."""
  file = path / 'config.json'
  if run.parent and file.exists():
    there = json.loads(file.read_text())
    if there['init']['parent'] != run.parent_path(folder):
      there['init']['parent'] = run.parent_path(folder)
      file.write_text(json.dumps(there, indent=2, sort_keys=True) + '\n')


@contextlib.contextmanager
def _terminate_as_interrupt():
  """SIGTERM raises KeyboardInterrupt, as Ctrl-C does."""
  def receive(number, _frame):
    raise KeyboardInterrupt
  old = signal.signal(signal.SIGTERM, receive)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)
