"""What malloc does with a step's buffers."""

import subprocess
import sys

import jax
import pytest

from experiments.suite import Run
from moejax.train import loop, memory
from moejax.train.plan import Plan

FAULTS = """
import ctypes, resource, sys
from moejax.train import memory
if {keep}: assert memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def step():   # 3 buffers of 48 MiB, written and freed
  buffers = [libc.malloc(48 << 20) for _ in range(3)]
  for buffer in buffers: ctypes.memset(buffer, 1, 48 << 20)
  for buffer in buffers: libc.free(buffer)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
  return int(subprocess.run([sys.executable, '-c', FAULTS.format(keep=keep)], check=True,
                            capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='about glibc')
def test_what_a_step_frees_is_there_for_the_next():
  pages = 5 * 3 * (48 << 20) // 4096
  assert faults(keep=True) < pages / 100


class Stop(Exception):
  pass


@pytest.mark.parametrize('backend, kept', [('cpu', 1), ('gpu', 0), ('tpu', 0)])
def test_only_a_program_that_computes_on_the_cpu_keeps_it(backend, kept, monkeypatch):
  def build(_):
    raise Stop
  calls = []
  monkeypatch.setattr(memory, 'keep_freed', lambda: calls.append(1))
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  monkeypatch.setattr(loop.models, 'build', build)   # what comes next does not matter here
  run = Run('', 'vit_glyphs', {}, arg='runlocal').settings
  with pytest.raises(Stop):
    loop.Program(run, Plan.make(run, 0))
  assert len(calls) == kept
