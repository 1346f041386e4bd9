"""Compiles every configuration of the paper for its TPU slice: does it fit, and what does it cost?

  python -m experiments.benchmarks.tpu     all tables; takes hours, and resumes
    --only=t5_base     the runs with that in their names
    --show             only prints the tables of what is compiled

It needs the compiler for TPUs (pip install -e '.[tpu]') and no TPU. The table `paper` has the runs
of configs/paper, each on the slice that configs.paper.SLICES names. `ablations` has what the paper
varies, for the Base models. `weak` has one upcycled run on slices of 1 to 512 chips, with equally
many examples per chip. Results are lines of ahead.jsonl. A run that has a line there, of these
settings and this version of JAX, is not compiled again: after a change of moejax itself, delete its
line. Programs are kept (see --programs), so --read_again takes only seconds after a change in how
they are read. moejax/aot/report.py and chips.py state the assumptions of the estimated time.
"""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import matplotlib
from matplotlib.figure import Figure

from configs import common as config_files
from configs import paper
from experiments import cli, results
from experiments.benchmarks import common
from experiments.benchmarks.common import Line
from experiments.plots import COLORS, PANEL, STYLE, save
from moejax.aot import chips, report
from moejax.config import ConfigError, fail
from moejax.train import config as settings

FOLDER = common.RESULTS / 'scale'
FILE, PAGE, CRASH = 'ahead.jsonl', 'README.md', 'crash.log'
CRASHES, TRIES = (signal.SIGSEGV, signal.SIGABRT), 3   # of the compiler, which it does at random
PROGRAMS = pathlib.Path('runs') / 'ahead'
LIMIT = 0.85    # of the dense parent's MFU, the aim of an upcycled run
# Slice -> experts' axis; the rest of the chips split the data. The first two are not for rent: they
# are what a step takes without communication between chips.
WEAK = {
    'v5p:1x1x1': 1, 'v5p:2x1x1': 2, 'v5p:2x2x1': 4, 'v5p:2x2x2': 8, 'v5p:2x2x4': 16,
    'v5p:2x4x4': 32, 'v5p:4x4x4': 32, 'v5p:4x4x8': 32, 'v5p:4x8x8': 32, 'v5p:8x8x8': 32}
PER_CHIP = 16   # examples
TABLES = {'paper': 'The runs of configs/paper', 'ablations': "The paper's ablations",
          'weak': f'T5 Base, upcycled, {PER_CHIP} examples per chip'}

VARIED = ('t5_base_upcycled', 'vit_b16_upcycled')
ABLATIONS = {   # name -> argument of the config
    'C = 1': 'capacity_1', 'C = 3': 'capacity_3', '8 experts': 'experts_8',
    '128 experts': 'experts_128', 'every layer': 'every_layer', 'top-1': 'switch', 'top-2': 'vmoe'}


@dataclasses.dataclass(frozen=True)
class Case:
  """One program to compile.

  Attributes:
    table: of TABLES.
    name: of its line; '<dense run>_upcycled...' of an upcycled one.
    config: file in configs/paper, and ':' and its argument, if any.
    slice: of --compile_for.
    changes: dotted config keys -> values.
  """
  table: str
  name: str
  config: str
  slice: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def key(self) -> str:
    """Hash of the settings, the slice and the version of JAX, but not of moejax's own code."""
    text = json.dumps(settings.changes(self.run_config()), sort_keys=True)
    text += self.slice + jax.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]

  def run_config(self) -> settings.RunConfig:
    """The run that is compiled. Raises ConfigError."""
    module, _, argument = self.config.partition(':')
    config = config_files.load(f'paper/{module}', argument or None)
    config.update_from_flattened_dict(dict(self.changes))
    return settings.resolve(config)

  def command(self, workdir: str) -> list[str]:
    """Words after `python`."""
    module, colon, argument = self.config.partition(':')
    return ['-m', 'moejax.main', f'--config=configs/paper/{module}.py{colon}{argument}',
            *(f'--config.{key}={value}' for key, value in self.changes.items()),
            f'--compile_for={self.slice}', f'--workdir={workdir}', '--compilation_cache=']


def all_cases() -> list[Case]:
  """Every case, the cheapest tables first."""
  cases = []
  for name, slice_name in paper.SLICES.items():
    upcycled = f'{name}:upcycled' if name.endswith('superglue') else f'{name}_upcycled'
    cases += [Case('paper', name, name, slice_name),
              Case('paper', f'{name}_upcycled', upcycled, slice_name)]
  cases += [Case('ablations', f'{config}, {what}', f'{config}:{argument}',
                 paper.SLICES[config.removesuffix('_upcycled')])
            for config in VARIED for what, argument in ABLATIONS.items()]
  for slice_name, experts in WEAK.items():
    _, count = chips.parse(slice_name)
    name = f'{count} chips' if count > 1 else '1 chip'
    cases.append(Case('weak', name, 't5_base_upcycled', slice_name, {
        'mesh.expert': experts, 'data.batch_size': PER_CHIP * count,
        'data.eval_batch_size': PER_CHIP * count}))
  return cases


