"""Trains one run: python -m moejax.main --config=FILE[:arg] --workdir=DIR [--config.a.b=value ...]

FILE defines get_config(arg) and returns an ml_collections ConfigDict; any key of it can be
overridden on the command line. The same command resumes a run that was stopped, and reports one
that is finished. moejax/train/workdir.py lists the files that a run leaves in DIR.

For example, a dense run and one that is upcycled from it, with another router:

  python -m moejax.main --config=configs/pretrain/vit_glyphs.py --workdir=runs/vit_glyphs
  python -m moejax.main --config=configs/upcycle/vit_glyphs_upcycled.py:switch \\
      --workdir=runs/vit_switch --config.init.parent=runs/vit_glyphs --config.steps=2000
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from moejax import command_line
from moejax.cluster.launch import WAYS, Launch
from moejax.config import ConfigError
from moejax.train import malloc

CONFIG = config_flags.DEFINE_config_file('config', None, 'Run config: FILE.py or FILE.py:arg.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; made if missing.')
COMPILATION_CACHE = flags.DEFINE_string(
    'compilation_cache', '~/.cache/moejax/xla', 'Folder of compiled programs; empty: none is kept.')
COMPILE_FOR = flags.DEFINE_string(
    'compile_for', '', 'Do not train: compile the step for a TPU slice such as v5p:4x4x8, which '
    'need not be there, and report memory, communication and an estimate of its time.')
DISTRIBUTED = flags.DEFINE_enum(
    'distributed', Launch.distributed, WAYS,
    'How this process finds the others that train the same run and were started by the same '
    'command. tpu: from the slice; slurm: from the step of srun; flags: from --coordinator, '
    '--processes and --process; auto: one of these, by the environment; off: there are no others.')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, for all processes.')
PROCESSES = flags.DEFINE_integer('processes', 0, 'Number of processes.')
PROCESS = flags.DEFINE_integer('process', -1, 'Index of this process, from 0.')
JOIN_SECONDS = flags.DEFINE_integer(
    'join_seconds', Launch.join_seconds, 'Seconds to wait for all processes to start.')
LOST_SECONDS = flags.DEFINE_float(
    'lost_seconds', Launch.lost_seconds, 'Seconds without a sign of life after which a process '
    'counts as lost and the others end, with exit code 75; at once if it ends. 0: no watchdog.')
STALL_SECONDS = flags.DEFINE_float(
    'stall_seconds', Launch.stall_seconds, 'Seconds without progress of any process (a step, an '
    'evaluation, compiling) after which all end, with exit code 75.')
USAGE = 'python -m moejax.main --config=configs/pretrain/vit_glyphs.py --workdir=runs/vit_glyphs'


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a mistake ends the process with one line and exit code 1."""
  return command_line.parse(
      argv, USAGE, lambda: ['config'] if COMPILE_FOR.value else ['config', 'workdir'])


def main(argv: list[str]) -> int:
  """Trains, or compiles for a slice; returns the exit code."""
  del argv
  config = command_line.config()
  logging.set_verbosity(logging.WARNING)   # hides the notes of libraries
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  malloc.keep_freed()
  if COMPILE_FOR.value:
    os.environ['JAX_PLATFORMS'] = 'cpu'   # its own devices are not those it compiles for
  import jax  # only now, so that a wrong flag is answered at once

  from moejax.cluster.processes import NotAllCame, join
  from moejax.cluster.watchdog import LOST
  from moejax.train import config as run_config
  from moejax.train import loop
  if COMPILATION_CACHE.value:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(COMPILATION_CACHE.value))
  try:
    run = run_config.resolve(config)   # before any other process waits for this one
    if COMPILE_FOR.value:
      from moejax.aot import report
      return report.run(run, COMPILE_FOR.value, WORKDIR.value)
    hosts = join(Launch(DISTRIBUTED.value, COORDINATOR.value, PROCESSES.value, PROCESS.value,
                        JOIN_SECONDS.value, LOST_SECONDS.value, STALL_SECONDS.value))
    return loop.run(run, WORKDIR.value, hosts)
  except ConfigError as error:
    print(f'moejax: {error}', file=sys.stderr)
    return LOST if isinstance(error, NotAllCame) else 1
  except KeyboardInterrupt:   # before training began, or a second time
    return 130


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)
