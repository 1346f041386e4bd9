"""T5 and ViT of the paper's sizes on one GPU: step time, MFU and memory, dense and upcycled.

  python -m experiments.benchmarks.gpu_step     all cells; an hour or more. It resumes
    --models=vit_b16        t5_base, t5_large, vit_b16, vit_l16
    --only=top_2,dropless   the cells with that in their names, in this order
    --scale=smoke           tiny ones on any device, to see that it works; into runs/smoke_gpu
    --show                  the table of what is measured, and no more

A cell is the real train step of a run of configs/paper (moejax.train.compiled) in bfloat16,
its blocks neither scanned nor rematerialised, on random tokens or images and random weights, at its
model's batch or the largest half, quarter, ... of it that the forecast finds room for; in a process
of its own, since the peak of memory is that of a process. Beside it stand its own matmuls and
attentions, each timed alone (experiments/parts). A few cells at a time are compiled side by side,
which most of the time goes into, and measured one after the other then.
Results are lines of gpu.jsonl; a cell that is there, with these settings, device and version of
JAX, is not measured again: after a change of moejax itself, delete its line.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from configs import common, paper
from configs.common import set_moe
from experiments import cli, results
from experiments.benchmarks import gpu_profile, gpu_table, step_floor
from moejax import flops
from moejax.aot import report
from moejax.config import ConfigError, check_choice, fail
from moejax.train import config as run_config
from moejax.train import memory, metrics, parallel, workdir
from moejax.train.compiled import Programs
from moejax.train.step import TrainState

MODULE = 'experiments.benchmarks.gpu_step'
FOLDER = pathlib.Path(__file__).parent.parent / 'results/gpu'
FILE, PAGE = 'gpu.jsonl', 'README.md'
MODELS = ('t5_base', 't5_large', 'vit_b16', 'vit_l16')
ROUTINGS = ('expert_choice', 'top_2', 'dropless', 'einsum')
MEMORY = '0.92'   # of the device's, which JAX takes at once
WARM = 3        # steps before any is timed
TOGETHER = 8    # cells that are compiled side by side


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

  def config(self, scale: Scale, batch_size: int) -> run_config.RunConfig:
    """Its run on one device; the data is never opened."""
    name = self.model + ('_upcycled' if self.experts else '')
    config = common.load(f'paper/{name}', 'runlocal' if scale.runlocal else None)
    config.init.update(mode='scratch', parent='')
    config.execution.update(scan=False, remat='none', attention=self.attention)
    config.data.batch_size = config.data.eval_batch_size = batch_size
    paper.unplace(config)
    if self.experts:
      for stack in run_config.resolve(config).model.stacks().values():
        moe = config.model[stack.moe_key]
        if self.routing in ('top_2', 'dropless'):
          set_moe(moe, 'sparse_upcycling_decoder')
        moe.num_experts = self.experts
        moe.dispatch = {'dropless': 'grouped', 'einsum': 'einsum'}.get(self.routing, 'gather')
    return run_config.resolve(config)

  def key(self, scale: Scale, device: str) -> str:
    """Of the settings, the device and the version of JAX; moejax's own code does not count."""
    config = self.config(scale, scale.batches[self.model])
    text = json.dumps(run_config.changes(config), sort_keys=True)
    text += repr(scale) + device + jax.__version__
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
  programs, found = _largest(cell, scale)
  config, device = programs.run.config, jax.local_devices()[0]
  (low, took, high), inside = _timed(programs, scale)
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  lengths, own = _parts(config)
  alone = {step_floor.Matmul: 0.0, step_floor.Attend: 0.0}
  fused = {}
  for part in own:
    alone[type(part)] += step_floor.seconds(part, cell.attention == 'fused', rounds=scale.rounds,
                                       least=scale.least / 5)
    if isinstance(part, step_floor.Attend) and cell.attention == 'fused':
      fused['attention_errors'] = step_floor.errors(part)
  work = flops.train_step_flops(config.model, config.data.batch_size, *lengths, dispatch=False)
  total, active = flops.parameters(programs.run.model.shapes, config.model)
  return {**dataclasses.asdict(cell), 'name': cell.name, 'batch_size': config.data.batch_size,
          'parameters': total, 'parameters_active_per_token': active, 'flops': work,
          'seconds': took, 'low': low, 'high': high, 'matmuls': alone[step_floor.Matmul],
          'attention_alone': alone[step_floor.Attend], 'kernels': inside,
          'other_bytes': gpu_profile.moved(programs.train.compiled.as_text()), 'peak_bytes': peak,
          'forecast': found.as_dict(), **fused, 'device': device_name(device),
          'versions': workdir.versions()}


def prepare(cell: Cell, scale: Scale):
  """Compiles what `measure` runs, into JAX's folder of compiled programs."""
  programs, _ = _largest(cell, scale)
  for part in _parts(programs.run.config)[1]:
    step_floor.prepare(part, cell.attention == 'fused')


def _parts(config: run_config.RunConfig
           ) -> tuple[tuple[int, ...], list[step_floor.Matmul | step_floor.Attend]]:
  """(encoder and decoder length, or nothing; matmuls and attentions) of a cell's step."""
  text = config.data.text
  lengths = text.encoder_length, text.decoder_length
  return lengths, step_floor.parts(config.model, config.data.batch_size, *lengths)


