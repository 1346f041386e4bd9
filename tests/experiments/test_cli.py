"""What the commands of experiments have in common."""

import os
import subprocess
import sys


def test_a_reader_that_has_seen_enough_is_no_traceback():
  """As in `... | head`: nobody reads the pipe any more when the output is flushed."""
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run([sys.executable, '-m', 'experiments.main', '--list'], stdout=write,
                        stderr=subprocess.PIPE, text=True, check=False)
  os.close(write)
  assert (done.returncode, done.stderr) == (1, '')
