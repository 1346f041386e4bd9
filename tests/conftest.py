"""Every test process sees 8 virtual CPU devices, so that meshes and pmap can be tested anywhere.

XLA compiles with little optimisation here: the tests' time is nearly all compilation, and that
makes it four times shorter without changing what is computed.
"""

import os

DEVICES = 8
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count={DEVICES}'
    ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def pytest_sessionfinish(session):
  """A skipped test fails the session: a file skipped as a whole would otherwise read as green."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')   # None in a worker
  skipped = reporter.stats.get('skipped', []) if reporter else []
  if skipped and session.exitstatus == 0:
    reporter.write_line('skipped, which counts as failure: '
                        + ', '.join(sorted({report.nodeid for report in skipped})), red=True)
    session.exitstatus = 1
