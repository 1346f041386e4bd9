"""Measures step time, MFU and memory of the paper's T5s and ViTs on one GPU, dense and upcycled.

  python -m experiments.benchmarks.gpu_step     all cases; an hour or more. It resumes
    --models=vit_b16        t5_base, t5_large, vit_b16, vit_l16
    --only=top_2,dropless   the cases with one of these in their names, in this order
    --scale=smoke           tiny cases on any device, as a test; writes to runs/smoke_gpu
    --show                  only prints the table of what is measured

A case is the real train step of a run of configs/paper (moejax.train.compiled) in bfloat16, on
random tokens or images and random weights; blocks are neither scanned nor rematerialised. Its batch
is that of its model, or the largest half, quarter, ... of it that fits by the forecast. Each case
runs in its own process, because the peak of memory is that of a process. The table also has the
step's own matmuls and attentions, each timed alone (gpu_breakdown.py). Compiling takes most of the
time, so a few cases at a time are compiled side by side, and then measured one after the other.
Results are lines of gpu.jsonl. A case that has a line there, of these settings, device and version
of JAX, is not measured again: after a change of moejax itself, delete its line.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import common as config_files
from configs import paper
from experiments import cli
from experiments.benchmarks import common, gpu_breakdown
from experiments.benchmarks.common import Line
from experiments.benchmarks.gpu_breakdown import Attention, Matmul
from moejax import flops
from moejax.aot import report
from moejax.config import ConfigError, check_choice, fail
from moejax.train import config as run_config
from moejax.train import memory, parallel, workdir
from moejax.train.compiled import Programs
from moejax.train.step import TrainState

MODULE = 'experiments.benchmarks.gpu_step'
FOLDER, SMOKE_FOLDER = common.RESULTS / 'gpu', pathlib.Path('runs') / 'smoke_gpu'
FILE, PAGE = 'gpu.jsonl', 'README.md'
ROUTINGS = ('expert_choice', 'top_2', 'dropless', 'einsum')
MEMORY = '0.92'   # of the device's, which JAX takes at once
WARM = 3          # steps before any is timed
TOGETHER = 8      # cases that are compiled side by side
LEAST_BATCH = 8
LIMIT = 1.15      # of an upcycled step over the sum of its matmuls and attentions

# FLOPs per second in bfloat16, dense, of NVIDIA's data sheets; float16 for T4, which has no
# bfloat16. The first name that is a word of the device's name counts.
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L4': 121e12,
         'T4': 65e12}


@dataclasses.dataclass(frozen=True)
class Scale:
  """batches: {model: largest batch}. experts: E of upcycled cases. rounds, least: per_call's."""
  batches: Mapping[str, int]
  experts: tuple[int, ...]
  rounds: int
  least: float
  runlocal: bool = False


SCALES = {'gpu': Scale({'t5_base': 64, 't5_large': 32, 'vit_b16': 256, 'vit_l16': 128},
                       (8, 32), 7, 0.4),
          'smoke': Scale({'t5_base': 16, 'vit_b16': 16}, (4,), 2, 0.0, runlocal=True)}


@dataclasses.dataclass(frozen=True)
class Case:
  """One step to measure.

  Attributes:
    model: of Scale.batches.
    routing: 'dense', or of ROUTINGS. In a T5's decoder, where experts cannot choose tokens,
      'expert_choice' has the paper's top-2. 'einsum' is 'expert_choice' by the einsum dispatch.
    experts: of each sparse layer; 0 for a dense model.
    attention: config.execution.attention.
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
    config = config_files.load(f'paper/{name}', 'runlocal' if scale.runlocal else None)
    config.init.update(mode='scratch', parent='')
    config.execution.update(scan=False, remat='none', attention=self.attention)
    config.data.batch_size = config.data.eval_batch_size = batch_size
    paper.unplace(config)
    if self.experts:
      for stack in run_config.resolve(config).model.stacks().values():
        moe = config.model[stack.moe_key]
        if self.routing in ('top_2', 'dropless'):
          config_files.set_moe(moe, 'sparse_upcycling_decoder')
        moe.num_experts = self.experts
        moe.dispatch = {'dropless': 'grouped', 'einsum': 'einsum'}.get(self.routing, 'gather')
    return run_config.resolve(config)

  def key(self, scale: Scale, device: str) -> str:
    """Hash of the settings, the device and the version of JAX, but not of moejax's own code."""
    config = self.config(scale, scale.batches[self.model])
    text = json.dumps(run_config.changes(config), sort_keys=True)
    text += repr(scale) + device + jax.__version__
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def all_cases(scale: Scale) -> list[Case]:
  """Every case; with fused attention too where it applies, in ViTs."""
  cases = []
  for model in scale.batches:
    for attention in ('plain', 'fused') if model.startswith('vit') else ('plain',):
      cases.append(Case(model, 'dense', 0, attention))
      cases += [Case(model, routing, experts, attention)
                for experts in scale.experts for routing in ROUTINGS
                if attention == 'plain' or not scale.runlocal]
  return cases