def _timed(programs: Programs, scale: Scale) -> tuple[list[float], dict[str, float] | None]:
  """Seconds of a step, as parts.per_call, and of its kernels; what it allocated is freed."""
  batch = programs.run.devices.put(synthetic(programs.run.config))
  state = random_state(programs.shapes)

  def advance():
    nonlocal state
    state, marker = programs.train(state, batch)
    return marker
  for _ in range(WARM):
    jax.block_until_ready(advance())
  return step_floor.per_call(advance, scale.rounds, scale.least), gpu_profile.per_step(advance)


def _largest(cell: Cell, scale: Scale) -> tuple[Programs, memory.Forecast]:
  """Of the largest batch that fits. Raises ConfigError if none does."""
  batch_size = scale.batches[cell.model]
  while True:
    config = cell.config(scale, batch_size)
    devices = parallel.make('mesh', config.mesh, jax.local_devices()[:1])
    programs = report.programs_of(config, devices)
    found = memory.measure(programs, memory.free(devices))
    if found.fits:
      return programs, found
    if batch_size <= LEAST_BATCH or not found.compiled:
      fail(cell.name, f'a batch of {batch_size}', 'what the device holds', f'It needs {found}.')
    fixed = found.needed - found.activations   # activations are in proportion to the batch, about
    while batch_size > LEAST_BATCH:
      batch_size, found = batch_size // 2, dataclasses.replace(
          found, activations=found.activations // 2)
      if fixed + found.activations <= (found.available or 0):
        break


def random_state(shapes: TrainState) -> TrainState:
  """Weights from N(0, 0.02^2), all else zeros.

  A model's own initial values take longer to compile than its step.
  """
  zeros = lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding)
  state = jax.tree.map(zeros, shapes)
  leaves, tree = jax.tree.flatten(shapes.params)
  drawn = [jax.device_put(_normal(i, s.shape, s.dtype), s.sharding) for i, s in enumerate(leaves)]
  return dataclasses.replace(state, params=jax.tree.unflatten(tree, drawn))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype) -> jax.Array:
  return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)


def synthetic(config: run_config.RunConfig) -> dict[str, Any]:
  """A train batch of random tokens or pixels, no padding; its shapes are those of a real one."""
  rng = np.random.default_rng(0)
  model = config.model
  _, top = model.outputs

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
  left = [cell for cell in chosen if cell.key(scale, device) not in there]
  with (tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(TOGETHER) as pool,
        tqdm(left, unit='cell', dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar):
    def child(what: str, cell: Cell) -> str | ConfigError:
      try:
        return _child(f'--{what}={cell.name}', f'--scale={scale_name}', cache=cache)
      except ConfigError as error:
        return error
    for i, cell in enumerate(bar):
      if i % TOGETHER == 0:
        bar.set_postfix_str('compiling')
        list(pool.map(functools.partial(child, 'prepare'), left[i:i + TOGETHER]))
      bar.set_postfix_str(cell.name)
      found = child('cell', cell)
      if isinstance(found, ConfigError):
        tqdm.write(f'{cell.name}: {found}', file=sys.stderr)
        failed += 1
        continue
      keep({'key': cell.key(scale, device),
            'command': f'python -m {MODULE} --scale={scale_name}', **json.loads(found)},
           folder)
  return failed


def keep(line: dict[str, Any], folder: pathlib.Path):
  """Writes a cell's line, in place of one of the same cell, device and command."""
  kept = [old for old in metrics.read_lines(folder / FILE)
          if any(old[k] != line[k] for k in ('name', 'device', 'command'))]
  results.write_text(folder / FILE, ''.join(json.dumps(x) + '\n' for x in [*kept, line]))


def _child(*flags: str, cache: str = '') -> str:
  """The last line that this script, started with these flags, prints. Raises ConfigError.

  cache: a folder of compiled programs, since cells have most of their matmuls in common.
  """
  env = {'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY, **os.environ}
  if flags[0].startswith('--prepare'):   # others are at it on the same device
    env['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  done = subprocess.run([sys.executable, '-m', MODULE, *flags], capture_output=True,
                        text=True, check=False, env=env)
  if done.returncode:
    raise ConfigError((done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])
  return done.stdout.strip().splitlines()[-1]


def page(lines: list[dict[str, Any]]) -> str:
  """Markdown, a table per device, cells in their order."""
  return gpu_table.page(
      lines, dict.fromkeys(cell.name for scale in SCALES.values() for cell in cells(scale)))


def main(argv: list[str] | None = None) -> int:
  """Measures, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser('python -m experiments.benchmarks.gpu_step', __doc__)
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
  parser.add_argument('--prepare', help='compile this one, into the folder of '
                      'JAX_COMPILATION_CACHE_DIR (used by itself)')
  parser.add_argument('--device', action='store_true', help='print the device (used by itself)')
  args = parser.parse(argv, suite_required=False)
  if args.device or args.cell or args.prepare:
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
  flag, name = ('--cell', args.cell) if args.cell else ('--prepare', args.prepare)
  check_choice(flag, name, known)
  if args.prepare:
    prepare(known[name], SCALES[args.scale])
  print('null' if args.prepare else json.dumps(measure(known[name], SCALES[args.scale])))
  return 0


if __name__ == '__main__':
  cli.run(main)
