"""T5 and ViT of the paper's sizes on one GPU: step time, MFU and memory, dense and upcycled.

  python -m experiments.gpu                        all cells; an hour or more. It resumes
  python -m experiments.gpu --models=vit_b16       t5_base, t5_large, vit_b16, vit_l16
  python -m experiments.gpu --only=top_2,dropless  the cells with that in their names, in this order
  python -m experiments.gpu --scale=smoke          tiny ones on any device, to see that it works;
                                                   into runs/smoke_gpu
  python -m experiments.gpu --show                 the table of what is measured, and no more

A cell is the real train step of a run of configs/paper (moejax.train.assemble.Step) in bfloat16,
its blocks neither scanned nor rematerialised, on random tokens or images and fresh weights, at its
model's batch or the largest half, quarter, ... of it that the forecast finds room for; in a process
of its own, since the peak of memory is that of a process. Beside it stand its own matmuls and
attentions, each timed alone (experiments/parts).
Results are lines of gpu.jsonl; a cell that is there, with these settings, device and version of
JAX, is not measured again: after a change of moejax itself, delete its line.
"""

import dataclasses
import hashlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from configs import paper, set_moe
from experiments import cli, kernels, parts, results
from moejax import flops
from moejax.ahead import report
from moejax.config import ConfigError, check_choice, fail
from moejax.train import forecast, metrics, parallel, settings, workdir
from moejax.train.assemble import Step

FOLDER = pathlib.Path(__file__).parent / 'results/gpu'
FILE, PAGE = 'gpu.jsonl', 'README.md'
MODELS = ('t5_base', 't5_large', 'vit_b16', 'vit_l16')
ROUTINGS = ('expert_choice', 'top_2', 'dropless', 'einsum')
MEMORY = '0.92'   # of the device's, which JAX takes at once
WARM = 3        # steps before any is timed
LIMIT = 1.15    # what an upcycled step may take, over the sum of its matmuls and attentions


@dataclasses.dataclass(frozen=True)
class Scale:
  """batches: {model: largest batch}. experts: E of upcycled cells. rounds, least: per_call's."""
  batches: Mapping[str, int]
  experts: tuple[int, ...]
  rounds: int
  least: float
  runlocal: bool = False


SCALES = {'gpu': Scale({'t5_base': 64, 't5_large': 32, 'vit_b16': 256, 'vit_l16': 128},
                       (8, 32), 7, 0.4),
          'smoke': Scale({'t5_base': 16, 'vit_b16': 16}, (4,), 2, 0.0, runlocal=True)}
LEAST_BATCH = 8

# FLOPs per second in bfloat16, dense, of NVIDIA's data sheets; float16 for T4, which has no other.
# The first name that is a word of the device's counts.
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L4': 121e12,
         'T4': 65e12}


@dataclasses.dataclass(frozen=True)
class Cell:
  """One step to measure.

  Attributes:
    model: of MODELS.
    routing: 'dense', or of ROUTINGS. A T5's decoder cannot choose by experts: with 'expert_choice'
      it has the paper's top-2. 'einsum' is 'expert_choice' by the other dispatch.
    experts: of each sparse layer; 0 for a dense model.
    attention: as config.execution.attention.
  """
  model: str
  routing: str
  experts: int
  attention: str

  @property
  def name(self) -> str:
    return '-'.join([self.model, self.routing, *([f'e{self.experts}'] if self.experts else []),
                     *(['fused'] if self.attention == 'fused' else [])])

  def config(self, scale: Scale, batch_size: int) -> settings.RunConfig:
    """Its run on one device; the data is never opened."""
    name = self.model + ('_upcycled' if self.experts else '')
    module = importlib.import_module(f'configs.paper.{name}')
    config = module.get_config('runlocal' if scale.runlocal else None)
    config.init.update(mode='scratch', parent='')
    config.execution.update(scan=False, remat='none', attention=self.attention)
    config.data.batch_size = config.data.eval_batch_size = batch_size
    paper.unplace(config)
    if self.experts:
      moes = ([config.model.moe] if config.model.family == 'vit' else
              [config.model.encoder_moe, config.model.decoder_moe])
      for moe in moes:
        if self.routing in ('top_2', 'dropless'):
          set_moe(moe, 'sparse_upcycling_decoder')
        moe.num_experts = self.experts
        moe.dispatch = {'dropless': 'grouped', 'einsum': 'einsum'}.get(self.routing, 'gather')
    return settings.resolve(config)

  def key(self, scale: Scale, device: str) -> str:
    """Of the settings, the device and the version of JAX; moejax's own code does not count."""
    text = settings.to_json(self.config(scale, scale.batches[self.model])) + repr(scale)
    text += device + jax.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cells(scale: Scale) -> list[Cell]:
  """All there are; fused attention where it applies, which is ViT."""
  found = []
  for model in scale.batches:
    for attention in ('plain', 'fused') if model.startswith('vit') else ('plain',):
      found.append(Cell(model, 'dense', 0, attention))
      found += [Cell(model, routing, experts, attention)
                for experts in scale.experts for routing in ROUTINGS
                if attention == 'plain' or not scale.runlocal]
  return found


