"""Reports whether a run fits a TPU slice, and how long its step should take.

  python -m moejax.main --config=FILE --compile_for=v5p:4x4x8

Compiles the train step for the slice, and evaluation and decoding where they may need more memory
(train/memory.py). It needs no TPU and no data. The step's time is a roofline estimate: each
operation takes the longer of its FLOPs at the chip's peak and its HBM traffic at full bandwidth;
network.py estimates communication. `serial` is computation plus communication; `overlapped` is the
longer of the two. A real step takes longer than `overlapped`, because no operation reaches its
roof.
"""

import dataclasses
import gzip
import json
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from moejax import flops
from moejax.aot import chips, collectives, hlo, network
from moejax.aot.network import Network
from moejax.config import ConfigError, check, fail
from moejax.config import path as path_of
from moejax.sharding import MeshConfig
from moejax.train import memory, parallel, validate
from moejax.train.compiled import Programs
from moejax.train.config import RunConfig
from moejax.train.plan import Plan

FILE, PROGRAM = 'ahead.json', 'program.hlo.gz'
LARGEST = 5   # buffers in the report
READING = 3   # version of the reading; higher where one program would get another estimate


def run(config: RunConfig, slice_name: str, path: str | None = None) -> int:
  """Compiles and prints the report.

  Args:
    config: the run.
    slice_name: such as 'v5p:4x4x8'.
    path: a folder for ahead.json, with the same numbers, and program.hlo.gz, the program itself;
      None: they are not written.

  Returns:
    The exit code, 0.

  Raises:
    ConfigError: the folder cannot be written; no such slice, or no compiler for it; the mesh or
      the batch does not fit; or the step, or another phase of the run, needs more memory than a
      chip has.
  """
  chips.parse(slice_name)
  folder = path_of('--workdir', path) if path else None
  if folder:
    _writable(folder)
  report, program = compile_for(config, slice_name)
  print(to_text(report))
  if folder:
    (folder / FILE).write_text(json.dumps(report, indent=2) + '\n')
    with gzip.open(folder / PROGRAM, 'wt') as file:
      file.write(program)
    print(f'Written to {folder}')
  return 0


def _writable(folder: pathlib.Path) -> None:
  """Makes the folder. Raises ConfigError before minutes of compiling, not after."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    fail('--workdir', str(folder), 'a folder that can be written',
         f'{type(error).__name__}: {error.strerror}. Choose another.')


def compile_for(config: RunConfig, slice_name: str) -> tuple[dict[str, Any], str]:
  """Returns the report, as JSON, and the program's text. Raises ConfigError as `run` does."""
  chip, count = chips.parse(slice_name)
  check(config.parallel == 'mesh', 'config.parallel', config.parallel, "'mesh' with --compile_for",
        'pmap compiles for the devices at hand alone.')
  check(not config.task.teacher, 'config.task.teacher', config.task.teacher,
        "'' with --compile_for", 'The teacher is not compiled.')
  devices = parallel.make('mesh', config.mesh, chips.topology(slice_name).devices)
  started = time.monotonic()
  programs = programs_of(config, devices, bool(config.data.metric))
  programs.train.lower()
  traced = time.monotonic()
  try:
    forecast = memory.check(programs, int(chip.memory), f'--compile_for: {slice_name}')
  except jax.errors.JaxRuntimeError as error:
    message = ' '.join(str(error).split())[:500]
    raise ConfigError(f'--compile_for: {slice_name}: the compiler failed: {message}') from error
  seconds = {'trace': traced - started, 'compile': time.monotonic() - traced}
  program = programs.train.compiled.as_text()
  text = config.data.text
  work = flops.train_step_flops(config.model, config.data.batch_size, text.encoder_length,
                                text.decoder_length, dispatch=False) / count
  total, active = flops.parameters(programs.run.model.shapes, config.model)
  return {
      'slice': slice_name, 'chips': count, 'mesh': dict(devices.mesh.shape),
      'execution': dataclasses.asdict(config.execution), 'microbatches': config.microbatches,
      'batch_size': config.data.batch_size,
      'parameters': total, 'parameters_active_per_token': active,
      'memory': _memory(programs, forecast, chip), **_reading(program, chip, devices, work),
      'seconds': {name: round(value, 1) for name, value in seconds.items()},
      'versions': {'jax': jax.__version__},
  }, program


