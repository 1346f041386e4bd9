"""Every configuration of the paper, compiled for its TPU slice: does it fit, and what will it cost?

  python -m experiments.benchmarks.tpu     all of it; hours. It goes on where it was stopped
    --only=t5_base     the runs whose names have that in them
    --show             the tables of what is compiled, and no more

Needs the compiler for TPUs (pip install -e '.[tpu]') and no TPU. `paper` has the runs of
configs/paper, each on the slice that configs.paper.SLICES names; `ablations` what the paper varies,
of the Base models; `weak` one upcycled run on slices of 1 to 512 chips with the same examples per
chip. Results are lines of ahead.jsonl; a run that is there, with these settings and this version of
JAX, is not compiled again: after a change of moejax itself, delete its line. Programs are kept (see
--programs); if only what is read from them has changed, --read_again takes seconds. What the
estimate of the time assumes stands in moejax/aot/report.py and chips.py.
"""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from tqdm import tqdm

from configs import common, paper
from experiments import cli, results
from experiments.benchmarks import tpu_plot
from moejax.aot import chips, report
from moejax.config import ConfigError, fail
from moejax.train import config as settings
from moejax.train import metrics

FOLDER = pathlib.Path(__file__).parent.parent / 'results/scale'
FILE, PAGE, CRASH = 'ahead.jsonl', 'README.md', 'crash.log'
CRASHES, TRIES = (signal.SIGSEGV, signal.SIGABRT), 3   # of the compiler, which it does at random
PROGRAMS = pathlib.Path('runs') / 'ahead'
# Slice -> experts' axis; the rest of the chips split the data. The first two are not for rent: they
# are what a step takes before chips talk to each other.
WEAK = {
    'v5p:1x1x1': 1, 'v5p:2x1x1': 2, 'v5p:2x2x1': 4, 'v5p:2x2x2': 8, 'v5p:2x2x4': 16,
    'v5p:2x4x4': 32, 'v5p:4x4x4': 32, 'v5p:4x4x8': 32, 'v5p:4x8x8': 32, 'v5p:8x8x8': 32}
PER_CHIP = 16   # examples
TABLES = {'paper': 'The runs of configs/paper', 'ablations': "The paper's ablations",
          'weak': f'T5 Base, upcycled, {PER_CHIP} examples per chip'}

PLOTS = {'paper': tpu_plot.pairs, 'weak': tpu_plot.weak}

VARIED = ('t5_base_upcycled', 'vit_b16_upcycled')
ABLATIONS = {   # name -> argument of the config
    'C = 1': 'capacity_1', 'C = 3': 'capacity_3', '8 experts': 'experts_8',
    '128 experts': 'experts_128', 'every layer': 'every_layer', 'top-1': 'switch', 'top-2': 'vmoe'}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One program to compile.

  Attributes:
    table: of TABLES.
    name: what its line says; '<dense run>_upcycled...' of an upcycled one.
    config: file in configs/paper, and ':' and its argument, if any.
    slice: as --compile_for.
    changes: dotted config keys -> values.
  """
  table: str
  name: str
  config: str
  slice: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """Of the settings, the slice and the version of JAX; moejax's own code does not count."""
    text = json.dumps(settings.changes(self.run_config()), sort_keys=True)
    text += self.slice + jax.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def run_config(self) -> settings.RunConfig:
    """What is compiled. Raises ConfigError."""
    module, _, argument = self.config.partition(':')
    config = common.load(f'paper/{module}', argument or None)
    config.update_from_flattened_dict(dict(self.changes))
    return settings.resolve(config)

  def command(self, workdir: str) -> list[str]:
    """Words after `python`."""
    module, colon, argument = self.config.partition(':')
    return ['-m', 'moejax.main', f'--config=configs/paper/{module}.py{colon}{argument}',
            *(f'--config.{key}={value}' for key, value in self.changes.items()),
            f'--compile_for={self.slice}', f'--workdir={workdir}', '--compilation_cache=']


def entries() -> list[Entry]:
  """All there are, the cheapest tables first."""
  found = []
  for name, slice_name in paper.SLICES.items():
    upcycled = f'{name}:upcycled' if name.endswith('superglue') else f'{name}_upcycled'
    found += [Entry('paper', name, name, slice_name),
              Entry('paper', f'{name}_upcycled', upcycled, slice_name)]
  found += [Entry('ablations', f'{config}, {what}', f'{config}:{argument}',
                  paper.SLICES[config.removesuffix('_upcycled')])
            for config in VARIED for what, argument in ABLATIONS.items()]
  for slice_name, experts in WEAK.items():
    _, count = chips.parse(slice_name)
    name = f'{count} chips' if count > 1 else '1 chip'
    found.append(Entry('weak', name, 't5_base_upcycled', slice_name, {
        'mesh.expert': experts, 'data.batch_size': PER_CHIP * count,
        'data.eval_batch_size': PER_CHIP * count}))
  return found