def measure(cell: Cell, scale: Scale) -> dict[str, Any]:
  """Its line of FILE, but for its key and command. Raises ConfigError if no batch fits."""
  compiled, step, found = _largest(cell, scale)
  config, device = step.config, jax.local_devices()[0]
  (low, took, high), inside = _timed(compiled, step, scale)
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  text = config.data.text
  lengths = () if config.model.family == 'vit' else (text.encoder_length, text.decoder_length)
  alone = {parts.Matmul: 0.0, parts.Attend: 0.0}
  fused = {}
  for part in parts.parts(config.model, config.data.batch_size, *lengths):
    alone[type(part)] += parts.seconds(part, cell.attention == 'fused', rounds=scale.rounds,
                                       least=scale.least / 5)
    if isinstance(part, parts.Attend) and cell.attention == 'fused':
      fused['attention_errors'] = parts.errors(part)
  work = flops.train_step_flops(config.model, config.data.batch_size, *lengths, dispatch=False)
  total, active = flops.parameters(step.model.shapes, config.model)
  return {**dataclasses.asdict(cell), 'name': cell.name, 'batch_size': config.data.batch_size,
          'parameters': total, 'parameters_active_per_token': active, 'flops': work,
          'seconds': took, 'low': low, 'high': high, 'matmuls': alone[parts.Matmul],
          'attention_alone': alone[parts.Attend], 'kernels': inside, 'peak_bytes': peak,
          'forecast': found.as_dict(), **fused, 'device': device_name(device),
          'versions': workdir.versions()}


def _timed(compiled: jax.stages.Compiled, step: Step, scale: Scale
           ) -> tuple[list[float], dict[str, float] | None]:
  """Seconds of a step, as parts.per_call, and of its kernels; what it allocated is freed."""
  batch = step.devices.put(synthetic(step.config))
  state, _ = step.first_state(None)

  def advance():
    nonlocal state
    state, marker = compiled(state, batch)
    return marker
  for _ in range(WARM):
    jax.block_until_ready(advance())
  return parts.per_call(advance, scale.rounds, scale.least), kernels.per_step(advance)


def _largest(cell: Cell, scale: Scale
             ) -> tuple[jax.stages.Compiled, Step, forecast.Forecast]:
  """Of the largest batch that fits. Raises ConfigError if none does."""
  batch_size = scale.batches[cell.model]
  while True:
    config = cell.config(scale, batch_size)
    step = report.step_of(config, parallel.make('mesh', config.mesh, jax.local_devices()[:1]))
    compiled, found = forecast.measure(step, forecast.free(step.devices))
    if compiled is not None and found.fits:
      return compiled, step, found
    if batch_size <= LEAST_BATCH or not found.compiled:
      fail(cell.name, f'a batch of {batch_size}', 'what the device holds', f'It needs {found}.')
    fixed = found.needed - found.activations   # activations are in proportion to the batch, about
    while batch_size > LEAST_BATCH:
      batch_size, found = batch_size // 2, dataclasses.replace(
          found, activations=found.activations // 2)
      if fixed + found.activations <= (found.available or 0):
        break


def synthetic(config: settings.RunConfig) -> dict[str, Any]:
  """A train batch of random tokens or pixels, no padding; its shapes are those of a real one."""
  rng = np.random.default_rng(0)
  model = config.model
  top = model.num_classes if model.family == 'vit' else model.vocab_size

  def fill(name, shape):
    if name == 'weight':
      return np.ones(shape.shape, shape.dtype)
    if name == 'index':
      return np.arange(shape.shape[0], dtype=shape.dtype)
    if name == 'image':
      return rng.normal(size=shape.shape).astype(shape.dtype)
    return rng.integers(1, top, shape.shape).astype(shape.dtype)
  return {name: fill(name, shape) for name, shape in report.batch_shapes(config).items()}


