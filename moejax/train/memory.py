"""Forecasts the memory that a run needs on each device, before anything is allocated there.

The programs of a run are compiled first, because the compiler reports how much memory they need. A
run that does not fit is refused with the numbers and the cheapest remedies, each compiled too.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from moejax import trees
from moejax.cluster.processes import digests
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import malloc, parallel, validate
from moejax.train.compiled import Program, Programs
from moejax.train.optimizer import untouched
from moejax.trees import stacking

WANTED = 3   # remedies in a refusal
# Share of the room beside the state that a cut batch may fill. Not all in it shrinks with the
# batch: a sixteenth of ViT-B/16's took 17 % more than a sixteenth of its activations, on a TPU.
SLACK = 0.75


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Bytes per device.

  Attributes:
    params, optimizer: of the state, by shapes and shardings.
    gradients: of the parameters that are trained, but at most the temporaries of the step, which
      may use some up before it has others.
    activations: all else in the step: what the backward pass keeps, the batch, sums of metrics,
      scratch, the program.
    saving: a checkpoint's copy of scanned blocks, as single ones, beside the state.
    evaluation: what an evaluation takes beside the state. 0 if neither its batch nor its capacities
      are larger than a train step's: it then makes nothing more than the step.
    decoding: what decoding takes beside the state, with a copy of scanned blocks as single ones. 0
      if there is none, or one that makes nothing that the step does not make.
    teacher: parameters of the teacher, which stay in memory.
    teaching: what the teacher takes beside all that for the logits of a batch, between two steps.
      The logits that a step reads are among its activations.
    available: what a device has; None if that is not known.
    compiled: False: gradients and activations are not counted, as the state alone is too large.
  """
  params: int
  optimizer: int
  gradients: int = 0
  activations: int = 0
  saving: int = 0
  evaluation: int = 0
  decoding: int = 0
  teacher: int = 0
  teaching: int = 0
  available: int | None = None
  compiled: bool = False

  @property
  def needed(self) -> int:
    """Bytes at the worst moment: in the step, saving, evaluating, decoding or teaching."""
    return self.resident + max(self.gradients + self.activations, *self.phases.values())

  @property
  def resident(self) -> int:
    """Bytes at every moment."""
    return self.params + self.optimizer + self.teacher

  @property
  def phases(self) -> dict[str, int]:
    """Bytes beside the resident ones at moments other than the step."""
    return {'saving': self.saving, 'evaluating': self.evaluation, 'decoding': self.decoding,
            'the teacher answers': self.teaching}

  @property
  def fits(self) -> bool:
    """Whether a device has what is needed."""
    return self.available is None or self.needed <= self.available

  def as_dict(self) -> dict[str, Any]:
    """Returns the fields for run.json, those of a teacher only if there is one."""
    values = {**dataclasses.asdict(self), 'needed': self.needed}
    return {k: v for k, v in values.items() if v or k not in ('teacher', 'teaching')}

  def __str__(self) -> str:
    """'params 1.2 GiB, optimizer 2.4, gradients 1.2, activations 3.1 = 7.9 of 15.7 GiB'."""
    name, unit = _unit(self.needed)
    names = ['params', 'optimizer', *(['teacher'] if self.teacher else []),
             *(['gradients', 'activations'] if self.compiled else [])]
    first, *others = (f'{field} {getattr(self, field) / unit:.1f}' for field in names)
    total = self.resident + self.gradients + self.activations
    text = f'{", ".join([f"{first} {name}", *others])} = {total / unit:.1f} {name}'
    if self.needed > total:
      phase = max(self.phases, key=self.phases.get)
      text += f', {self.needed / unit:.1f} while {phase}'
    if self.available is not None:
      available = size(self.available)
      text = text.removesuffix(f' {name}') if available.endswith(name) else text
      text += f' of {available}'
    return text + ('' if self.compiled else ', before gradients and activations')


