"""Writes the log of a run (progress bar, metrics, TensorBoard, timing), and catches its signals."""

import collections
import contextlib
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from moejax.cluster.processes import AHEAD
from moejax.train import metrics
from moejax.train.workdir import Workdir


class Log:
  """Writes everything a run reports; only process 0 writes files.

  Args:
    workdir: of the run.
    first, done, end: global steps: of the run's start, done so far (None: no checkpoint yet), and
      of its end. Lines that an earlier attempt wrote past `done` are cut off.
    moved: called with where the run is whenever it got further.
  """

  def __init__(self, workdir: Workdir, first: int, done: int | None, end: int,
               moved: Callable[[str], None] = lambda at: None):
    self.workdir, self._moved = workdir, moved
    self.metrics = self.timing = self.board = None
    if workdir.writes:
      keep = -1 if done is None else done
      self.metrics = metrics.JsonLines(workdir.path / 'metrics.jsonl', keep)
      self.timing = metrics.JsonLines(workdir.path / 'timing.jsonl', keep)
      self.board = SummaryWriter(str(workdir.path / 'tensorboard'), purge_step=keep + 1)
    self.terminal = sys.stderr.isatty()
    self.bar = tqdm(total=end - first, initial=(done or first) - first, unit='step',
                    disable=not (self.terminal and workdir.writes), dynamic_ncols=True)
    self._running = collections.deque()
    self._clock, self._timed = None, 0
    self._at = first if done is None else done

  def __enter__(self) -> 'Log':
    return self

  def __exit__(self, *exc) -> None:
    self.bar.close()
    for part in (self.metrics, self.timing, self.board):
      if part is not None:
        part.close()

  def tick(self, step: int, marker: jax.Array) -> None:
    """Notes a call of the train step up to `step`; waits until at most AHEAD calls are running.

    marker: an output of the call that is not donated to the next.
    """
    steps, self._at = step - self._at, step
    self._running.append(marker)
    if len(self._running) > AHEAD:
      jax.block_until_ready(self._running.popleft())
    if self._clock is None:   # the first call may load libraries; time from its end
      jax.block_until_ready(marker)
      self.phase('training', step)
      self._clock, self._timed = time.perf_counter(), -steps
    self._timed += steps
    self._moved(f'training, step {step}')
    self.bar.update(steps)

  def train(self, step: int, window: dict) -> dict[str, float]:
    """Reports a window of train metrics, given as sums; returns them as means."""
    values = metrics.summarize(jax.device_get(window))
    now = time.perf_counter()
    if self._timed > 0 and self.timing:   # seconds of the steps since the last, without evaluations
      self.timing.write(step, steps=self._timed, seconds=round(now - self._clock, 6))
    self._clock, self._timed = now, 0
    self.report(step, 'train', values)
    return values

  def report(self, step: int, split: str, values: dict[str, float]) -> None:
    """Writes one line of metrics. split: 'train', 'probe', or the split that was evaluated."""
    if not self.workdir.writes:
      return
    named = {f'{split}/{k}': v for k, v in values.items()}
    self.metrics.write(step, **named)
    for name, value in named.items():
      self.board.add_scalar(name, value, step)
    main = f'{split} ' + metrics.headline(values)
    if self.terminal:
      self.bar.set_postfix_str(main)
    else:
      print(f'step {step}: {main}', file=sys.stderr, flush=True)

  def phase(self, name: str, step: int) -> None:
    """Writes what the run is doing into status.json and before the progress bar."""
    self.workdir.status(name, step)
    self._moved(f'{name}, step {step}')
    self.bar.set_description_str(name)

  @contextlib.contextmanager
  def pause(self, phase: str, step: int):
    """Context with status `phase` whose time does not count as that of train steps."""
    jax.block_until_ready(list(self._running))   # their time is that of train steps
    started = time.perf_counter()
    self.phase(phase, step)
    yield
    self.phase('training', step)
    if self._clock is not None:
      self._clock += time.perf_counter() - started

  def watched(self, batches: Iterable) -> Iterator:
    """Yields the batches of an evaluation; each is a sign of life."""
    for number, batch in enumerate(batches, 1):
      yield batch
      self._moved(f'evaluating, batch {number}, step {self._at}')

  def say(self, text: str) -> None:
    """Writes a line for people above the progress bar."""
    if self.workdir.writes:
      self.bar.write(text, file=sys.stderr)


@contextlib.contextmanager
def stop_signals():
  """Context in which Ctrl-C and SIGTERM set `signal` of what is yielded instead of raising.

  A second Ctrl-C ends the process at once.
  """
  stop, old = types.SimpleNamespace(signal=None), {}

  def receive(number, _frame):
    stop.signal = number
    print('\nstopping: saving a checkpoint first (again to stop without)', file=sys.stderr)
    signal.signal(signal.SIGINT, old[signal.SIGINT])
    # A second SIGTERM is ignored: schedulers signal a process and its parent, which passes it on.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

  for s in (signal.SIGINT, signal.SIGTERM):
    old[s] = signal.signal(s, receive)
  try:
    yield stop
  finally:
    for s, handler in old.items():
      signal.signal(s, signal.SIG_DFL if handler is None else handler)   # None: not Python's