def read_again(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the report in a folder that `run` wrote, with the program's text read again.

  So a later version of moejax can correct what it reads without compiling again.
  """
  report = json.loads((folder / FILE).read_text())
  chip, _ = chips.parse(report['slice'])
  devices = parallel.make('mesh', MeshConfig(**report['mesh']),
                          chips.topology(report['slice']).devices)
  with gzip.open(folder / PROGRAM, 'rt') as file:
    return {**report, **_reading(file.read(), chip, devices, report['flops']['model'])}


def _reading(program: str, chip: chips.Chip, devices, work: float) -> dict[str, Any]:
  """Returns the part of the report that is read from the program's text."""
  module, links = hlo.Module(program), network.of(chip, devices.mesh.devices.flat)
  return {
      'reading': READING, 'largest': _largest(module),
      'flops': {'model': work, 'executed': sum(
          n * module.flops(i, c) for i, n, c in module.run())},
      'collectives': _collectives(module, links),
      'roofline': _roofline(module, chip, links, work),
      'loops_of_unknown_length': len(module.unknown_loops)}


def programs_of(config: RunConfig, devices: parallel.MeshParallel, decodes: bool = False
                ) -> Programs:
  """Returns the programs of a run, with one step a call, for devices that need not be there.

  decodes: whether outputs are decoded at the end of the run.
  """
  config = dataclasses.replace(config, steps_per_call=1)
  return Programs(validate.without_data(config, Plan.make(config, 0), devices,
                                        batch_shapes(config), decodes))


def batch_shapes(config: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes of a train batch of the run; data.Dataset describes its arrays."""
  text = config.data.text
  return config.model.batch_shapes(config.data.batch_size, text.encoder_length,
                                   text.decoder_length)


def _memory(programs: Programs, forecast: memory.Forecast, chip: chips.Chip) -> dict[str, Any]:
  """Bytes per chip: of the step's arguments and results, temporaries, code and their sum.

  And of each other phase that may take more, in all; and what a chip has.
  """
  resident, temporary, code = memory.sizes(programs.train.compiled)
  return {'resident': resident, 'temporary': temporary, 'code': code,
          'total': resident + temporary + code,
          'phases': {name: forecast.resident + size
                     for name, size in forecast.phases.items() if size},
          'available': chip.memory}


def _largest(module: hlo.Module) -> list[dict[str, Any]]:
  """Returns the largest arrays that operations make in HBM, one per shape and origin."""
  sizes: dict[tuple, float] = {}
  for instruction, _, _ in module.run():
    if instruction.opcode in hlo.FREE:
      continue
    for array in instruction.arrays:
      if not array.near:
        shape = f'{array.dtype}[{",".join(map(str, array.dims))}]'
        sizes[shape, _origin(instruction.scope)] = array.bytes
  top = sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]
  return [{'shape': shape, 'origin': origin, 'bytes': size} for (shape, origin), size in top]


def _origin(scope: str) -> str:
  """'jvp(encoder)/00+2x12/moe' of 'jit(train_step)/jvp(encoder)/00+2x12/while/body/moe/dot'."""
  noise = r'jit\(\w+\)|while|body|cond|closed_call|checkpoint|rematted_computation|shard_map'
  words = [word for word in scope.split('/')[:-1] if not re.fullmatch(noise, word)]
  return '/'.join(words) or '(other)'


def _collectives(module: hlo.Module, links: Network) -> list[dict[str, Any]]:
  """Returns one entry per kind and number of devices."""
  groups: dict[tuple, list] = {}
  for collective in collectives.of(module):
    groups.setdefault((collective.kind, collective.devices), []).append(collective)
  return [{'kind': kind, 'devices': devices, 'times': sum(c.times for c in group),
           'sent_bytes': sum(c.sent for c in group),
           'seconds': sum(map(links.seconds, group))}
          for (kind, devices), group in sorted(groups.items())]


def _roofline(module: hlo.Module, chip: chips.Chip, links: Network, work: float
              ) -> dict[str, float]:
  """Returns seconds of a step by what bounds them, and the MFU of `work` FLOPs of a model."""
  compute = traffic = 0.0
  for instruction, times, computation in module.run():
    if collectives.communication(module, instruction):
      continue
    by_flops = module.flops(instruction, computation, passes=True) / chip.flops
    by_bytes = module.bytes(instruction, computation) / chip.bandwidth
    if by_flops >= by_bytes:
      compute += times * by_flops
    else:
      traffic += times * by_bytes
  transfer = math.fsum(map(links.seconds, collectives.of(module)))
  serial, overlapped = compute + traffic + transfer, max(compute + traffic, transfer)
  return {'compute_bound': compute, 'memory_bound': traffic, 'network': transfer, 'serial': serial,
          'overlapped': overlapped, 'mfu_serial': work / (serial * chip.flops),
          'mfu_overlapped': work / (overlapped * chip.flops)}


def to_text(report: dict[str, Any]) -> str:
  """Returns the report for people."""
  memory, work, roof = report['memory'], report['flops'], report['roofline']
  gib = lambda size: f'{size / chips.GIB:.2f} GiB'
  ms = lambda seconds: f'{1e3 * seconds:.1f} ms'
  times = {key: ms(value) for key, value in roof.items()}
  mesh = ' '.join(f'{axis}={size}' for axis, size in report['mesh'].items())
  lines = [
      f'slice        {report["slice"]}: {report["chips"]} chips, mesh {mesh}; batch '
      f'{report["batch_size"]}, microbatches {report["microbatches"]}, '
      f'scan {report["execution"]["scan"]}, remat {report["execution"]["remat"]}',
      f'parameters   {report["parameters"]:,}, {report["parameters_active_per_token"]:,} active '
      'per token',
      f'HBM a chip   {gib(memory["total"])} of {gib(memory["available"])} in the step: '
      f'{gib(memory["resident"])} state and batch, {gib(memory["temporary"])} temporaries, '
      f'{gib(memory["code"])} program',
      '  else       ' + ''.join(f'{gib(size)} while {name}, '
                                for name, size in memory['phases'].items())
      + 'no more than the step at any other moment']
  lines += [f'  largest    {gib(entry["bytes"])} {entry["shape"]} {entry["origin"]}'
            for entry in report['largest']]
  lines += [f'FLOPs a chip {work["model"]:.3e} of the model (flops.py), {work["executed"]:.3e} in '
            f'matmuls of the program ({work["executed"] / work["model"]:.2f} times)']
  lines += [f'collectives  {c["kind"]} over {c["devices"]}: {c["times"]} times, sends '
            f'{gib(c["sent_bytes"])}, {ms(c["seconds"])}' for c in report['collectives']]
  lines += [
      f'roofline     {times["compute_bound"]} bound by FLOPs, {times["memory_bound"]} by HBM, '
      f'{times["network"]} on the network',
      f'  serial     {times["serial"]}, MFU {roof["mfu_serial"]:.3f}',
      f'  overlapped {times["overlapped"]}, MFU {roof["mfu_overlapped"]:.3f}',
      f'compiled in  {report["seconds"]["compile"]:.0f} s, after '
      f'{report["seconds"]["trace"]:.0f} s of tracing']
  if report['loops_of_unknown_length']:
    lines.append(f'{report["loops_of_unknown_length"]} loops of unknown length were counted once: '
                 'the step will take longer')
  return '\n'.join(lines)