def compile_case(case: Case, programs: pathlib.Path) -> Line:
  """Its line of FILE; the program goes into programs / its key.

  Raises:
    ConfigError: it cannot be compiled, with the compiler's last line.
  """
  folder = programs / case.key
  for _ in range(TRIES):
    done = subprocess.run([sys.executable, *case.command(str(folder))], capture_output=True,
                          text=True, check=False)
    if -done.returncode not in CRASHES:
      break
  if done.returncode:
    raise ConfigError(_failure(done, folder))
  return _line(case, json.loads((folder / report.FILE).read_text()))


def _failure(done: subprocess.CompletedProcess[str], folder: pathlib.Path) -> str:
  if -done.returncode in CRASHES:
    results.write_text(folder / CRASH, done.stderr)
    name = signal.Signals(-done.returncode).name
    return f'the compiler crashed {TRIES} times ({name}); its output is in {folder / CRASH}'
  lines = done.stderr.strip().splitlines()
  return lines[-1] if lines else f'ended with {done.returncode} and no message'


def _line(case: Case, facts: dict[str, Any]) -> Line:
  return {'table': case.table, 'name': case.name, 'key': case.key, 'config': case.config,
          'changes': dict(case.changes), **facts}


def read_again(chosen: Iterable[Case], output: common.Measurements, programs: pathlib.Path
               ) -> list[str]:
  """Reads kept programs once more; returns the names of the cases whose programs are missing."""
  chosen = {(case.table, case.name): case for case in chosen}
  missing = []
  for line in output.lines():
    case, folder = chosen.get((line['table'], line['name'])), programs / line['key']
    if case and case.key == line['key'] and (folder / report.PROGRAM).exists():
      output.add([_line(case, report.read_again(folder))])
    elif case:
      missing.append(line['name'])
  return missing


COLUMNS = ('run', 'slice', 'mesh', 'parameters', 'active', 'HBM', 'of', 'FLOPs / model',
           'all-to-all', 'other', 'step', 'MFU', 'MFU / dense', 'compiled in')

LEGEND = (
    'Per chip: HBM in GiB that the train step takes, and what a program may use; FLOPs of all '
    "matmuls in the step over the model's (flops.py), where what is above 1 is computed again in "
    'the backward pass; GiB sent in all-to-alls and in all other collectives. Step: estimated '
    'milliseconds, all operations and all communication one after another '
    '(moejax/aot/report.py); MFU is what that step would have; beside that of the dense run on '
    f'the same slice, what is below {LIMIT} is marked !. Nothing of this ran on a '
    'TPU. Compiled in: seconds, tracing included, on the machine that made the table.')


OLD = '†: read by an earlier version, which estimated step and MFU otherwise. Not compiled since.'


def page(lines: list[Line]) -> str:
  """Markdown of the tables, in the order of `all_cases`."""
  lines = _in_order(lines)
  mfu = {(line['name'], _reading(line)): line['roofline']['mfu_serial']
         for line in lines if line['table'] == 'paper'}
  out = ['# Compiled for TPUs', '']
  for table, title in TABLES.items():
    own = [line for line in lines if line['table'] == table]
    if own:
      out += [f'## {title}', '',
              *common.table(COLUMNS, (_row(line, mfu) for line in own), left=(0, 1, 2)), '',
              *([f'![{title}]({table}.png)', ''] if table in PLOTS else [])]
  if any(map(_old, lines)):
    out += [*textwrap.wrap(OLD, 100), '']
  out += [*textwrap.wrap(LEGEND, 100), '',
          'Made by `python -m experiments.benchmarks.tpu`, with JAX '
          + ', '.join(sorted({line['versions']['jax'] for line in lines})) + '.']
  return '\n'.join(out) + '\n'


def _reading(line: Line) -> int:
  return line.get('reading', 1)


def _old(line: Line) -> bool:
  return _reading(line) < report.READING


def _in_order(lines: list[Line]) -> list[Line]:
  place = {(case.table, case.name): i for i, case in enumerate(all_cases())}
  return sorted(lines, key=lambda line: place.get((line['table'], line['name']), len(place)))


def _row(line: Line, mfu: Mapping[tuple[str, int], float]) -> list[str]:
  """Cells under COLUMNS. mfu: {(dense run, reading): MFU}."""
  gib = lambda size: f'{size / chips.GIB:.2f}'
  sent = lambda all_to_all: sum(c['sent_bytes'] for c in line['collectives']
                                if (c['kind'] == 'all-to-all') == all_to_all)
  memory, roof, work = line['memory'], line['roofline'], line['flops']
  parent, upcycled, _ = line['name'].partition('_upcycled')
  dense = mfu.get((parent, _reading(line))) if upcycled else None
  share = roof['mfu_serial'] / dense if dense else None
  beside = f'{share:.2f}{"!" if share < LIMIT else ""}' if share else ''
  mesh = ' '.join(f'{axis}={size}' for axis, size in line['mesh'].items() if size > 1) or '1'
  name = line['name'] + (' †' if _old(line) else '')
  return [name, line['slice'], mesh, f'{line["parameters"] / 1e6:,.0f} M',
          f'{line["parameters_active_per_token"] / 1e6:,.0f} M', gib(memory['total']),
          gib(memory['available']), f'{work["executed"] / work["model"]:.2f}', gib(sent(True)),
          gib(sent(False)), f'{1e3 * roof["serial"]:,.0f}', f'{roof["mfu_serial"]:.2f}', beside,
          f'{sum(line["seconds"].values()):.0f} s']


