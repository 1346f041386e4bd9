"""XLA's flags in tests: little optimisation, since their time is nearly all compilation.

It makes that several times shorter, without changing what is computed.
"""

import importlib.metadata

QUICK = ('--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
         '--xla_cpu_parallel_codegen_split_count=1')   # both cores have a worker already
if tuple(map(int, importlib.metadata.version('jax').split('.')[:2])) < (0, 11):
  QUICK += ' --xla_cpu_use_fusion_emitters=false'   # later ones may not know it, and would stop