def check(programs: Programs, available: int | None, where: str = 'memory') -> Forecast:
  """Compiles the programs of a run and returns what they take.

  Args:
    programs: of the run.
    available: bytes per device, as from `free`.
    where: what an error begins with.

  Raises:
    ConfigError: a device has less; names the numbers and the cheapest remedies.
  """
  forecast = measure(programs, available)
  if forecast.fits:
    return forecast
  refused = f'{where}: does not fit on a device: {forecast}.'
  if jax.process_index() == 0:
    print(f'moejax: {refused} Compiling what would fit (Ctrl-C: stop here)', file=sys.stderr)
  remedies = cheapest(programs, forecast)
  raise ConfigError(f'{refused} {_advice(forecast, remedies)}')


def measure(programs: Programs, available: int | None) -> Forecast:
  """Compiles the programs of a run as far as they fit and returns what they take."""
  params, opt_state = programs.shapes.params, programs.shapes.opt_state
  state = trees.flatten({'params': params, 'opt_state': opt_state})
  forecast = Forecast(
      per_device(params), per_device(opt_state),
      saving=per_device(v for k, v in state.items() if stacking.is_stacked(k)),
      teacher=per_device(programs.teacher.shapes) if programs.teacher else 0, available=available)
  trained = per_device(leaf for path, leaf in trees.flatten(params).items()
                       if not untouched(programs.run.config.optimizer, path))
  for phase, program, inputs, copied in _phases(programs):
    if not forecast.fits:
      break
    beside, scratch, refused = 0, 0, False
    try:
      arguments, temporary, code = sizes(program.compiled)
      beside, scratch = arguments - per_device(inputs), temporary + code
    except jax.errors.JaxRuntimeError as error:
      least = 0 if available is None else available - forecast.resident - copied + 1
      scratch, refused = max(_asked_for(error), least), True
    taken = {phase: copied + beside + scratch}
    if phase == 'activations':
      gradients = min(trained, scratch)
      taken = {'gradients': gradients, 'activations': beside + scratch - gradients,
               'compiled': True}
    forecast = dataclasses.replace(forecast, **taken)
    if refused and available is None:   # all that the compiler reports is that there is less
      forecast = dataclasses.replace(forecast, available=forecast.needed - 1)
  return forecast


def _phases(programs: Programs) -> Iterator[tuple[str, Program, dict, int]]:
  """Yields the programs that may decide how much memory a run takes, the train step first.

  Each as (field of Forecast, program, those of its arguments that are counted elsewhere, bytes that
  it takes before it is called). An evaluation counts where it has more examples or slots at once
  than the step; decoding also where it keeps what the step computes again, or has single blocks
  beside the scanned ones.
  """
  config, shapes = programs.run.config, programs.shapes
  examples = config.data.batch_size // config.microbatches
  more_slots = any(
      stack.moe.dispatch != 'grouped' and stack.moe.eval_capacity_factor > stack.moe.capacity_factor
      for stack in config.model.stacks().values())
  more_kept = config.execution.scan or config.execution.remat != 'none'
  yield 'activations', programs.train, {'params': shapes.params, 'opt_state': shapes.opt_state}, 0
  if programs.teacher:
    yield 'teaching', programs.teacher.logits, programs.teacher.shapes, 0
  if config.data.eval_batch_size > examples or more_slots:
    yield 'evaluation', programs.evaluate, shapes.params, 0
  hypotheses = config.data.eval_batch_size * config.decode.beams
  if programs.run.decodes and (hypotheses > examples or more_slots or more_kept):
    yield 'decoding', programs.decode, programs.single.params, per_device(
        leaf for path, leaf in trees.flatten(shapes.params).items() if stacking.is_stacked(path))


def per_device(tree: Any) -> int:
  """Returns bytes on each device of a tree, or an iterable, of shapes with shardings."""
  leaves = jax.tree.leaves(tree if isinstance(tree, dict) else list(tree))
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in leaves)


def sizes(compiled: jax.stages.Compiled) -> tuple[int, int, int]:
  """Returns bytes per device of a program: arguments and results, temporaries, code.

  A result that takes the place of a donated argument counts once.
  """
  stats = compiled.memory_analysis()
  arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  return arguments, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes


