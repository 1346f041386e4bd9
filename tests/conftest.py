"""How tests run: devices, the compile cache, the order of files, and what a session reports.

Every test process sees 8 virtual CPU devices, so that meshes and pmap can be tested anywhere, and
compiles with little optimisation (tests/xla.py). What is compiled is kept for a month.
"""

import collections
import importlib.metadata
import os
import pathlib
import time

import pytest

from tests import xla

DEVICES = 8
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           f' --xla_force_host_platform_device_count={DEVICES} {xla.QUICK}')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
CACHE = (pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
         / 'moejax/tests' / f'jax-{importlib.metadata.version("jax")}')   # `make clean` removes it
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE))   # workers inherit it
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

# What takes long: (beginning of the test's id below tests/, marker, seconds on an idle machine).
# Files with these tests start first, the longest first, so that two workers end together, and
# `make test-quick` leaves these tests out.
LONG = (
    ('experiments/test_smoke.py', 'suites', 130),
    ('processes/', 'processes', 90),
    ('train/test_memory', 'runs', 60),
    ('train/test_parallel.py', 'runs', 65),
    ('train/test_resume.py', 'runs', 20),
    ('aot/test_expert_parallel.py', 'runs', 50),
    ('moe/test_every.py', 'runs', 60),
    ('configs/test_configs.py::test_a_dense_run', 'runs', 60),
    ('models/test_scan.py', 'runs', 60),
    ('train/test_initialize.py', 'runs', 20),
    ('train/test_scan.py', 'runs', 25),
    ('experiments/benchmarks/', 'suites', 60),
    ('train/test_steps_per_call.py', 'runs', 10),
    ('experiments/test_scheduler.py', 'suites', 30),
    ('experiments/test_notebook.py', 'suites', 25),
    ('experiments/test_untrained.py', 'suites', 25),
    ('train/test_loop.py', 'runs', 15),
    ('test_docs.py::test_report', 'suites', 15),
)


def _long(nodeid: str) -> list[tuple[str, str, float]]:
  """Entries of LONG that a test falls under, or of a file those that a test of it falls under."""
  own = nodeid.removeprefix('tests/')
  return [entry for entry in LONG if own.startswith(entry[0]) or entry[0].startswith(f'{own}::')]


def file_of(nodeid: str) -> str:
  return nodeid.partition('::')[0]


@pytest.hookimpl(tryfirst=True)   # before -m selects by marker
def pytest_collection_modifyitems(config, items):
  for item in items:
    for _, kind, _ in _long(item.nodeid):
      item.add_marker(kind)
  if hasattr(config, 'workerinput'):   # a worker: --dist=loadfile takes files in this order
    seconds = {file: sum(n for _, _, n in _long(file))
               for file in {file_of(item.nodeid) for item in items}}
    items.sort(key=lambda item: -seconds[file_of(item.nodeid)])


DESELECTED = pytest.StashKey[collections.Counter]()


def pytest_configure(config):
  config.stash[DESELECTED] = collections.Counter()
  if not hasattr(config, 'workerinput') and CACHE.exists():
    for program in CACHE.iterdir():   # of code that has changed since, most likely
      if program.stat().st_mtime < time.time() - 30 * 24 * 3600:
        program.unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  """What a worker left out; all of them leave out the same."""
  node.config.stash[DESELECTED] |= collections.Counter(node.workeroutput.get('deselected', {}))


def pytest_deselected(items):
  for item in items:
    item.config.stash[DESELECTED][file_of(item.nodeid)] += 1


def pytest_sessionfinish(session):
  """A skipped test fails the session: a file skipped as a whole would otherwise read as green."""
  if hasattr(session.config, 'workeroutput'):
    session.config.workeroutput['deselected'] = dict(session.config.stash[DESELECTED])
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')   # None in a worker
  skipped = reporter.stats.get('skipped', []) if reporter else []
  if skipped and session.exitstatus == 0:
    reporter.write_line('skipped, which counts as failure: '
                        + ', '.join(sorted({report.nodeid for report in skipped})), red=True)
    session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
  """Names the files with tests that -m or -k left out; with --durations, seconds by file."""
  if left_out := config.stash[DESELECTED]:
    terminalreporter.write_line('not run: ' + ', '.join(
        f'{count} tests of {file}' for file, count in sorted(left_out.items())), yellow=True)
  if config.option.durations:
    seconds = collections.Counter()
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
      if hasattr(report, 'duration'):
        seconds[file_of(report.nodeid)] += report.duration
    terminalreporter.section(f'seconds by file, {sum(seconds.values()):.0f} in all')
    for file, n in seconds.most_common(config.option.durations):
      terminalreporter.write_line(f'{n:6.0f}  {file}')
