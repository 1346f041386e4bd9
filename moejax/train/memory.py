"""The host's memory between train steps.

XLA's CPU backend takes the buffers of a step from malloc and frees them after it. glibc returns
freed memory to the system where it can, large buffers always, and the system hands out zeroed pages
at their next touch. For a small T5 with experts that was thousands of page faults a step, and two
fifths of its time (measured in experiments/LOG.md).
"""

import ctypes
import glob
import os
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8   # malloc.h
ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/kfd')


def keep_freed() -> bool:
  """Makes malloc keep what is freed for the next step, from one heap; whether it did.

  Call it before JAX is used: a thread that exists keeps its own heap. It does nothing where there
  is an accelerator, whose steps take nothing from the host's malloc, nor without glibc.
  """
  if not sys.platform.startswith('linux') or not _computes_on_cpu():
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:   # not glibc
    return False
  return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(ARENA_MAX, 1)])


def _computes_on_cpu() -> bool:
  """As far as can be told without JAX."""
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, ACCELERATORS))