def _asked_for(error: jax.errors.JaxRuntimeError) -> int:
  """Bytes that a compiler reports when it finds too little memory; 0 if it gives no number.

  Raises the error if it is about something else.
  """
  message = ' '.join(str(error).split())
  if 'RESOURCE_EXHAUSTED' not in message:
    raise error
  used = re.search(r'([\d.]+)([KMGT]) *\) exceeds available HBM', message)
  return int(float(used[1]) * 2 ** (10 * (1 + 'KMGT'.index(used[2])))) if used else 0


def free(devices: parallel.MeshParallel) -> int | None:
  """Returns bytes that a run may take on each of this process's devices; None if not known.

  Devices that are cores of a host share its memory, also those of other processes there.
  Collective: every process must call it.
  """
  local = [d for d in devices.mesh.devices.flat if d.process_index == jax.process_index()]
  stats = [device.memory_stats() or {} for device in local]
  if all('bytes_limit' in each for each in stats):
    return min(each['bytes_limit'] - each.get('bytes_in_use', 0) for each in stats)
  if local[0].platform != 'cpu':
    return None
  sharing, host = len(local), malloc.free()
  if jax.process_count() > 1:
    hosts = digests(malloc.host())
    here = (hosts == hosts[jax.process_index()]).all(1)           # (processes,)
    sharing = sum(bool(here[d.process_index]) for d in devices.mesh.devices.flat)
  return None if host is None else host // sharing


def size(number: int) -> str:
  """'7.9 GiB'."""
  name, unit = _unit(number)
  return f'{number / unit:.1f} {name}'


def _unit(number: int) -> tuple[str, int]:
  return ('GiB', 2**30) if number >= 2**30 else ('MiB', 2**20)


class Remedy(NamedTuple):
  """Settings with which a run takes less memory: {dotted config key: value}; what is worse then."""
  changes: Mapping[str, Any]
  cost: str

  def __str__(self) -> str:
    """'--config.microbatches=4', as one types it."""
    return ' '.join(f'--config.{key}={value}' for key, value in self.changes.items())


def cheapest(programs: Programs, forecast: Forecast) -> list[tuple[Remedy, Forecast]]:
  """Returns at most WANTED remedies and what the run then takes, each less than before.

  Those that suffice alone come first, in the order of `candidates`; then others, by what they save.

  programs: what does not fit; forecast: of these.
  """
  lower = []
  for remedy in candidates(programs, forecast):
    try:
      after = measure(changed(programs, remedy.changes), forecast.available)
    except ConfigError:   # not with this model, batch or number of devices
      continue
    if after.needed < forecast.needed and after.compiled >= forecast.compiled:
      lower.append((remedy, after))
    if sum(after.fits for _, after in lower) == WANTED:
      break
  return sorted(lower, key=lambda pair: 0 if pair[1].fits else pair[1].needed)[:WANTED]


def _advice(forecast: Forecast, remedies: list[tuple[Remedy, Forecast]]) -> str:
  """'The cheapest remedies: --config.microbatches=4: 9.6 GiB, 4.1 less (smaller matmuls)'."""
  if not remedies:
    return 'Nothing that was tried takes less; a smaller model, or more or larger devices, would.'
  texts = []
  for remedy, after in remedies:
    less = f', {size(forecast.needed - after.needed)} less' if forecast.compiled else ''
    short = '' if after.fits else ', still too much alone'
    texts.append(f'{remedy}: {size(after.needed)}{less}{short} ({remedy.cost})')
  return 'The cheapest remedies, in this order: ' + '; '.join(texts)


def changed(programs: Programs, changes: Mapping[str, Any]) -> Programs:
  """Returns the programs of the run with other settings, on its devices. Raises ConfigError."""
  run = programs.run
  values = trees.flatten(dataclasses.asdict(run.config))
  values |= {key.replace('.', '/'): value for key, value in changes.items()}
  config = run_config.from_dict(trees.unflatten(values))
  devices = parallel.make(config.parallel, config.mesh, list(run.devices.mesh.devices.flat))
  return Programs(validate.without_data(config, run.plan, devices, run.batch, run.decodes,
                                        run.teacher))


