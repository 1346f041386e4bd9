"""Every test process sees 8 virtual CPU devices, so that meshes and pmap can be tested anywhere.

XLA compiles quickly here (tests/xla.py). Processes of one session share what they compiled; nothing
is kept for the next.
"""

import atexit
import os
import shutil
import tempfile

from tests import xla

DEVICES = 8
os.environ['XLA_FLAGS'] = (os.environ.get('XLA_FLAGS', '') +
                           f' --xla_force_host_platform_device_count={DEVICES} {xla.QUICK}')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:   # workers inherit it
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='moejax_tests_')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
  os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)


def pytest_sessionfinish(session):
  """A skipped test fails the session: a file skipped as a whole would otherwise read as green."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')   # None in a worker
  skipped = reporter.stats.get('skipped', []) if reporter else []
  if skipped and session.exitstatus == 0:
    reporter.write_line('skipped, which counts as failure: '
                        + ', '.join(sorted({report.nodeid for report in skipped})), red=True)
    session.exitstatus = 1
