"""Trains the runs of suites that are not finished, and makes each suite's table and plot.

  python -m experiments.main --suite=NAME[,NAME...] [--scale=mini]
  python -m experiments.main --suite=all --shard=1/4 --runs=COMMON_FOLDER

Runs that are finished are found, one that was stopped resumes, and suites share the runs they have
in common. Ctrl-C saves what is running; the same command goes on. Table and plot are written as
soon as the last run of their suite is finished; they come from results.jsonl, and
`python -m experiments.report` makes them again from it. Several machines share the work if each is
started with its own --shard over a common folder; see experiments/launch/. Machines that share
nothing can train other --pairs each: a pair's arms start from its own dense parent, and its results
join those of the pairs that are in --results already.
"""

import argparse
import pathlib
import sys

import jax

from experiments import cli, dry_run, scheduler, step0, suites
from experiments import suite as suite_lib
from experiments.session import Session
from experiments.shards import Shard
from experiments.suite import Suite
from moejax.config import check, check_choice

ALL = 'all'


def _list() -> None:
  """One line per suite: its scales, and the first line of what its file says."""
  for name in suite_lib.names():
    print(f'{name} ({", ".join(suite_lib.scales(name))})  '
          + suite_lib.module(name).__doc__.splitlines()[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The flags. Raises ConfigError on what they cannot be."""
  parser = cli.Parser('python -m experiments.main', __doc__)
  parser.add_suite()
  parser.add_argument('--pairs', metavar='N[,N...]',
                      help='only these (dense parent, seed) pairs; their results join those of '
                           'other pairs in --results (default: all)')
  parser.add_argument('--jobs', type=int, default=0, metavar='N',
                      help='runs at a time, each on its share of the cores (default: as many as '
                           'there are cores; give 1 where there is a GPU or TPU)')
  parser.add_argument('--shard', metavar='I/N',
                      help='this machine is number I of N that share the work; --runs is a folder '
                           'that they all see')
  parser.add_argument('--keep_going', action='store_true',
                      help='when a run fails, go on with those that do not start from it')
  parser.add_argument('--dry_run', action='store_true',
                      help='say what would be trained, and how long that may take')
  parser.add_argument('--list', action='store_true', help='list the suites and their scales')
  args = parser.parse(argv)
  if args.list:
    return args
  check(args.jobs >= 0, '--jobs', args.jobs, '1 or more', 'Leave it out for the default.')
  args.jobs = args.jobs or len(scheduler.cores())
  args.shard = Shard.parse(args.shard) if args.shard is not None else None
  args.pairs = _pairs(args.pairs)
  args.suites = _names(args)
  return args


def _pairs(text: str | None) -> tuple[int, ...] | None:
  """'0,3' -> (0, 3); None: all. Raises ConfigError."""
  if text is None:
    return None
  words = text.split(',')
  check(all(word.isdecimal() for word in words), '--pairs', text,
        'numbers of pairs, the first is 0', 'Two of them are --pairs=0,1.')
  return tuple(dict.fromkeys(map(int, words)))


def _names(args: argparse.Namespace) -> list[str]:
  """Names of the suites, each once. Raises ConfigError if there is none of a name."""
  if args.suite != ALL:
    return list(dict.fromkeys(args.suite.split(',')))
  names = suites.ORDER
  scales = dict.fromkeys(scale for name in names for scale in suite_lib.scales(name))
  check_choice('--scale', args.scale, scales)
  have = [name for name in names if args.scale in suite_lib.scales(name)]
  for name in names:
    if name not in have:
      print(f'{name}: left out, it has no scale {args.scale}', file=sys.stderr)
  return have


def _with_pairs(chosen: dict[str, Suite], pairs: tuple[int, ...] | None) -> dict[str, Suite]:
  """The suites that have any of the pairs. Raises ConfigError if none has."""
  if pairs is None:
    return chosen
  have = {name: suite for name, suite in chosen.items()
          if any(arm.pair in pairs for arm in suite.arms)}
  most = max(arm.pair for suite in chosen.values() for arm in suite.arms)
  check(bool(have), '--pairs', ','.join(map(str, pairs)), f'pairs 0 to {most}', 'Choose others.')
  for name in chosen:
    if name not in have:
      print(f'{name}: left out, it has none of these pairs', file=sys.stderr)
  return have


def main(argv: list[str] | None = None) -> int:
  """Runs; returns the exit code. Raises ConfigError on what cannot work."""
  args = parse(argv)
  if args.list:
    _list()
    return 0
  check(pathlib.Path('configs').is_dir(), 'working directory', str(pathlib.Path.cwd()),
        'the root of the repository, where configs/ is', 'cd there.')
  chosen = _with_pairs({name: suite_lib.load(name, args.scale) for name in args.suites}, args.pairs)
  jobs = {name: step0.jobs((suite if args.pairs is None else suite.of_pairs(args.pairs)).runs())
          for name, suite in chosen.items()}
  if args.dry_run:
    print(dry_run.table(jobs, args.runs, args.jobs, args.shard))
    return 0
  return Session(chosen, args).run(jobs)


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')   # a TPU, or a GPU's memory, is for the workers
  cli.run(main)