def candidates(programs: Programs, forecast: Forecast) -> list[Remedy]:
  """Returns what might help, the cheapest first.

  What costs time on the network comes before what costs FLOPs, and last what trains differently.
  Blocks are rematerialised under a scan where that is possible: it keeps the compiler from merging
  the two passes again, as it does on CPU.
  """
  run, config, data = programs.run, programs.run.config, programs.run.config.data
  asked = max(forecast.evaluation, forecast.decoding)
  worst = asked > forecast.gradients + forecast.activations
  eval_parts = _parts(programs, forecast, data.eval_batch_size, asked)
  examples = data.batch_size // config.microbatches
  parts = _parts(programs, forecast, examples, forecast.activations, forecast.gradients)
  # A teacher computes the logits of a whole batch at once, whatever the microbatches.
  batch_parts = max(parts, _parts(programs, forecast, examples, forecast.teaching)
                    if programs.teacher else 1)
  cpu = run.devices.mesh.devices.flat[0].platform == 'cpu'
  scan = _scan(programs)
  table = (
      (programs.teacher and config.steps_per_call > 1, {'steps_per_call': 1},
       "logits of one step's examples at a time"),
      (worst and eval_parts > 1, {'data.eval_batch_size': data.eval_batch_size // eval_parts},
       'smaller matmuls while evaluating'),
      (worst and asked == forecast.decoding and config.decode.beams > 1, {'decode.beams': 1},
       'greedy decoding'),
      (config.model.dtype == 'float32' and not cpu, {'model.dtype': 'bfloat16'},
       'coarser rounding, and faster'),
      (scan, scan, 'no FLOPs; saving copies the blocks'),
      *_splits(programs),
      (config.execution.remat == 'none', {**scan, 'execution.remat': 'dots'},
       'attention and activations computed twice'),
      (parts > 1, {'microbatches': config.microbatches * parts}, 'no FLOPs; smaller matmuls'),
      (config.execution.remat != 'full', {**scan, 'execution.remat': 'full'},
       '+33 % FLOPs at most'),
      (config.optimizer.name == 'adamw', {'optimizer.name': 'adafactor'},
       'trains differently; another rate'),
      (batch_parts > 1, {'data.batch_size': data.batch_size // batch_parts}, 'trains differently'),
  )
  return [Remedy(changes, cost) for applies, changes, cost in table if applies]


def _scan(programs: Programs) -> dict[str, Any]:
  """The setting that scans blocks, where they repeat, may run in one scan, and do not yet."""
  setting = {'execution.scan': True}
  if programs.run.config.execution.scan:
    return {}
  try:
    paths = changed(programs, setting).run.model.param_paths
  except ConfigError:
    return {}
  return setting if any(map(stacking.is_stacked, paths)) else {}


def _splits(programs: Programs) -> Iterator[tuple[bool, dict[str, Any], str]]:
  """Rows of `candidates`: experts, then all parameters, split over devices that hold copies."""
  run, shape = programs.run, programs.run.devices.mesh.shape
  pmap = run.config.parallel == 'pmap'
  copies = run.devices.shards if pmap else shape['data']
  experts = {leaf.shape[0] // shape.get('expert', 1)
             for path, leaf in trees.flatten(run.model.shapes).items() if '/experts/' in path}
  for axis, parts, cost in (
      ('expert', math.gcd(copies, *experts) if experts else 1, 'tokens sent to their experts'),
      ('fsdp', copies, 'parameters gathered where they are used')):
    yield parts > 1, {**({'parallel': 'mesh'} if pmap else {}),
                      **({} if run.config.mesh.data == -1 else {'mesh.data': copies // parts}),
                      f'mesh.{axis}': shape.get(axis, 1) * parts}, cost


def _parts(programs: Programs, forecast: Forecast, examples: int, takes: int, beside: int = 0
           ) -> int:
  """The number of parts into which so many examples must be cut to fit; 1 if they cannot be cut.

  If no number suffices, the largest: together with something else it may.

  takes: bytes in proportion to the examples; beside: other bytes than those of the state.
  """
  most = examples // (programs.run.examples_per_group * programs.run.devices.shards)
  room = SLACK * (forecast.available - forecast.resident - beside)
  possible = [k for k in range(2, most + 1) if most % k == 0]
  enough = [k for k in possible if takes <= k * room]
  return (enough or possible[-1:] or [1])[0]