def compile_entry(entry: Entry, programs: pathlib.Path) -> dict[str, Any]:
  """Its line of FILE; the program goes into programs / its key.

  Raises:
    ConfigError: it cannot be compiled, with what the compiler said.
  """
  folder = programs / entry.key
  for _ in range(TRIES):
    done = subprocess.run([sys.executable, *entry.command(str(folder))], capture_output=True,
                          text=True, check=False)
    if -done.returncode not in CRASHES:
      break
  if done.returncode:
    raise ConfigError(f'{entry.name}: {_why(done, folder)}')
  return _line(entry, json.loads((folder / report.FILE).read_text()))


def _why(done: subprocess.CompletedProcess[str], folder: pathlib.Path) -> str:
  if -done.returncode in CRASHES:
    folder.mkdir(parents=True, exist_ok=True)
    results.write_text(folder / CRASH, done.stderr)
    name = signal.Signals(-done.returncode).name
    return f'the compiler crashed {TRIES} times ({name}); what it said is in {folder / CRASH}'
  said = done.stderr.strip().splitlines() or [f'ended with {done.returncode} and said nothing']
  return said[-1]


def _line(entry: Entry, found: dict[str, Any]) -> dict[str, Any]:
  return {'table': entry.table, 'name': entry.name, 'key': entry.key, 'config': entry.config,
          'changes': dict(entry.changes), **found}


def read_again(chosen: Iterable[Entry], folder: pathlib.Path, programs: pathlib.Path) -> list[str]:
  """Reads what is compiled once more; returns the names of those whose programs are not there."""
  chosen = {(entry.table, entry.name): entry for entry in chosen}
  lines, missing = metrics.read_lines(folder / FILE), []
  for i, line in enumerate(lines):
    entry, place = chosen.get((line['table'], line['name'])), programs / line['key']
    if entry and entry.key == line['key'] and (place / report.PROGRAM).exists():
      lines[i] = _line(entry, report.read_again(place))
    elif entry:
      missing.append(line['name'])
  _write(lines, folder)
  return missing


def _write(lines: Iterable[Mapping[str, Any]], folder: pathlib.Path) -> None:
  results.write_text(folder / FILE, ''.join(json.dumps(line) + '\n' for line in lines))


