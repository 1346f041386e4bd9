"""What an MoE layer costs beyond its experts' matmuls, side by side in one process.

  python -m experiments.benchmarks.moe_layer [--full] [--cells=32x4096,128x16384]

Times each router with each dispatch, forward and forward with backward, as ratios to the batched
matmuls of the experts alone (the floor) and to a dense MLP of equal FLOPs; all of them in turns in
one process. For E = 8, 32, 128 and 1k, 4k, 16k tokens; about 10 minutes on 2 cores with nothing
else running, and 10 GB. Two cells have a limit and are timed for --rounds rounds. --full times all
ways in all cells for as many rounds, which takes hours and 20 GB; --cells picks cells. A cell that
is measured takes the place of what stood there, so a run that was stopped loses one cell. With
torch and transformers installed (pip install -e '.[parity]'), their Mixtral and Switch layers take
part in some cells.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from experiments import cli, results
from experiments.benchmarks import moe_layer_ways, public_layers, train_step, turns
from experiments.benchmarks.moe_layer_ways import DENSE, FLOOR, PASSES, Cell, Way
from experiments.step0 import use_compilation_cache
from moejax.config import check, check_choice
from moejax.train import metrics

COMMAND = 'python -m experiments.benchmarks.moe_layer'
RESULTS = pathlib.Path(__file__).parent.parent / 'results/moe_layer.md'
ROUNDS = 30
CELLS = tuple(Cell(E, tokens) for tokens in (1024, 4096, 16384) for E in (8, 32, 128))
FEW = {1024: 2, 4096: 2, 16384: 1}                     # rounds by default, by tokens
LIMITS = {Cell(32, 4096): 1.10, Cell(128, 16384): 1.15}   # of LIMITED over the floor
PUBLIC = (Cell(8, 1024), Cell(32, 1024), Cell(32, 4096))
LIMITED = ('expert choice, gather', 'top-2, gather')


@dataclasses.dataclass(frozen=True)
class Row:
  """What was found of one way in one cell; everything by pass.

  Attributes:
    to_floor, to_dense: time over that of the floor and of the dense MLP, one number a round.
    flops: of its experts' matmuls over the floor's.
    temporary: bytes of temporaries; empty if not known.
    facts: how it was measured: 'command', 'cores', 'load' average before it, 'versions', and the
      'seconds' that its cell took, compiling included.
  """
  cell: Cell
  way: str
  flops: float
  to_floor: dict[str, list[float]]
  to_dense: dict[str, list[float]]
  temporary: dict[str, int]
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def present(cell: Cell, full: bool) -> tuple[str, ...]:
  """Names of the layers timed in a cell."""
  return moe_layer_ways.ALL if full or cell.tokens <= 1024 else moe_layer_ways.LIGHT


def rounds_of(cell: Cell, way: str, which: str, full: bool, rounds: int) -> int:
  """Rounds a pass of a way takes part in."""
  bound = cell in LIMITS and way in (FLOOR, *LIMITED) and which == PASSES[1]
  return rounds if full or bound else min(rounds, FEW[cell.tokens])


def measure(cell: Cell, found: list[Way], rounds: Callable[[str, str], int],
            tick: Callable[[float], None] = lambda flops: None) -> list[Row]:
  """Times ways of a cell, `rounds(way, pass)` rounds each; ticks FLOPs, roughly."""
  runs = {(way.name, which): run for way in found for which, run in way.runs.items()}
  took = turns.in_turns(runs, {key: rounds(*key) for key in runs},
                        lambda key: tick(work(cell, key[1])))
  over = lambda way, base: {which: [round(ratio, 4) for ratio in turns.ratios(
      took[way.name, which], took[base, which])] for which in way.runs}
  return [Row(cell, way.name, way.flops, over(way, FLOOR), over(way, DENSE), way.temporary)
          for way in found]


def work(cell: Cell, which: str) -> float:
  """FLOPs of a run."""
  return cell.flops * (1 if which == PASSES[0] else 3)


def run(cells: tuple[Cell, ...], full: bool, rounds: int, public: bool) -> Iterator[list[Row]]:
  """Measures cells, one after another, under a progress bar."""
  others = lambda cell: public_layers.NAMES if public and (full or cell in PUBLIC) else ()
  total = sum((1 + rounds_of(cell, way, which, full, rounds)) * work(cell, which)
              for cell in cells for which in PASSES
              for way in (FLOOR, DENSE, *present(cell, full), *others(cell)))

  def ways(cell: Cell) -> list[Way]:
    ours = list(moe_layer_ways.ways(cell, present(cell, full)))
    return ours + (list(public_layers.ways(cell, threads())) if others(cell) else [])

  with tqdm(total=round(total / 1e9), dynamic_ncols=True, disable=not sys.stderr.isatty(),
            bar_format='{desc}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} to go') as bar:
    for cell in cells:
      bar.set_description(f'E = {cell.experts}, {cell.tokens} tokens')
      # No name holds a cell's ways: gigabytes of weights go before those of the next are made.
      yield measure(cell, ways(cell), lambda *key, cell=cell: rounds_of(cell, *key, full, rounds),
                    lambda flops: bar.update(flops / 1e9))


def threads() -> int:
  """Cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def limits(rows: list[Row]) -> str:
  """Markdown of the cells that have a limit."""
  lines = ['| E | tokens | layer | median / floor | upper 95 % bound | limit | pairs | held |',
           '|---:|---:|---|---:|---:|---:|---:|---|']
  for row in rows:
    if row.cell in LIMITS and row.way in LIMITED:
      ratios, limit = row.to_floor[PASSES[1]], LIMITS[row.cell]
      bound = turns.upper_bound(ratios)
      held = 'not known' if bound is None else 'yes' if bound <= limit else 'no'
      lines.append(f'| {row.cell.experts} | {row.cell.tokens} | {row.way} '
                   f'| {statistics.median(ratios):.3f} | {_number(bound, 3)} | {limit:.2f} '
                   f'| {len(ratios)} | {held} |')
  return '\n'.join(lines)


