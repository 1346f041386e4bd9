"""The host's memory between train steps.

XLA's CPU backend takes the buffers of a step from malloc and frees them after it. glibc returns
freed memory to the system where it can, large buffers always, and the system hands out zeroed pages
at their next touch: 8,000 page faults a step, and half of its time, for a small T5 with experts.
"""

import ctypes
import functools
import sys

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8   # malloc.h


@functools.cache
def keep_freed() -> bool:
  """Makes malloc keep what is freed for the next step, from one heap; whether it could.

  For a process that computes on the CPU: on an accelerator a step takes nothing from malloc. Other
  systems' malloc is left as it is.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:   # not glibc
    return False
  return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, 2**31 - 1), mallopt(ARENA_MAX, 1)])