def measure(case: Case, scale: Scale) -> Line:
  """Its line of FILE without key and command. Raises ConfigError if no batch fits."""
  programs, forecast = _largest(case, scale)
  config, device = programs.run.config, jax.local_devices()[0]
  (low, took, high), kernels = _timed(programs, scale)
  peak = (device.memory_stats() or {}).get('peak_bytes_in_use')
  alone, errors = {Matmul: 0.0, Attention: 0.0}, {}
  fused = case.attention == 'fused'
  for operation in _operations(config):
    alone[type(operation)] += gpu_breakdown.seconds(operation, fused, rounds=scale.rounds,
                                                    least=scale.least / 5)
    if isinstance(operation, Attention) and fused:
      errors['attention_errors'] = gpu_breakdown.attention_errors(operation)
  work = flops.train_step_flops(config.model, config.data.batch_size, *_lengths(config),
                                dispatch=False)
  total, active = flops.parameters(programs.run.model.shapes, config.model)
  return {**dataclasses.asdict(case), 'name': case.name, 'batch_size': config.data.batch_size,
          'parameters': total, 'parameters_active_per_token': active, 'flops': work,
          'seconds': took, 'low': low, 'high': high, 'matmuls': alone[Matmul],
          'attention_alone': alone[Attention], 'kernels': kernels,
          'other_bytes': gpu_breakdown.bytes_moved(programs.train.compiled.as_text()),
          'peak_bytes': peak, 'forecast': forecast.as_dict(), **errors,
          'device': common.device_name(), 'versions': workdir.versions()}


def prepare(case: Case, scale: Scale) -> None:
  """Compiles the programs of `measure` into JAX's folder of compiled programs."""
  programs, _ = _largest(case, scale)
  for operation in _operations(programs.run.config):
    gpu_breakdown.prepare(operation, case.attention == 'fused')


def _lengths(config: run_config.RunConfig) -> tuple[int, int]:
  return config.data.text.encoder_length, config.data.text.decoder_length


def _operations(config: run_config.RunConfig) -> list[Matmul | Attention]:
  return gpu_breakdown.operations(config.model, config.data.batch_size, *_lengths(config))


def _timed(programs: Programs, scale: Scale
           ) -> tuple[list[float], dict[str, Any] | None]:
  """Quartiles of a step's seconds, and its kernels; frees the step's batch and state."""
  batch = programs.run.devices.put(synthetic(programs.run.config))
  state = random_state(programs.shapes)

  def advance():
    nonlocal state
    state, marker = programs.train(state, batch)
    return marker
  for _ in range(WARM):
    jax.block_until_ready(advance())
  return (gpu_breakdown.per_call(advance, scale.rounds, scale.least),
          gpu_breakdown.profile(advance))


