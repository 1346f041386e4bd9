"""Measures the host's free memory, and sets whether malloc keeps buffers between train steps.

XLA's CPU backend allocates the buffers of a step by malloc and frees them after it. glibc returns
freed memory to the system where it can (large buffers always), and the system then provides zeroed
pages on the next access. For a small T5 with experts this caused thousands of page faults a step,
and took two fifths of the step's time (measured in experiments/LOG.md). In a running process only
mallopt changes this, hence ctypes.
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
LARGE = 2**25      # bytes; glibc's upper bound of MMAP_THRESHOLD
MOST = 2**31 - 1   # bytes; the largest argument of mallopt
ROOM = 8
ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/accel*', '/dev/vfio/[0-9]*', '/dev/kfd')

MEMINFO, CGROUPS = pathlib.Path('/proc/meminfo'), pathlib.Path('/sys/fs/cgroup')
BOOT = pathlib.Path('/proc/sys/kernel/random/boot_id')
# Of a container, by version 2 and 1 of its cgroup: limit, use, and the part of it that is cache.
CONTAINER = (('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
             ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
              'total_inactive_file'))


def free() -> int | None:
  """Returns bytes that the machine or this container still has, the fewer; None if not known."""
  if not MEMINFO.exists():   # not Linux
    return None
  sizes = [2**10 * int(re.search(r'MemAvailable: *(\d+) kB', MEMINFO.read_text())[1])]
  for *names, cached in CONTAINER:
    paths = [CGROUPS / name for name in names]
    if all(path.exists() for path in paths):
      limit, used, stat = (path.read_text().strip() for path in paths)
      if limit != 'max':
        cache = re.search(rf'^{cached} (\d+)$', stat, re.MULTILINE)
        sizes.append(max(0, int(limit) - int(used) + int(cache[1])))
  return min(sizes)


def host() -> str:
  """Returns the name of what `free` measures: a machine since its last boot, or a container."""
  return f'{socket.gethostname()} {BOOT.read_text().strip() if BOOT.exists() else ""}'


def keep_freed() -> bool:
  """Makes malloc keep all that is freed for the next step, in one heap; returns whether it does.

  Call it before JAX is used: a thread that exists keeps its own heap.
  """
  return _set_malloc({MMAP_MAX: 0, TRIM_THRESHOLD: NEVER, ARENA_MAX: 1})


def free_large(needed: int, available: int | None) -> bool:
  """Makes malloc return freed buffers of at least LARGE where memory is scarce.

  A step's temporaries are one buffer. If something takes its place between two steps, such as the
  copy that a checkpoint is written from, the next step gets another place, and the process may come
  to hold three times what it needs. So all is kept only where ROOM times that is there. Zeroed
  pages are expensive: steps with a gigabyte of temporaries took 1.4 to 1.9 times as long with them.

  needed: bytes of the run at its worst moment; available: bytes that it may take, None if not
    known. Returns whether malloc does so now.
  """
  if available is None or ROOM * needed <= available:
    return False
  return _set_malloc({MMAP_THRESHOLD: LARGE, MMAP_MAX: MANY, TRIM_THRESHOLD: MOST})


def _set_malloc(options: dict[int, int]) -> bool:
  """Sets options of glibc's malloc; returns whether it took them.

  Without effect where there is an accelerator, whose steps take nothing from the host's malloc.
  """
  on_cpu = os.environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, ACCELERATORS))
  if not sys.platform.startswith('linux') or not on_cpu:
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except AttributeError:   # not glibc
    return False
  return all([mallopt(option, value) for option, value in options.items()])
