"""Trains one run: python -m moejax.main --config=FILE[:arg] --workdir=DIR [--config.a.b=value ...]

FILE defines get_config(arg) and returns an ml_collections ConfigDict; any key of it can be
overridden on the command line. The same command resumes a run that was stopped, and says so if it
is finished. Everything the run leaves stands in DIR: see moejax/train/workdir.py.

For example, a dense run and one that is upcycled from it, with another router:

  python -m moejax.main --config=configs/pretrain/vit_glyphs.py --workdir=runs/vit_glyphs
  python -m moejax.main --config=configs/upcycle/vit_glyphs_upcycled.py:switch \\
      --workdir=runs/vit_switch --config.init.parent=runs/vit_glyphs --config.steps=2000
"""

import itertools
import os
import pathlib
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from moejax.cluster.launch import WAYS, Launch
from moejax.config import ConfigError, unknown_key
from moejax.train import malloc

CONFIG = config_flags.DEFINE_config_file('config', None, 'Run config: FILE.py or FILE.py:arg.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run; made if missing.')
COMPILATION_CACHE = flags.DEFINE_string(
    'compilation_cache', '~/.cache/moejax/xla', 'Where compiled programs are kept; empty: nowhere.')
COMPILE_FOR = flags.DEFINE_string(
    'compile_for', '', 'Do not train: compile the step for a TPU slice such as v5p:4x4x8, which '
    'need not be there, and report memory, communication and an estimate of its time.')
DISTRIBUTED = flags.DEFINE_enum(
    'distributed', Launch.distributed, WAYS,
    'How this process finds others that train the same run, started by the same command: tpu asks '
    'the slice, slurm the step of srun, flags takes --coordinator, --processes and --process; auto '
    'chooses among these by the environment; off: none.')
COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT of process 0, for all processes.')
PROCESSES = flags.DEFINE_integer('processes', 0, 'How many processes there are.')
PROCESS = flags.DEFINE_integer('process', -1, 'Which of them this is, from 0.')
JOIN_SECONDS = flags.DEFINE_integer('join_seconds', Launch.join_seconds,
                                    'How long to wait for all to start.')
LOST_SECONDS = flags.DEFINE_float(
    'lost_seconds', Launch.lost_seconds, 'A process that was not heard of for so long ends the '
    'others, with exit code 75; a process that ends does so at once. 0: nobody looks.')
STALL_SECONDS = flags.DEFINE_float(
    'stall_seconds', Launch.stall_seconds, 'No process got further for so long (a step, an '
    'evaluation, compiling): all end, with exit code 75.')
USAGE = 'python -m moejax.main --config=configs/pretrain/vit_glyphs.py --workdir=runs/vit_glyphs'


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, with every mistake as one line and exit code 1."""
  try:
    rest = _parse(argv)
  except ConfigError as error:
    sys.exit(f'moejax: {error}')
  return rest


def _parse(argv: list[str]) -> list[str]:
  if {'--help', '-help', '-h', '-?'} & set(argv[1:]):
    app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)   # absl's own --help exits with 1
  for path in _config_files(argv):
    if not os.path.exists(path):
      below = pathlib.Path(os.path.dirname(path) or '.').rglob(os.path.basename(path))
      near = next((f' Did you mean {file}?' for file in below), '')
      raise ConfigError(f'--config: no such file: {path}.{near} Usage: {USAGE}')
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise ConfigError(f'command line: {_last_line(error)}. --help lists the flags') from error
  except (AttributeError, KeyError) as error:   # an override of a key the config does not have
    raise _misspelt(argv) or ConfigError(f'command line: {error}') from error
  for name in ('config', *(() if COMPILE_FOR.value else ('workdir',))):
    if not flags.FLAGS[name].value:
      raise ConfigError(f'--{name}: missing. Usage: {USAGE}')
  if len(rest) > 1:
    raise ConfigError(f'command line: {rest[1]!r} is no flag; flags begin with --. Usage: {USAGE}')
  return rest


def _config_files(argv: list[str]) -> list[str]:
  """FILE of each --config=FILE[:arg] or --config FILE[:arg]."""
  given = [arg.partition('=')[2] for arg in argv if re.match('--?config=', arg)]
  given += [after for arg, after in itertools.pairwise(argv) if re.fullmatch('--?config', arg)]
  return [value.partition(':')[0] for value in given]


def _last_line(error: Exception) -> str:
  """The error's own words, where config_flags put a whole traceback into the message."""
  line = str(error).strip().splitlines()[-1]
  return line.removeprefix('moejax.config.ConfigError: ').rstrip('.')


def _misspelt(argv: list[str]) -> ConfigError | None:
  """The error for the first --config.a.b=value whose key is not in the config."""
  sys.argv = [arg for arg in argv if not re.match(r'--?config\.', arg)]   # read by config_flags
  flags.FLAGS(sys.argv)
  for arg in argv:
    node, *path = arg.lstrip('-').split('=')[0].split('.')
    if node != 'config' or not path:
      continue
    node = CONFIG.value
    for depth, name in enumerate(path):
      if not isinstance(node, ConfigDict) or name not in node:
        return unknown_key('.'.join(['config', *path[:depth + 1]]), node)
      node = node[name]
  return None


def main(argv: list[str]) -> int:
  """Runs; returns the exit code."""
  del argv
  try:
    config = CONFIG.value.copy_and_resolve_references()
  except Exception as error:   # whatever the config file raised when it was loaded
    sys.exit(f'moejax: --config: {_last_line(error)}')
  logging.set_verbosity(logging.WARNING)   # libraries' notes on themselves
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  malloc.keep_freed()
  if COMPILE_FOR.value:
    os.environ['JAX_PLATFORMS'] = 'cpu'   # whatever there is, it is not what is compiled for
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