def table(rows: list[Row]) -> str:
  """Markdown of everything."""
  lines = ['| E | tokens | way | forward / floor | fwd+bwd / floor | upper bound | FLOPs / floor '
           '| fwd+bwd / FLOPs | forward / dense | fwd+bwd / dense | temporaries, MB '
           '| beside floor, B | rounds | cores |', '|---:|---:|---|' + '---:|' * 11]
  floors = {row.cell: row.temporary for row in rows if row.way == FLOOR}
  for row in rows:
    floor, dense = ([statistics.median(to[which]) for which in PASSES]
                    for to in (row.to_floor, row.to_dense))
    size, least = (found.get(PASSES[1]) for found in (row.temporary, floors[row.cell]))
    bound = None if row.way == FLOOR else turns.upper_bound(row.to_floor[PASSES[1]])
    counts = sorted({len(row.to_floor[which]) for which in PASSES})
    cells = [row.cell.experts, row.cell.tokens, row.way, _number(floor[0]), _number(floor[1]),
             _number(bound), _number(row.flops), _number(floor[1] / row.flops), _number(dense[0]),
             _number(dense[1]), _number(size and size / 1e6, 0),
             _number(size and (size - least) / row.cell.tokens, 0), ' or '.join(map(str, counts)),
             row.facts.get('cores', '')]
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  return '\n'.join(lines)


def _number(value: float | None, digits: int = 2) -> str:
  return '' if value is None else f'{value:,.{digits}f}'


