"""What malloc does with a step's buffers."""

import subprocess
import sys

import pytest

from configs.pretrain import vit_glyphs
from moejax.train import config as run_config
from moejax.train import loop, malloc, memory
from moejax.train.plan import Plan
from moejax.train.validate import validate
from tests import fork_server

SETUP = """
import ctypes, pathlib, resource
from moejax.train import malloc
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype = ctypes.c_size_t
def touched(mebibytes):
  buffer = libc.malloc(mebibytes << 20)
  ctypes.memset(buffer, 1, mebibytes << 20)
  return buffer
"""
FAULTS = """
assert malloc.keep_freed()
for _ in range(6):   # 2 buffers, written and freed
  before, buffers = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, [touched(48), touched(48)]
  for buffer in buffers: libc.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
GIGABYTES = """
assert malloc.keep_freed()
buffers = [libc.malloc(1 << 30) for _ in range(3)]   # not touched, so they cost nothing
end = libc.sbrk(0)
for buffer in buffers: libc.free(buffer)
print(end - libc.sbrk(0))
"""
GROWTH = """
malloc.keep_freed()
if {large}: assert malloc.free_large(1, 7)
def resident():   # MiB
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) / 256
before = resident()
step = touched(96)
touched(1)                # what the step made
libc.free(step)
touched(8)                # what a checkpoint is written from
libc.free(touched(96))    # the next step
print(resident() - before)
"""


@pytest.mark.parametrize('script, least, most', [
    (FAULTS, 0, 2 * (48 << 20) // 4096 / 100),   # a hundredth of the pages
    (GIGABYTES, 0, 0),
    (GROWTH.format(large=False), 2 * 95, 220),   # both steps' stay
    (GROWTH.format(large=True), 8, 12)],         # what was not freed
    ids=['kept for the next step', 'gigabytes too', 'all', 'not the large ones'])
def test_what_a_step_frees(script, least, most):
  if not sys.platform.startswith('linux'):
    assert not malloc.keep_freed()
    return
  done = subprocess.run([sys.executable, '-c', SETUP + script], check=True, capture_output=True)
  assert least <= float(done.stdout) <= most


@pytest.mark.parametrize('needed, available', [(1, 8), (0, 0), (1, None)])
def test_where_there_is_room_or_nobody_knows_they_are_kept(needed, available, monkeypatch):
  monkeypatch.setattr(malloc.ctypes, 'CDLL', None)
  assert malloc.free_large(needed, available) is False


def test_a_run_says_what_it_needs_and_what_there_is(monkeypatch):
  config = run_config.resolve(vit_glyphs.get_config('runlocal'))
  forecast, given = memory.Forecast(params=3, optimizer=4, saving=2, available=50), []
  monkeypatch.setattr(memory, 'check', lambda programs, available: forecast)
  monkeypatch.setattr(malloc, 'free_large', lambda *args: given.append(args))
  loop.Trainer(validate(config, Plan.make(config, 0))).compile()
  assert given == [(3 + 4 + 2, 50)]


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


def test_a_run_keeps_it_before_anything_else(tmp_path):
  done = fork_server.run([sys.executable, '-c', """
import sys
from absl import app
from moejax import main
main.malloc.keep_freed = lambda: sys.exit('kept')
app.run(main.main, flags_parser=main.parse_flags)
""", '--config=configs/pretrain/vit_glyphs.py:runlocal', f'--workdir={tmp_path}'],
                         capture_output=True, cwd=fork_server.ROOT)
  assert done.stderr.splitlines()[-1] == 'kept' and not list(tmp_path.iterdir())