def _largest(case: Case, scale: Scale) -> tuple[Programs, memory.Forecast]:
  """(programs, forecast) of the largest batch that fits. Raises ConfigError if none does."""
  batch_size = scale.batches[case.model]
  while True:
    config = case.config(scale, batch_size)
    devices = parallel.make('mesh', config.mesh, jax.local_devices()[:1])
    programs = report.programs_of(config, devices)
    forecast = memory.measure(programs, memory.free(devices))
    if forecast.fits:
      return programs, forecast
    if batch_size <= LEAST_BATCH or not forecast.compiled:
      fail(case.name, f'a batch of {batch_size}', 'what the device holds', f'It needs {forecast}.')
    activations = forecast.activations   # nearly in proportion to the batch
    fixed = forecast.needed - activations
    while batch_size > LEAST_BATCH:
      batch_size, activations = batch_size // 2, activations // 2
      if fixed + activations <= (forecast.available or 0):
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
  """A train batch of random tokens or pixels without padding, in the shapes of a real one."""
  rng = np.random.default_rng(0)
  _, top = config.model.outputs

  def fill(name, shape):
    if name == 'weight':
      return np.ones(shape.shape, shape.dtype)
    if name == 'index':
      return np.arange(shape.shape[0], dtype=shape.dtype)
    if name == 'image':
      return rng.normal(size=shape.shape).astype(shape.dtype)
    return rng.integers(1, top, shape.shape).astype(shape.dtype)
  return {name: fill(name, shape) for name, shape in report.batch_shapes(config).items()}


def measure_missing(chosen: Sequence[Case], scale_name: str, output: common.Measurements) -> int:
  """Measures the cases without a line; returns how many could not be measured.

  This process uses no device of JAX: it would take the GPU's memory from the cases.
  """
  scale, device = SCALES[scale_name], _child('--device')
  if scale_name == 'gpu' and not device.startswith(('gpu', 'cuda', 'rocm')):
    fail('--scale', scale_name, f'smoke, on {device!r}',
         "On a GPU: pip install -U 'jax[cuda13]'.")
  known = output.keys()
  missing = [case for case in chosen if case.key(scale, device) not in known]
  command = f'python -m {MODULE} --scale={scale_name}'
  with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(TOGETHER) as pool:
    def child(flag: str, case: Case) -> str:
      return _child(f'--{flag}={case.name}', f'--scale={scale_name}', cache=cache)

    def try_prepare(case: Case) -> None:
      with contextlib.suppress(ConfigError):   # `measured` raises it again
        child('prepare', case)

    def measured(case: Case) -> Line:
      place = missing.index(case)
      if place % TOGETHER == 0:
        list(pool.map(try_prepare, missing[place:place + TOGETHER]))
      return {'key': case.key(scale, device), 'command': command, **json.loads(child('case', case))}
    return output.measure(missing, measured, 'case')


def _child(*flags: str, cache: str = '') -> str:
  """The last line that this script, started with these flags, prints. Raises ConfigError.

  cache: a folder of compiled programs, since cases have most of their matmuls in common.
  """
  env = {'XLA_PYTHON_CLIENT_MEM_FRACTION': MEMORY, **os.environ}
  if flags[0].startswith('--prepare'):   # others use the device too
    env['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  done = subprocess.run([sys.executable, '-m', MODULE, *flags], capture_output=True,
                        text=True, check=False, env=env)
  if done.returncode:
    raise ConfigError((done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1])
  return done.stdout.strip().splitlines()[-1]


COLUMNS = ('case', 'parameters', 'batch', 'step', 'matmuls', 'attention', 'step / both',
           'products in it', 'other kernels', 'GB of them', 'MFU', 'examples / s',
           'time / dense', 'peak', 'forecast')

LEGEND = (
    'step: milliseconds, median; matmuls, attention: those of the step, each alone, forward and '
    f'backward; step / both: of an upcycled step the aim is at most {LIMIT:.2f}, what is above is '
    'marked !. products in it, other kernels: time of the step in kernels of matmuls and fused '
    'attention, and in all others (a profile); GB of them: what the others read and write, by the '
    'compiled program. MFU: FLOPs of the model (flops.py) over those of '
    "the device's peak in bfloat16. time / dense: per "
    'example, over the dense case of the same attention. peak: GiB that the process had at most on '
    'the device; forecast: GiB, before anything was allocated (moejax/train/memory.py). '
    'Dropless matmuls alone have even loads. –: not known here.')


def page(lines: list[Line]) -> str:
  """Markdown, a table per device; cases in their order, lines of other names last."""
  names = dict.fromkeys(case.name for scale in SCALES.values() for case in all_cases(scale))
  order = {name: i for i, name in enumerate(names)}
  out = ['# On a GPU', '']
  for device in sorted({line['device'] for line in lines}):
    own = sorted((line for line in lines if line['device'] == device),
                 key=lambda line: order.get(line['name'], len(order)))
    dense = {(line['model'], line['attention']): line['seconds'] / line['batch_size']
             for line in own if line['routing'] == 'dense'}
    out += [f'## {device}', '', *common.table(COLUMNS, (_row(line, dense) for line in own)), '',
            common.made_by(own), '']
    errors = [line['attention_errors'] for line in own if 'attention_errors' in line]
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


