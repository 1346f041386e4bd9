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
