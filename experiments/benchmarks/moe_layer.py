"""Measures what an MoE layer costs beyond its experts' matmuls, side by side in one process.

  python -m experiments.benchmarks.moe_layer [--full] [--sizes=32x4096,128x16384]
    --show             only prints what is measured

Times each router with each dispatch, forward and forward with backward, as ratios to the batched
matmuls of the experts alone (the floor) and to a dense MLP of equal FLOPs; all of them in turns in
one process. For E = 8, 32, 128 and 1k, 4k, 16k tokens; about 10 minutes on 2 cores with nothing
else running, and 10 GB. Two sizes have a limit and are timed for --rounds rounds. --full times all
ways in all sizes for as many rounds, which takes hours and 20 GB; --sizes picks sizes. The lines of
a size replace its earlier lines as soon as it is measured, so a run that is stopped loses one size.
With torch and transformers installed (pip install -e '.[parity]'), their Mixtral and Switch layers
take part in some sizes.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable

import jax

from experiments import cli
from experiments.benchmarks import common, moe_layer_ways
from experiments.benchmarks.common import Line, number
from experiments.benchmarks.moe_layer_ways import DENSE, FLOOR, PASSES, Size, Way
from experiments.scheduler import cores
from moejax.config import check_choice

COMMAND = 'python -m experiments.benchmarks.moe_layer'
PAGE = common.RESULTS / 'moe_layer.md'
ROUNDS = 30
SIZES = tuple(Size(E, tokens) for tokens in (1024, 4096, 16384) for E in (8, 32, 128))
FEW = {1024: 2, 4096: 2, 16384: 1}                     # rounds by default, by tokens
LIMITS = {Size(32, 4096): 1.10, Size(128, 16384): 1.15}   # of LIMITED over the floor
WITH_TORCH = (Size(8, 1024), Size(32, 1024), Size(32, 4096))
LIMITED = ('expert choice, gather', 'top-2, gather')


def rounds_of(size: Size, way: str, which: str, full: bool, rounds: int) -> int:
  """Rounds that a pass of a way takes part in."""
  limited = size in LIMITS and way in (FLOOR, *LIMITED) and which == PASSES[1]
  return rounds if full or limited else min(rounds, FEW[size.tokens])


def measure(size: Size, ways: list[Way], rounds: Callable[[str, str], int],
            tick: Callable[[float], None] = lambda flops: None) -> list[Line]:
  """Times ways, `rounds(way, pass)` rounds each; ticks FLOPs, roughly.

  Returns:
    A line per way: 'size', 'way'; 'flops' of its experts' matmuls over the floor's; 'to_floor' and
    'to_dense', {pass: time over theirs, a number per round}; 'temporary', see Way.
  """
  calls = {(way.name, which): call for way in ways for which, call in way.calls.items()}
  took = common.in_turns(calls, {key: rounds(*key) for key in calls},
                         lambda key: tick(work(size, key[1])))
  over = lambda way, base: {which: [round(ratio, 4) for ratio in common.ratios(
      took[way.name, which], took[base, which])] for which in way.calls}
  return [{'size': dataclasses.asdict(size), 'way': way.name, 'flops': way.flops,
           'to_floor': over(way, FLOOR), 'to_dense': over(way, DENSE), 'temporary': way.temporary}
          for way in ways]


def work(size: Size, which: str) -> float:
  """FLOPs of a call."""
  return size.flops * (1 if which == PASSES[0] else 3)


def measure_all(sizes: tuple[Size, ...], args: argparse.Namespace, output: common.Measurements
                ) -> int:
  """Measures sizes one after another, under a progress bar; returns 0 failures.

  'facts' of a line are 'command', 'cores', 'load' average before it, 'versions', and the 'seconds'
  that its size took, compiling included.
  """
  torch = moe_layer_ways.torch_installed()
  if not torch:
    print(moe_layer_ways.NO_TORCH, file=sys.stderr)
  layers = lambda size: (moe_layer_ways.ALL if args.full or size.tokens <= 1024
                         else moe_layer_ways.LIGHT)
  others = lambda size: moe_layer_ways.TORCH if torch and (args.full or size in WITH_TORCH) else ()
  rounds = lambda size, way, which: rounds_of(size, way, which, args.full, args.rounds)
  total = sum((1 + rounds(size, way, which)) * work(size, which)
              for size in sizes for which in PASSES
              for way in (FLOOR, DENSE, *layers(size), *others(size)))

  def ways(size: Size) -> list[Way]:
    ours = list(moe_layer_ways.ways(size, layers(size)))
    return ours + (list(moe_layer_ways.torch_ways(size, len(cores()))) if others(size) else [])

  with common.progress(total=round(total / 1e9), bar_format=(
      '{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go')) as bar:
    for size in sizes:
      bar.set_description(f'E = {size.experts}, {size.tokens} tokens')
      load, began = os.getloadavg()[0], time.monotonic()
      # No name holds a size's ways: gigabytes of weights go before those of the next are made.
      lines = measure(size, ways(size), lambda *key, size=size: rounds(size, *key),
                      lambda flops: bar.update(flops / 1e9))
      facts = {'command': command(args), 'cores': len(cores()), 'load': load,
               'versions': versions(), 'seconds': round(time.monotonic() - began, 1)}
      output.add([{**line, 'facts': facts} for line in lines])
  return 0


def limits(lines: list[Line]) -> list[str]:
  """Markdown table of the sizes that have a limit."""
  rows = []
  for line in lines:
    limit = LIMITS.get(Size(**line['size']))
    if limit and line['way'] in LIMITED:
      ratios = line['to_floor'][PASSES[1]]
      bound = common.upper_bound(ratios)
      held = 'not known' if bound is None else 'yes' if bound <= limit else 'no'
      rows.append([line['size']['experts'], line['size']['tokens'], line['way'],
                   f'{statistics.median(ratios):.3f}', number(bound, ',.3f', ''), f'{limit:.2f}',
                   len(ratios), held])
  return common.table(['E', 'tokens', 'layer', 'median / floor', 'upper 95 % bound', 'limit',
                       'rounds', 'held'], rows, left=(2, 7))


def everything(lines: list[Line]) -> list[str]:
  """Markdown table of all lines."""
  key = lambda line: tuple(line['size'].values())
  floors = {key(line): line['temporary'] for line in lines if line['way'] == FLOOR}
  rows = []
  for line in lines:
    floor, dense = ([statistics.median(to[which]) for which in PASSES]
                    for to in (line['to_floor'], line['to_dense']))
    bytes_, least = (of.get(PASSES[1]) for of in (line['temporary'], floors[key(line)]))
    bound = None if line['way'] == FLOOR else common.upper_bound(line['to_floor'][PASSES[1]])
    counts = sorted({len(line['to_floor'][which]) for which in PASSES})
    tokens = line['size']['tokens']
    ratios = (*floor, bound, line['flops'], floor[1] / line['flops'], *dense)
    rows.append([line['size']['experts'], tokens, line['way'],
                 *(number(value, unknown='') for value in ratios),
                 number(bytes_ and bytes_ / 1e6, ',.0f', ''),
                 number(bytes_ and (bytes_ - least) / tokens, ',.0f', ''),
                 ' or '.join(map(str, counts)), line['facts'].get('cores', '')])
  return common.table(['E', 'tokens', 'way', 'forward / floor', 'fwd+bwd / floor', 'upper bound',
                       'FLOPs / floor', 'fwd+bwd / FLOPs', 'forward / dense', 'fwd+bwd / dense',
                       'temporaries, MB', 'beside floor, B', 'rounds', 'cores'], rows, left=(2,))


LEGEND = (
    'Medians of ratios of two times of one round: all ways of a size run in turns, in an order '
    'that rotates. Upper bound: of the median, with 95 % confidence, by order statistics; empty '
    'below 5 rounds. float32, D = {d_model}, F = {d_ff}, ReLU, no gating, C = 2: every '
    'way puts 2 rows a token through its experts, unless FLOPs / floor says otherwise; one '
    'routing group of all tokens. Floor: the batched matmuls of the experts alone. Dense: one '
    'MLP on 2 rows a token. Backward: gradients of tokens and all weights, and of the balance '
    'loss. fwd+bwd / FLOPs: time over the floor divided by FLOPs over the floor. Temporaries: '
    'what the compiled forward and backward needs beside arguments and results; beside floor: what '
    'is more than that of the floor, per token. (The floor itself takes 16 kB a token, or 49 kB '
    'where XLA copies what its batched matmuls read.) Mixtral and '
    'Switch are those of transformers, as their models build them by default, on as many '
    'threads; Mixtral is gated, three matrices where the others have two, and Switch is top-1 '
    'and computes half of the rows.')


def page(lines: list[Line]) -> str:
  """Markdown of all lines, sizes in the order of SIZES."""
  lines = sorted(lines, key=lambda line: (line['size']['tokens'], line['size']['experts']))
  all_facts = [line['facts'] for line in lines]
  loads = [facts['load'] for facts in all_facts]
  facts = (f' {_different(f["versions"] for f in all_facts)}; '
           f'{_different(f["cores"] for f in all_facts)} cores, load average {min(loads):.0f} to '
           f'{max(loads):.0f} before a size.{_time_taken(lines)}')
  commands = dict.fromkeys(f'`{f["command"]}`' for f in all_facts)
  return '\n'.join(['# MoE layer', '', '## Where there is a limit', '', 'Forward and backward.',
                    '', *limits(lines), '', '## Everything', '', *everything(lines), '',
                    *textwrap.wrap(LEGEND.format(**lines[0]['size']) + facts, 100), '',
                    f'Made by {", ".join(commands)}.', ''])


def _time_taken(lines: list[Line]) -> str:
  """Time of all sizes, where it is known."""
  seconds = {tuple(line['size'].values()): line['facts'].get('seconds') for line in lines}
  known = None not in seconds.values()
  return f' All sizes took {sum(seconds.values()) / 60:.0f} minutes.' if known else ''


def _different(values: Iterable) -> str:
  """'2 or 4': the different ones among values."""
  return ' or '.join(map(str, dict.fromkeys(values)))


def chosen(text: str) -> tuple[Size, ...]:
  """Sizes named as '32x4096,128x16384': experts and tokens. Raises ConfigError."""
  by_name = {f'{size.experts}x{size.tokens}': size for size in SIZES}
  for name in text.split(','):
    check_choice('--sizes', name, by_name)
  return tuple(by_name[name] for name in text.split(','))


def main(argv: list[str] | None = None) -> int:
  """Measures; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser(COMMAND, __doc__)
  parser.add_argument('--full', action='store_true', help='everything everywhere; takes hours')
  parser.add_argument('--sizes', metavar='EXTOKENS[,...]', help='only these, as 32x4096')
  parser.add_argument('--rounds', type=int, default=ROUNDS,
                      help='rounds of the sizes with a limit, and the most of others (default: '
                           '%(default)s)')
  parser.add_argument('--cores', type=int, default=0,
                      help='cores to time on; 0: all. On a machine that does other things, 1 is '
                           'fairer to libraries whose threads wait for each other (default: '
                           '%(default)s)')
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  parser.add_argument('--results', metavar='FILE', type=pathlib.Path, default=PAGE,
                      help='Markdown file to write; all ratios go beside it, as .jsonl (default: '
                           '%(default)s)')
  args = parser.parse(argv)
  cli.check_at_least(1, '--rounds', args.rounds, 'A bound needs 5.')
  cli.check_at_least(0, '--cores', args.cores, 'Leave it out for all.')
  sizes = chosen(args.sizes) if args.sizes is not None else SIZES
  output = common.Measurements(args.results.with_suffix('.jsonl'), ('size',), page, args.results)
  if not args.show:
    common.use_cores(args.cores)
    cli.use_compilation_cache()
  return output.finish(lambda: measure_all(sizes, args, output), args.show)


def command(args: argparse.Namespace) -> str:
  """The command that made a result, without where it went."""
  flags = [f'--{name}={value}' for name, value, default in (
      ('sizes', args.sizes, None), ('rounds', args.rounds, ROUNDS), ('cores', args.cores, 0))
      if value != default]
  return ' '.join([COMMAND, *['--full'] * args.full, *flags])


def versions() -> str:
  """Versions of what was timed, and the backend."""
  names = ['jax', *(['torch', 'transformers'] if moe_layer_ways.torch_installed() else [])]
  return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in names) + (
      f', {jax.default_backend()}')


if __name__ == '__main__':
  cli.start(main)
