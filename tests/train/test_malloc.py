"""What malloc does with a step's buffers."""

import subprocess
import sys

import pytest

from configs.pretrain import vit_glyphs
from moejax.train import config as run_config
from moejax.train import loop, malloc, memory
from moejax.train.plan import Plan
from moejax.train.validate import validate

FAULTS = """
import ctypes, resource, sys
from moejax.train import malloc
if {keep}: assert malloc.keep_freed()
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


def test_what_a_step_frees_is_there_for_the_next():
  pages = 5 * 3 * (48 << 20) // 4096
  if sys.platform.startswith('linux'):
    assert faults(keep=True) < pages / 100
  else:
    assert not malloc.keep_freed()


GIGABYTES = """
import ctypes
from moejax.train import malloc
assert malloc.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_size_t
buffers = [libc.malloc(1 << 30) for _ in range(3)]   # not touched, so they cost nothing
end = libc.sbrk(0)
for buffer in buffers: libc.free(buffer)
print(end - libc.sbrk(0))
"""


def test_more_than_two_gigabytes_are_kept_too():
  if sys.platform.startswith('linux'):
    done = subprocess.run([sys.executable, '-c', GIGABYTES], check=True, capture_output=True,
                          text=True)
    assert int(done.stdout) == 0
  else:
    assert not malloc.keep_freed()


GROWTH = """
import ctypes, pathlib
from moejax.train import malloc
malloc.keep_freed()
if {large}: assert malloc.free_large(1, 7)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():   # MiB
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) / 256
def touched(size):
  buffer = libc.malloc(size)
  ctypes.memset(buffer, 1, size)
  return buffer
before = resident()
step = touched(96 << 20)
touched(1 << 20)               # what the step made
libc.free(step)
touched(8 << 20)               # what a checkpoint is written from
libc.free(touched(96 << 20))   # the next step
print(resident() - before)
"""


def growth(large: bool) -> float:
  return float(subprocess.run([sys.executable, '-c', GROWTH.format(large=large)], check=True,
                              capture_output=True, text=True).stdout)


def test_where_memory_is_scarce_large_temporaries_do_not_stay_behind():
  if sys.platform.startswith('linux'):
    assert growth(large=False) > 2 * 95   # both steps'
    assert growth(large=True) < 12        # what was not freed
  else:
    assert not malloc.free_large(1, 7)


@pytest.mark.parametrize('needed, available', [(1, 8), (0, 0), (1, None)])
def test_where_there_is_room_or_nobody_knows_they_are_kept(needed, available, monkeypatch):
  monkeypatch.setattr(malloc.ctypes, 'CDLL', None)
  assert malloc.free_large(needed, available) is False


def test_a_run_says_what_it_needs_and_what_there_is(monkeypatch):
  config = run_config.resolve(vit_glyphs.get_config('runlocal'))
  found, said = memory.Forecast(params=3, optimizer=4, saving=2, available=50), []
  monkeypatch.setattr(memory, 'check', lambda programs, available: found)
  monkeypatch.setattr(malloc, 'free_large', lambda *args: said.append(args))
  loop.Trainer(validate(config, Plan.make(config, 0))).compile()
  assert said == [(3 + 4 + 2, 50)]


@pytest.mark.parametrize('platforms, devices, cpu', [
    ('', (), True), ('', ('nvidia0',), False), ('cpu', ('nvidia0',), True), ('tpu', (), True),
    ('', ('accel0', 'accel1'), False), ('', ('nvidiactl',), True)])
def test_where_an_accelerator_computes_malloc_is_left_alone(platforms, devices, cpu, tmp_path,
                                                           monkeypatch):
  for name in devices:
    (tmp_path / name).touch()
  monkeypatch.setattr(malloc, 'ACCELERATORS', [pattern.replace('/dev', str(tmp_path))
                                               for pattern in malloc.ACCELERATORS])
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  called = []
  monkeypatch.setattr(malloc.ctypes, 'CDLL', lambda _: called.append(1))
  assert malloc.keep_freed() is False and len(called) == cpu * sys.platform.startswith('linux')


CALLED = """
import sys
from absl import app
from moejax import main
main.malloc.keep_freed = lambda: sys.exit('kept')
app.run(main.main, flags_parser=main.parse_flags)
"""


def test_a_run_keeps_it_before_anything_else(tmp_path):
  done = subprocess.run([sys.executable, '-c', CALLED,
                         '--config=configs/pretrain/vit_glyphs.py:runlocal',
                         f'--workdir={tmp_path}'], capture_output=True, text=True)
  assert done.stderr.splitlines()[-1] == 'kept' and not list(tmp_path.iterdir())