def run(chosen: Iterable[Entry], folder: pathlib.Path, programs: pathlib.Path) -> int:
  """Compiles what is not there yet; returns how many could not be."""
  chosen, failed = list(chosen), 0
  there = {line['key'] for line in metrics.read_lines(folder / FILE)}
  with tqdm(chosen, unit='program', dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
    for entry in bar:
      bar.set_postfix_str(f'{entry.name} on {entry.slice}')
      if entry.key in there:
        continue
      try:
        line = compile_entry(entry, programs)
      except ConfigError as error:
        tqdm.write(str(error), file=sys.stderr)
        failed += 1
        continue
      kept = [old for old in metrics.read_lines(folder / FILE)
              if (old['table'], old['name']) != (line['table'], line['name'])]
      _write([*kept, line], folder)
  return failed


COLUMNS = ('run', 'slice', 'mesh', 'parameters', 'active', 'HBM', 'of', 'FLOPs / model',
           'all-to-all', 'other', 'step', 'MFU', 'MFU / dense', 'compiled in')

LEGEND = (
    'Per chip: HBM in GiB that the train step takes, and what a program may use; FLOPs of all '
    "matmuls in the step over the model's (flops.py), where what is above 1 is computed again in "
    'the backward pass; GiB sent in all-to-alls and in all other collectives. Step: estimated '
    'milliseconds, all operations and all communication one after another '
    '(moejax/aot/report.py); MFU is what that step would have; beside that of the dense run on '
    f'the same slice, what is below {tpu_plot.LIMIT} is marked !. Nothing of this ran on a '
    'TPU. Compiled in: seconds, tracing included, on the machine that made the table.')


OLD = '†: read by an earlier version, which estimated step and MFU otherwise. Not compiled since.'


def page(lines: list[dict[str, Any]]) -> str:
  """Markdown of the tables, in the order of `entries`."""
  lines = _in_order(lines)
  mfu = {(x['name'], _reading(x)): x['roofline']['mfu_serial']
         for x in lines if x['table'] == 'paper'}
  out = ['# Compiled for TPUs', '']
  for table, title in TABLES.items():
    rows = [x for x in lines if x['table'] == table]
    if rows:
      out += [f'## {title}', '', '| ' + ' | '.join(COLUMNS) + ' |',
              '|---|---|---|' + '---:|' * (len(COLUMNS) - 3), *(_row(x, mfu) for x in rows), '',
              *([f'![{title}]({table}.png)', ''] if table in PLOTS else [])]
  if any(map(_old, lines)):
    out += [*textwrap.wrap(OLD, 100), '']
  out += [*textwrap.wrap(LEGEND, 100), '',
          'Made by `python -m experiments.benchmarks.tpu`, with JAX '
          + ', '.join(sorted({x['versions']['jax'] for x in lines})) + '.']
  return '\n'.join(out) + '\n'


def _reading(line: Mapping[str, Any]) -> int:
  return line.get('reading', 1)


def _old(line: Mapping[str, Any]) -> bool:
  return _reading(line) < report.READING


def _in_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
  place = {(entry.table, entry.name): i for i, entry in enumerate(entries())}
  return sorted(lines, key=lambda x: place.get((x['table'], x['name']), len(place)))


def draw(folder: pathlib.Path) -> None:
  """The plots that the page shows."""
  lines = _in_order(metrics.read_lines(folder / FILE))
  for table, plot in PLOTS.items():
    if rows := [x for x in lines if x['table'] == table]:
      plot(rows, folder / f'{table}.png')


def _row(line: dict[str, Any], mfu: Mapping[tuple[str, int], float]) -> str:
  gib = lambda size: f'{size / chips.GIB:.2f}'
  sent = lambda kinds: sum(c['sent_bytes'] for c in line['collectives']
                           if (c['kind'] == 'all-to-all') == kinds)
  memory, roof, work = line['memory'], line['roofline'], line['flops']
  parent, upcycled, _ = line['name'].partition('_upcycled')
  dense = mfu.get((parent, _reading(line))) if upcycled else None
  share = roof['mfu_serial'] / dense if dense else None
  beside = f'{share:.2f}{"!" if share < tpu_plot.LIMIT else ""}' if share else ''
  mesh = ' '.join(f'{axis}={size}' for axis, size in line['mesh'].items() if size > 1) or '1'
  name = line['name'] + (' †' if _old(line) else '')
  cells = [name, line['slice'], mesh, f'{line["parameters"] / 1e6:,.0f} M',
           f'{line["parameters_active_per_token"] / 1e6:,.0f} M', gib(memory['total']),
           gib(memory['available']), f'{work["executed"] / work["model"]:.2f}', gib(sent(True)),
           gib(sent(False)), f'{1e3 * roof["serial"]:,.0f}', f'{roof["mfu_serial"]:.2f}', beside,
           f'{sum(line["seconds"].values()):.0f} s']
  return '| ' + ' | '.join(cells) + ' |'


def main(argv: list[str] | None = None) -> int:
  """Compiles, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser('python -m experiments.benchmarks.tpu', __doc__)
  parser.add_argument('--only', metavar='TEXT', default='', help='runs with this in their names')
  parser.add_argument('--table', choices=tuple(TABLES), help='one of the tables')
  parser.add_argument('--show', action='store_true', help='print what is compiled, and no more')
  parser.add_argument('--read_again', action='store_true',
                      help='read the kept programs once more, compile nothing')
  parser.add_argument('--results', metavar='DIR', type=pathlib.Path, default=FOLDER,
                      help=f'folder of {FILE} and {PAGE} (default: %(default)s)')
  parser.add_argument('--programs', metavar='DIR', type=pathlib.Path, default=PROGRAMS,
                      help='folder of the compiled programs (default: %(default)s)')
  args = parser.parse(argv, suite_required=False)
  there = [entry for entry in entries() if args.table in (None, entry.table)]
  chosen = [entry for entry in there if args.only in entry.name]
  if not chosen:
    fail('--only', args.only, ', '.join(dict.fromkeys(entry.name for entry in there)),
         'It is a part of such a name.')

  def work() -> int:
    if not args.read_again:
      return 0 if args.show else run(chosen, args.results, args.programs)
    missing = read_again(chosen, args.results, args.programs)
    if missing:
      print(f'Not read again, their programs are not in {args.programs}: {", ".join(missing)}',
            file=sys.stderr)
    return len(missing)

  code = cli.measure(work, page, args.results / FILE, None if args.show else args.results / PAGE)
  if not args.show:
    draw(args.results)
  return code


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  cli.run(main)