LEGEND = (
    'Medians of ratios of two times of one round: all ways of a cell run in turns, in an order '
    'that rotates. Upper bound: of the median, with 95 % confidence, by order statistics; empty '
    'below 5 rounds. float32, D = {cell.d_model}, F = {cell.d_ff}, ReLU, no gating, C = 2: every '
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


def page(rows: list[Row]) -> str:
  """The results file."""
  loads = [row.facts['load'] for row in rows]
  facts = (f' {_each(row.facts["versions"] for row in rows)}; '
           f'{_each(row.facts["cores"] for row in rows)} cores, load average {min(loads):.0f} to '
           f'{max(loads):.0f} before a cell.{_took(rows)}')
  commands = dict.fromkeys(f'`{row.facts["command"]}`' for row in rows)
  return '\n'.join(['# MoE layer', '', '## Where there is a limit', '', 'Forward and backward.',
                    '', limits(rows), '', '## Everything', '', table(rows), '',
                    *textwrap.wrap(LEGEND.format(cell=rows[0].cell) + facts, 100), '',
                    f'Made by {", ".join(commands)}.', ''])


def _took(rows: list[Row]) -> str:
  """Time of all cells, where it is known."""
  seconds = {row.cell: row.facts.get('seconds') for row in rows}
  known = None not in seconds.values()
  return f' All cells took {sum(seconds.values()) / 60:.0f} minutes.' if known else ''


def _each(values: Iterable[Any]) -> str:
  """Different ones among values."""
  return ' or '.join(map(str, dict.fromkeys(values)))


def read(path: pathlib.Path) -> list[Row]:
  """What is measured."""
  return [Row(Cell(**line.pop('cell')), **line) for line in metrics.read_lines(path)]


def store(path: pathlib.Path, new: list[Row]) -> list[Row]:
  """Puts the rows of a cell in the place of what stood there; all rows, in the order of CELLS."""
  rows = [row for row in read(path) if row.cell != new[0].cell] + new
  rows.sort(key=lambda row: (row.cell.tokens, row.cell.experts))
  results.write_text(path, ''.join(json.dumps(dataclasses.asdict(row)) + '\n' for row in rows))
  return rows


def chosen(text: str) -> tuple[Cell, ...]:
  """Cells named as '32x4096,128x16384': experts and tokens. Raises ConfigError."""
  by_name = {f'{cell.experts}x{cell.tokens}': cell for cell in CELLS}
  for name in text.split(','):
    check_choice('--cells', name, by_name)
  return tuple(by_name[name] for name in text.split(','))


def main(argv: list[str] | None = None) -> int:
  """Measures; returns the exit code. Raises ConfigError on a wrong command line."""
  parser = cli.Parser(COMMAND, __doc__)
  parser.add_argument('--full', action='store_true', help='everything everywhere; takes hours')
  parser.add_argument('--cells', metavar='EXTOKENS[,...]', help='only these, as 32x4096')
  parser.add_argument('--rounds', type=int, default=ROUNDS,
                      help='rounds of the cells with a limit, and the most of others (default: '
                           '%(default)s)')
  parser.add_argument('--cores', type=int, default=0,
                      help='cores to time on; 0: all. On a machine that does other things, 1 is '
                           'fairer to libraries whose threads wait for each other (default: '
                           '%(default)s)')
  parser.add_argument('--results', metavar='FILE', type=pathlib.Path, default=RESULTS,
                      help='Markdown file to write; all ratios go beside it, as .jsonl (default: '
                           '%(default)s)')
  args = parser.parse(argv, suite_required=False)
  check(args.rounds >= 1, '--rounds', args.rounds, '1 or more', 'A bound needs 5.')
  check(args.cores >= 0, '--cores', args.cores, '0 or more', 'Leave it out for all.')
  cells = chosen(args.cells) if args.cells is not None else CELLS
  train_step.use_cores(args.cores)
  use_compilation_cache()
  if not (public := public_layers.installed()):
    print(public_layers.MISSING, file=sys.stderr)
  load, began = os.getloadavg()[0], time.monotonic()
  try:
    for rows in run(cells, args.full, args.rounds, public):
      facts = {'command': command(args), 'cores': threads(), 'load': load, 'versions': versions(),
               'seconds': round(time.monotonic() - began, 1)}
      everything = store(args.results.with_suffix('.jsonl'),
                         [dataclasses.replace(row, facts=facts) for row in rows])
      results.write_text(args.results, page(everything))
      load, began = os.getloadavg()[0], time.monotonic()
  except KeyboardInterrupt:
    print(f'stopped; the cells that were finished are in {args.results}', file=sys.stderr)
    return 130
  print(args.results.read_text(), end='')
  return 0


def command(args: argparse.Namespace) -> str:
  """What made a result, without where it went."""
  flags = [f'--{name}={value}' for name, value, default in (
      ('cells', args.cells, None), ('rounds', args.rounds, ROUNDS), ('cores', args.cores, 0))
      if value != default]
  return ' '.join([COMMAND, *['--full'] * args.full, *flags])


def versions() -> str:
  """Of what was timed."""
  names = ['jax', *(['torch', 'transformers'] if public_layers.installed() else [])]
  return ', '.join(f'{name} {importlib.metadata.version(name)}' for name in names) + (
      f', {jax.default_backend()}')


if __name__ == '__main__':
  cli.run(main)
