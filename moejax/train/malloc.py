"""The host's memory: what is free, and what malloc does with it between train steps.

XLA's CPU backend takes the buffers of a step from malloc and frees them after it. glibc returns
freed memory to the system where it can, large buffers always, and the system hands out zeroed pages
at their next touch. For a small T5 with experts that was thousands of page faults a step, and two
fifths of its time (measured in experiments/LOG.md).
"""

import ctypes
import glob
import os
import pathlib
import re
import socket
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8   # malloc.h
NEVER, MANY = -1, 2**16
LARGE = 2**25      # bytes; glibc's own upper bound of MMAP_THRESHOLD
MOST = 2**31 - 1   # bytes; what mallopt can be told
ROOM = 8
ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/kfd')

MEMINFO, CGROUPS = pathlib.Path('/proc/meminfo'), pathlib.Path('/sys/fs/cgroup')
BOOT = pathlib.Path('/proc/sys/kernel/random/boot_id')
# Of a container, by version 2 and 1 of its cgroup: limit, use, and what of it the system can drop.
CONTAINER = (('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
             ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
              'total_inactive_file'))


def free() -> int | None:
  """Bytes that processes may still take, of the machine or of this container, whichever has less;
  None if that cannot be told."""
  if not MEMINFO.exists():   # not Linux
    return None
  found = [2**10 * int(re.search(r'MemAvailable: *(\d+) kB', MEMINFO.read_text())[1])]
  for *names, dropped in CONTAINER:
    paths = [CGROUPS / name for name in names]
    if all(path.exists() for path in paths):
      limit, used, stat = (path.read_text().strip() for path in paths)
      if limit != 'max':
        cache = re.search(rf'^{dropped} (\d+)$', stat, re.MULTILINE)
        found.append(max(0, int(limit) - int(used) + int(cache[1])))
  return min(found)


def host() -> str:
  """The same in processes that `free` tells of the same memory: those of a machine as it was
  booted, and of one container, which has a name and may have a limit of its own."""
  return f'{socket.gethostname()} {BOOT.read_text().strip() if BOOT.exists() else ""}'


def keep_freed() -> bool:
  """Makes malloc keep all that is freed for the next step, from one heap; whether it did.

  Call it before JAX is used: a thread that exists keeps its own heap. It does nothing where there
  is an accelerator, whose steps take nothing from the host's malloc, nor without glibc.
  """
  if not sys.platform.startswith('linux') or not _computes_on_cpu():
    return False
  return _set_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: NEVER, ARENA_MAX: 1})


def free_large(needed: int, available: int | None) -> bool:
  """Makes malloc give freed buffers of at least LARGE back after all, where memory is scarce;
  whether it did.

  A step's temporaries are one buffer. Whatever is put into its place between two steps, such as the
  copy that a checkpoint is written from, sends the next step elsewhere, beside what was kept: the
  process may come to hold three times what it needs. So all is kept only where ROOM times that is
  there, enough for others too. Zeroed pages are not cheap: steps with a gigabyte of temporaries
  took 1.4 to 1.9 times as long with them (experiments/LOG.md).

  Args:
    needed, available: bytes, of the run at its worst moment, and what it may take; None: not known.
  """
  if available is None or ROOM * needed <= available:
    return False
  if not sys.platform.startswith('linux') or not _computes_on_cpu():
    return False
  return _set_malloc({MMAP_THRESHOLD: LARGE, MMAP_MAX: MANY, TRIM_THRESHOLD: MOST})


def _set_malloc(options: dict[int, int]) -> bool:
  """Whether there is glibc's malloc, and it took them."""
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:   # not glibc
    return False
  return all([mallopt(option, value) for option, value in options.items()])


def _computes_on_cpu() -> bool:
  """As far as can be told without JAX."""
  return os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, ACCELERATORS))