def _row(line: Line, dense: dict[tuple[str, str], float]) -> list[str]:
  """Cells under COLUMNS. dense: {(model, attention): seconds of an example}."""
  per_example, peak = line['seconds'] / line['batch_size'], peak_of(line['device'])
  base, kernels = dense.get((line['model'], line['attention'])), line.get('kernels') or {}
  both = line['matmuls'] and line['matmuls'] + line['attention_alone']   # None: not measured
  mark = '!' if line['experts'] and both and line['seconds'] > LIMIT * both else ''
  forecast = sum(line['forecast'][k] for k in ('params', 'optimizer', 'gradients', 'activations'))
  scaled = lambda value, scale, form: common.number(value / scale if value else None, form)
  return [line['name'], f'{line["parameters"] / 1e6:,.0f} M', str(line['batch_size']),
          *(scaled(line[k], 1e-3, ',.1f') for k in ('seconds', 'matmuls', 'attention_alone')),
          scaled(line['seconds'], both, '.2f') + mark if both else '–',
          *(scaled(kernels.get(k), 1e-3, ',.1f') for k in ('products', 'other')),
          scaled(line.get('other_bytes'), 1e9, ',.0f'),
          scaled(line['flops'] / line['seconds'], peak, '.2f') if peak else '–',
          f'{1 / per_example:,.0f}', scaled(per_example, base, '.2f') if base else '–',
          scaled(line['peak_bytes'], 2**30, '.1f'), scaled(forecast, 2**30, '.1f')]


def main(argv: list[str] | None = None) -> int:
  """Measures, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser(f'python -m {MODULE}', __doc__)
  parser.add_argument('--models', metavar='NAME[,NAME]',
                      help=f'of {", ".join(SCALES["gpu"].batches)} (default: all)')
  parser.add_argument('--only', metavar='TEXT[,TEXT]', default='',
                      help='cases with one of these in their names, in this order')
  parser.add_argument('--scale', choices=tuple(SCALES), default='gpu',
                      help='how large (default: %(default)s)')
  common.add_measurement_flags(parser, FOLDER, SMOKE_FOLDER)
  parser.add_argument('--case', help='measure this one here and print its line (used by itself)')
  parser.add_argument('--prepare', help='compile this one, into the folder of '
                      'JAX_COMPILATION_CACHE_DIR (used by itself)')
  parser.add_argument('--device', action='store_true', help='print the device (used by itself)')
  args = parser.parse(argv)
  if args.device or args.case or args.prepare:
    return _as_child(args)
  folder = common.folder_of(args, FOLDER, SMOKE_FOLDER)
  output = common.Measurements(folder / FILE, ('name', 'device', 'command'), page, folder / PAGE)
  chosen = _chosen(args)
  return output.finish(lambda: measure_missing(chosen, args.scale, output), args.show)


def _chosen(args) -> list[Case]:
  """The cases of --models and --only. Raises ConfigError if one of these names none."""
  scale = SCALES[args.scale]
  models = list(scale.batches) if args.models is None else args.models.split(',')
  for model in models:
    check_choice('--models', model, scale.batches)
  known = [case for case in all_cases(scale) if case.model in models]
  named = {text: [case for case in known if text in case.name] for text in args.only.split(',')}
  for text, cases in named.items():
    if not cases:
      fail('--only', text, ', '.join(case.name for case in known), 'It is a part of a name.')
  return list(dict.fromkeys(case for cases in named.values() for case in cases))


def _as_child(args) -> int:
  """Prints the device's name, or the line of one case, as JSON."""
  if args.device:
    print(common.device_name())
    return 0
  scale = SCALES[args.scale]
  known = {case.name: case for case in all_cases(scale)}
  flag, name = ('--case', args.case) if args.case else ('--prepare', args.prepare)
  check_choice(flag, name, known)
  if args.prepare:
    prepare(known[name], scale)
  print('null' if args.prepare else json.dumps(measure(known[name], scale)))
  return 0


if __name__ == '__main__':
  cli.start(main)