def draw(lines: list[Line], folder: pathlib.Path) -> None:
  """Writes the plots that the page shows, as PNG."""
  lines = _in_order(lines)
  for table, plot in PLOTS.items():
    if own := [line for line in lines if line['table'] == table]:
      with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * PANEL, 3.6), layout='constrained')
        plot(own, figure)
        save(figure, folder / f'{table}.png')


GRAY, BLUE, ORANGE, GREEN = COLORS[7], COLORS[1], COLORS[2], COLORS[3]
BOUNDS = {'compute_bound': ('bound by FLOPs', BLUE, ''),
          'memory_bound': ('bound by HBM', ORANGE, '//'), 'network': ('network', GREEN, '..')}


def draw_weak_scaling(lines: Sequence[Line], figure: Figure) -> None:
  """The estimated step by what bounds it, and a chip's HBM, by number of chips."""
  names = [str(line['chips']) for line in lines]
  step, memory = figure.subplots(1, 2)
  bottom = [0.0] * len(lines)
  for key, (label, color, hatch) in BOUNDS.items():
    height = [1e3 * line['roofline'][key] for line in lines]
    step.bar(names, height, bottom=bottom, label=label, color=color, hatch=hatch,
             edgecolor='white')
    bottom = [a + b for a, b in zip(bottom, height)]
  step.set(title='Estimated step, all in turn', xlabel='chips', ylabel='ms')
  step.set_ylim(0, 1.25 * max(bottom))
  step.legend(loc='upper left', ncols=3, fontsize=9)
  memory.bar(names, [line['memory']['total'] / 2**30 for line in lines], color=GRAY)
  memory.set(title='HBM of a chip', xlabel='chips', ylabel='GiB')


def draw_dense_and_upcycled(lines: Sequence[Line], figure: Figure) -> None:
  """Estimated MFU of dense runs beside upcycled ones, where both are compiled."""
  mfu = {line['name']: line['roofline']['mfu_serial'] for line in lines}
  names = [name for name in mfu if f'{name}_upcycled' in mfu]
  place = list(range(len(names)))
  panel = figure.subplots()
  for shift, ending, color, hatch in ((-0.2, '', GRAY, ''), (0.2, '_upcycled', BLUE, '//')):
    panel.bar([x + shift for x in place], [mfu[name + ending] for name in names], 0.4,
              color=color, hatch=hatch, edgecolor='white',
              label='upcycled, 32 experts' if ending else 'dense')
  panel.hlines([LIMIT * mfu[name] for name in names], place, [x + 0.4 for x in place],
               color='black', label=f'{LIMIT} of dense')
  panel.set_xticks(place, [name.replace('_', ' ') for name in names], rotation=20)
  panel.set(ylabel='estimated MFU', ylim=(0, None), title='All operations in turn')
  panel.legend(loc='upper left', ncols=3)
  panel.set_ylim(0, 1.25 * max(mfu.values(), default=1))


PLOTS = {'paper': draw_dense_and_upcycled, 'weak': draw_weak_scaling}


def main(argv: list[str] | None = None) -> int:
  """Compiles, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser('python -m experiments.benchmarks.tpu', __doc__)
  parser.add_argument('--only', metavar='TEXT', default='', help='runs with this in their names')
  parser.add_argument('--table', choices=tuple(TABLES), help='one of the tables')
  parser.add_argument('--read_again', action='store_true',
                      help='read the kept programs once more, compile nothing')
  parser.add_argument('--programs', metavar='DIR', type=pathlib.Path, default=PROGRAMS,
                      help='folder of the compiled programs (default: %(default)s)')
  common.add_measurement_flags(parser, FOLDER)
  args = parser.parse(argv)
  known = [case for case in all_cases() if args.table in (None, case.table)]
  chosen = [case for case in known if args.only in case.name]
  if not chosen:
    fail('--only', args.only, ', '.join(dict.fromkeys(case.name for case in known)),
         'It is a part of such a name.')
  folder = args.results or FOLDER
  output = common.Measurements(folder / FILE, ('table', 'name'), page, folder / PAGE)

  def work() -> int:
    if not args.read_again:
      done = output.keys()
      return output.measure([case for case in chosen if case.key not in done],
                            lambda case: compile_case(case, args.programs), 'program')
    missing = read_again(chosen, output, args.programs)
    if missing:
      print(f'Not read again, their programs are not in {args.programs}: {", ".join(missing)}',
            file=sys.stderr)
    return len(missing)

  code = output.finish(work, args.show)
  if not args.show:
    draw(output.lines(), folder)
  return code


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  cli.start(main)
