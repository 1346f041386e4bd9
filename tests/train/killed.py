"""Runs one training in this process and ends it at a chosen moment, as a machine failure would.

python -m tests.train.killed MOMENT CONFIG.json WORKDIR [PORT PROCESSES PROCESS]; MOMENT is 'never',
'compiling', 'saving', 'evaluating' or 'step' (SIGKILL there), 'sigterm' or 'hang' (in a step), or
'waits' (that another hangs is noticed within seconds). The last three arguments make it one of
several processes. What batches held goes to WORKDIR.PROCESS.batches.
"""

import hashlib
import json
import os
import pathlib
import signal
import sys
import threading
import time
from unittest import mock

from jax._src import compiler

from moejax.checkpoints import orbax
from moejax.cluster import processes as hosts
from moejax.data import pipeline
from moejax.train import config as run_config
from moejax.train import loop, run_log
from tests.train.small import AT_EVAL, AT_STEP

STALL = 5   # seconds; nothing is compiled after AT_STEP


def kill(number=signal.SIGKILL):
  os.kill(os.getpid(), number)


def before(owner, name, action):
  """Makes owner.name call action with its arguments first."""
  original = getattr(owner, name)

  def patched(self, *args, **kwargs):
    action(*args)
    return original(self, *args, **kwargs)

  setattr(owner, name, patched)


def keep_compiled():
  """Makes every process write to the compile cache, as each has programs of its own.

  JAX lets process 0 alone write, and the others would compile everything anew in every test.
  """
  write = compiler._cache_write

  def patched(*args):
    with mock.patch.object(compiler.distributed.global_state, 'process_id', 0):
      write(*args)
  compiler._cache_write = patched


def die_while_saving(step, directory):
  """SIGKILL as soon as the save of this step has begun to write."""
  while not list(directory.glob(f'{step}*tmp*')):
    time.sleep(0.0005)
  kill()


def prepare(moment, path, joined):
  if moment == 'compiling':
    before(loop.Trainer, 'compile', lambda: threading.Timer(0.5, kill).start())
  elif moment in ('step', 'sigterm', 'hang', 'waits'):
    act = {'step': kill, 'sigterm': lambda: kill(signal.SIGTERM), 'hang': lambda: time.sleep(600),
           'waits': lambda: setattr(joined._watchdog, 'stall', STALL)}[moment]
    before(run_log.Log, 'tick', lambda step, _: step == AT_STEP and act())
  elif moment == 'saving':
    def on_save(step, *_):
      if step == AT_EVAL:
        directory = pathlib.Path(path) / orbax.SUBDIR
        threading.Thread(target=die_while_saving, args=(step, directory), daemon=True).start()
    before(orbax.Writer, 'save', on_save)
  elif moment == 'evaluating':
    before(run_log.Log, 'report', lambda step, split, _: (
        step == AT_EVAL and split == 'validation' and kill()))


def note_batches(path):
  """Appends a line [step, {example: digest of its image}] for each batch a process loads."""
  original = pipeline.Dataset.train_batches

  def train_batches(self, start, stop):
    with open(path, 'a', encoding='utf-8') as file:
      for step, batch in zip(range(start, stop), original(self, start, stop)):
        images = {int(n): hashlib.sha256(image.tobytes()).hexdigest()[:16]
                  for n, image in zip(batch['index'], batch['image'])}
        file.write(json.dumps([step, images]) + '\n')
        yield batch
  pipeline.Dataset.train_batches = train_batches


if __name__ == '__main__':
  moment, config, path, *among = sys.argv[1:]
  port, processes, process = map(int, among or (0, 0, -1))
  run = run_config.from_dict(json.loads(pathlib.Path(config).read_text()))
  keep_compiled()
  note_batches(f'{path}.{max(process, 0)}.batches')
  joined = hosts.join(hosts.Launch(
      coordinator=f'localhost:{port}' if port else '', processes=processes, process=process,
      join_seconds=120, lost_seconds=20))
  prepare(moment, path, joined)
  sys.exit(loop.run(run, path, joined))
