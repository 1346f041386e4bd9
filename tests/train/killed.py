"""Runs one training in this process and ends it at a chosen moment, as a machine failure would.

python -m tests.train.killed MOMENT CONFIG.json WORKDIR; MOMENT is 'never', 'compiling', 'step',
'saving' or 'evaluating' (SIGKILL there), or 'sigterm' (in a step).
"""

import json
import os
import pathlib
import signal
import sys
import threading
import time

from moejax.checkpoints import native
from moejax.train import loop, progress, settings

AT_STEP = 27   # between two checkpoints and inside a window of train metrics


def kill(number=signal.SIGKILL):
  os.kill(os.getpid(), number)


def before(owner, name, action):
  """Makes owner.name call action with its arguments first."""
  original = getattr(owner, name)

  def patched(self, *args, **kwargs):
    action(*args)
    return original(self, *args, **kwargs)

  setattr(owner, name, patched)


def die_while_saving(step, directory):
  """SIGKILL as soon as the save of this step has begun to write."""
  while not list(directory.glob(f'{step}*tmp*')):
    time.sleep(0.0005)
  kill()


def prepare(moment, path):
  if moment == 'compiling':
    before(loop.Program, 'compile', lambda: threading.Timer(0.5, kill).start())
  elif moment in ('step', 'sigterm'):
    number = {'step': signal.SIGKILL, 'sigterm': signal.SIGTERM}[moment]
    before(progress.Log, 'tick', lambda step, _: step == AT_STEP and kill(number))
  elif moment == 'saving':
    def on_save(step, *_):
      if step == 20:
        directory = pathlib.Path(path) / native.SUBDIR
        threading.Thread(target=die_while_saving, args=(step, directory), daemon=True).start()
    before(native.Writer, 'save', on_save)
  elif moment == 'evaluating':
    before(progress.Log, 'report', lambda step, split, _: (
        step == 20 and split == 'validation' and kill()))


if __name__ == '__main__':
  moment, config, path = sys.argv[1:]
  prepare(moment, path)
  run = settings.from_dict(json.loads(pathlib.Path(config).read_text()))
  sys.exit(loop.run(run, path))