def device_name(device) -> str:
  return f'{device.platform}: {device.device_kind}'


def run(chosen: Iterable[Cell], scale_name: str, folder: pathlib.Path) -> int:
  """Measures what is not there yet; returns how many could not be.

  This process asks JAX for no device: it would take the memory of the GPU from the cells'.
  """
  chosen, scale, failed = list(chosen), SCALES[scale_name], 0
  device = _child('--device')
  if scale_name == 'gpu' and not device.startswith(('gpu', 'cuda', 'rocm')):
    fail('--scale', scale_name, f'smoke, on {device!r}',
         "On a GPU: pip install -U 'jax[cuda13]'.")
  there = {line['key'] for line in metrics.read_lines(folder / FILE)}
  with (tempfile.TemporaryDirectory() as cache,
        tqdm(chosen, unit='cell', dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar):
    for cell in bar:
      bar.set_postfix_str(cell.name)
      key = cell.key(scale, device)
      if key in there:
        continue
      try:
        line = json.loads(_child(f'--cell={cell.name}', f'--scale={scale_name}',
                                 cache=cache))
      except ConfigError as error:
        tqdm.write(f'{cell.name}: {error}', file=sys.stderr)
        failed += 1
        continue
      line = {'key': key, 'command': f'python -m experiments.gpu --scale={scale_name}', **line}
      kept = [old for old in metrics.read_lines(folder / FILE)
              if any(old[k] != line[k] for k in ('name', 'device', 'command'))]
      results.write_text(folder / FILE, ''.join(json.dumps(x) + '\n' for x in [*kept, line]))
  return failed


def _child(*flags: str, cache: str = '') -> str:
  """The last line that this script, started with these flags, prints. Raises ConfigError.

  cache: a folder of compiled programs, since cells have most of their matmuls in common.
  """
  env = {'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY, **os.environ}
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  done = subprocess.run([sys.executable, '-m', 'experiments.gpu', *flags], capture_output=True,
                        text=True, check=False, env=env)
  if done.returncode:
    raise ConfigError((done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])
  return done.stdout.strip().splitlines()[-1]


COLUMNS = ('cell', 'parameters', 'batch', 'step', 'matmuls', 'attention', 'step / both',
           'products in it', 'other kernels', 'MFU', 'examples / s', 'time / dense', 'peak',
           'forecast')

LEGEND = (
    'step: milliseconds, median; matmuls, attention: those of the step, each alone, forward and '
    f'backward; step / both: of an upcycled step at most {LIMIT:.2f} is wanted, what is above is '
    'marked !. products in it, other kernels: what the step spends in kernels of matmuls and fused '
    'attention, and in all others (a profile). MFU: FLOPs of the model (flops.py) over those of '
    "the device's peak in bfloat16. time / dense: per "
    'example, over the dense cell of the same attention. peak: GiB that the process had at most on '
    'the device; forecast: GiB, before anything was allocated (moejax/train/forecast.py). '
    'Dropless matmuls alone have even loads. –: not known here.')


def page(lines: list[dict[str, Any]]) -> str:
  """Markdown, a table per device, cells in their order."""
  names = dict.fromkeys(cell.name for scale in SCALES.values() for cell in cells(scale))
  order = {name: i for i, name in enumerate(names)}
  out = ['# On a GPU', '']
  for device in sorted({line['device'] for line in lines}):
    rows = sorted((x for x in lines if x['device'] == device),
                  key=lambda x: order.get(x['name'], len(order)))
    dense = {(x['model'], x['attention']): x['seconds'] / x['batch_size']
             for x in rows if x['routing'] == 'dense'}
    out += [f'## {device}', '', '| ' + ' | '.join(COLUMNS) + ' |',
            '|---|' + '---:|' * (len(COLUMNS) - 1), *(_row(x, dense) for x in rows), '',
            f'JAX {", ".join(sorted({x["versions"]["jax"] for x in rows}))}; '
            + ', '.join(f'`{c}`' for c in sorted({x['command'] for x in rows})) + '.', '']
    errors = [x['attention_errors'] for x in rows if 'attention_errors' in x]
    if errors:
      most = {how: max(e[how] for e in errors) for how in ('fused', 'plain')}
      out += textwrap.wrap(
          f'Attention, output and gradients, is off float32 by at most {most["fused"]:.1e} of an '
          f"array's largest value where it is fused, {most['plain']:.1e} where it is plain, both "
          'in bfloat16.', 100) + ['']
  return '\n'.join(out + textwrap.wrap(LEGEND, 100)) + '\n'


def peak_of(device: str) -> float | None:
  """FLOPs per second of a device by its name; None if it is not in PEAKS."""
  return next((peak for name, peak in PEAKS.items() if re.search(rf'\b{name}\b', device)), None)


def _row(x: dict[str, Any], dense: dict[tuple[str, str], float]) -> str:
  gib = lambda size: f'{size / 2**30:.1f}' if size else '–'
  both = x['matmuls'] and x['matmuls'] + x['attention_alone']   # None: not measured
  mark = '!' if x['experts'] and both and x['seconds'] > LIMIT * both else ''
  peak = peak_of(x['device'])
  base, inside = dense.get((x['model'], x['attention'])), x.get('kernels')
  per_example = x['seconds'] / x['batch_size']
  cells = [x['name'], f'{x["parameters"] / 1e6:,.0f} M', str(x['batch_size']),
           *(f'{1e3 * x[k]:,.1f}' if x[k] else '–'
             for k in ('seconds', 'matmuls', 'attention_alone')),
           f'{x["seconds"] / both:.2f}{mark}' if both else '–',
           *(f'{1e3 * inside[k]:,.1f}' if inside else '–' for k in ('products', 'other')),
           f'{x["flops"] / x["seconds"] / peak:.2f}' if peak else '–',
           f'{1 / per_example:,.0f}', f'{per_example / base:.2f}' if base else '–',
           gib(x['peak_bytes']), gib(sum(x['forecast'][k] for k in (
               'params', 'optimizer', 'gradients', 'activations')))]
  return '| ' + ' | '.join(cells) + ' |'


def main(argv: list[str] | None = None) -> int:
  """Measures, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser('python -m experiments.gpu', __doc__)
  parser.add_argument('--models', metavar='NAME[,NAME]', default=','.join(MODELS),
                      help='(default: %(default)s)')
  parser.add_argument('--only', metavar='TEXT[,TEXT]', default='',
                      help='cells with one of these in their names, in this order')
  parser.add_argument('--scale', choices=tuple(SCALES), default='gpu',
                      help='how large (default: %(default)s)')
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  parser.add_argument('--results', metavar='DIR', type=pathlib.Path,
                      help=f'folder of {FILE} and {PAGE} (default: {FOLDER}; of --scale=smoke '
                      f'{cli.smoke_folder("gpu")})')
  parser.add_argument('--cell', help='measure this one here and print its line (used by itself)')
  parser.add_argument('--device', action='store_true', help='print the device (used by itself)')
  args = parser.parse(argv, suite_required=False)
  if args.device or args.cell:
    return _as_child(args)
  chosen, folder = _chosen(args), args.results or (
      FOLDER if args.scale == 'gpu' else cli.smoke_folder('gpu'))
  return cli.measure(lambda: 0 if args.show else run(chosen, args.scale, folder), page,
                     folder / FILE, None if args.show else folder / PAGE)


def _chosen(args) -> list[Cell]:
  """The cells of --models and --only. Raises ConfigError if one of these names none."""
  scale, models = SCALES[args.scale], args.models.split(',')
  if args.models != ','.join(MODELS):   # the default is all that the scale has
    for model in models:
      check_choice('--models', model, list(scale.batches))
  known = [cell for cell in cells(scale) if cell.model in models]
  found = {text: [cell for cell in known if text in cell.name] for text in args.only.split(',')}
  for text, named in found.items():
    if not named:
      fail('--only', text, ', '.join(cell.name for cell in known), 'It is a part of a name.')
  return list(dict.fromkeys(cell for named in found.values() for cell in named))


def _as_child(args) -> int:
  """Prints the device's name, or the line of one cell, as JSON."""
  if args.device:
    print(device_name(jax.local_devices()[0]))
    return 0
  known = {cell.name: cell for cell in cells(SCALES[args.scale])}
  check_choice('--cell', args.cell, known)
  cell = known[args.cell]
  print(json.dumps(measure(cell, SCALES[args.scale])))
  return 0


if __name__ == '__main__':
  cli.run(main)
