"""Memory that a run takes on each device, known before anything is allocated there.

The programs of a run are compiled first: the compiler then knows how much they ask for. A run that
does not fit is refused with the numbers and the cheapest remedies, each of them compiled too.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from moejax import trees
from moejax.cluster.processes import digests
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import malloc, parallel, validate
from moejax.train.compiled import Program, Programs
from moejax.train.parameter_groups import untouched
from moejax.trees import stacking

MIB, GIB = 2**20, 2**30
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
    number = lambda part: size(part, self.needed).split()[0]
    names = ['optimizer', *(['teacher'] if self.teacher else []),
             *(['gradients', 'activations'] if self.compiled else [])]
    parts = [f'params {size(self.params, self.needed)}',
             *(f'{name} {number(getattr(self, name))}' for name in names)]
    total = self.resident + self.gradients + self.activations
    text = f'{", ".join(parts)} = {size(total, self.needed)}'
    if self.needed > total:
      text += f', {number(self.needed)} while {max(self.phases, key=self.phases.get)}'
    if self.available is not None:
      unit = f' {_unit(self.needed)[0]}'
      text = text.removesuffix(unit) if size(self.available).endswith(unit) else text
      text += f' of {size(self.available)}'
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
  remedies = cheapest(programs, forecast, lambda changed: measure(changed, available))
  raise ConfigError(f'{refused} {_advice(forecast, remedies)}')


def measure(programs: Programs, available: int | None) -> Forecast:
  """Compiles the programs of a run as far as they fit and returns what they take."""
  state = trees.flatten({'params': programs.shapes.params, 'opt_state': programs.shapes.opt_state})
  forecast = Forecast(
      per_device(programs.shapes.params), per_device(programs.shapes.opt_state),
      saving=per_device(v for k, v in state.items() if stacking.is_stacked(k)),
      teacher=per_device(programs.teacher.shapes) if programs.teacher else 0, available=available)
  trained = per_device(leaf for path, leaf in trees.flatten(programs.shapes.params).items()
                       if not untouched(programs.run.config.optimizer, path))
  for phase in _phases(programs):
    if not forecast.fits:
      break
    try:
      arguments, temporary, code = sizes(phase.program.compiled)
      refused = False
    except jax.errors.JaxRuntimeError as error:
      least = 0 if available is None else available - forecast.resident - phase.copied + 1
      arguments, temporary, code = phase.inputs, max(_asked_for(error), least), 0
      refused = True
    bytes_ = arguments - phase.inputs + temporary + code + phase.copied
    if phase.name == 'activations':
      gradients = min(trained, temporary + code)
      forecast = dataclasses.replace(forecast, gradients=gradients, activations=bytes_ - gradients,
                                     compiled=True)
    else:
      forecast = dataclasses.replace(forecast, **{phase.name: bytes_})
    if refused and available is None:   # all that the compiler reports is that there is less
      forecast = dataclasses.replace(forecast, available=forecast.needed - 1)
  return forecast


class _Phase(NamedTuple):
  """A program, the field of Forecast that it is counted in, and what is counted elsewhere.

  inputs: bytes of its arguments that are resident. copied: bytes it takes before it is called.
  """
  name: str
  program: Program
  inputs: int
  copied: int = 0


def _phases(programs: Programs) -> Iterator[_Phase]:
  """The programs that may decide how much memory a run takes, the train step first."""
  params = programs.shapes.params
  yield _Phase('activations', programs.train, per_device(params) + per_device(
      programs.shapes.opt_state))
  if programs.teacher:
    yield _Phase('teaching', programs.teacher.logits, per_device(programs.teacher.shapes))
  if evaluates_more(programs.run.config):
    yield _Phase('evaluation', programs.evaluate, per_device(params))
  if decodes_more(programs):
    copied = per_device(leaf for path, leaf in trees.flatten(params).items()
                        if stacking.is_stacked(path))
    yield _Phase('decoding', programs.decode, per_device(programs.single.params), copied)


def evaluates_more(config: run_config.RunConfig) -> bool:
  """Whether an evaluation takes more at once than the train step does: examples, or slots."""
  return (config.data.eval_batch_size * config.microbatches > config.data.batch_size
          or _more_slots(config))


def decodes_more(programs: Programs) -> bool:
  """Whether decoding may keep what the train step does not.

  That is: more hypotheses than examples, keys and values that the step computes again, or single
  blocks beside the scanned ones.
  """
  config = programs.run.config
  hypotheses = config.data.eval_batch_size * config.decode.beams * config.microbatches
  return programs.run.decodes and (
      hypotheses > config.data.batch_size or config.execution.scan
      or config.execution.remat != 'none' or _more_slots(config))


def _more_slots(config: run_config.RunConfig) -> bool:
  """Whether experts have more slots in evaluation than in training."""
  moes = (stack.moe for stack in config.model.stacks().values())
  return any(moe.dispatch != 'grouped' and moe.eval_capacity_factor > moe.capacity_factor
             for moe in moes)


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


def size(number: int, like: int | None = None) -> str:
  """'7.9 GiB', in the unit of another number if one is given."""
  name, unit = _unit(number if like is None else like)
  return f'{number / unit:.1f} {name}'


def _unit(number: int) -> tuple[str, int]:
  return ('GiB', GIB) if number >= GIB else ('MiB', MIB)


@dataclasses.dataclass(frozen=True)
class Remedy:
  """Settings with which a run takes less memory.

  Attributes:
    changes: {dotted config key: value}.
    cost: what is worse then.
  """
  changes: Mapping[str, Any]
  cost: str

  def __str__(self) -> str:
    """'--config.microbatches=4', as one types it."""
    return ' '.join(f'--config.{key}={value}' for key, value in self.changes.items())


def cheapest(programs: Programs, forecast: Forecast, measure: Callable[[Programs], Forecast]
             ) -> list[tuple[Remedy, Forecast]]:
  """Returns at most WANTED remedies and what the run then takes, each less than before.

  Those that suffice alone come first, in the order of `candidates`; then others, by what they save.

  Args:
    programs: what does not fit.
    forecast: of these.
    measure: returns the forecast of changed programs.
  """
  lower = []
  for remedy in candidates(programs, forecast):
    try:
      after = measure(changed(programs, remedy.changes))
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


def candidates(programs: Programs, forecast: Forecast) -> Iterator[Remedy]:
  """Yields what might help, the cheapest first.

  What costs time on the network comes before what costs FLOPs, and last what trains differently.
  Blocks are rematerialised under a scan where that is possible: it keeps the compiler from merging
  the two passes again, as it does on CPU.
  """
  config, platform = programs.run.config, programs.run.devices.mesh.devices.flat[0].platform
  if programs.teacher and config.steps_per_call > 1:
    yield Remedy({'steps_per_call': 1}, "logits of one step's examples at a time")
  asked = max(forecast.evaluation, forecast.decoding)
  if asked > forecast.gradients + forecast.activations:
    parts = _parts(programs, forecast, config.data.eval_batch_size, asked)
    if parts > 1:
      yield Remedy({'data.eval_batch_size': config.data.eval_batch_size // parts},
                   'smaller matmuls while evaluating')
    if asked == forecast.decoding and config.decode.beams > 1:
      yield Remedy({'decode.beams': 1}, 'greedy decoding')
  if config.model.dtype == 'float32' and platform != 'cpu':
    yield Remedy({'model.dtype': 'bfloat16'}, 'coarser rounding, and faster')
  scan = {'execution.scan': True} if not config.execution.scan and _can_scan(programs) else {}
  if scan:
    yield Remedy(scan, 'no FLOPs; saving copies the blocks')
  yield from _splits(programs)
  if config.execution.remat == 'none':
    yield Remedy({**scan, 'execution.remat': 'dots'}, 'attention and activations computed twice')
  examples = config.data.batch_size // config.microbatches
  parts = _parts(programs, forecast, examples, forecast.activations, forecast.gradients)
  if parts > 1:
    yield Remedy({'microbatches': config.microbatches * parts}, 'no FLOPs; smaller matmuls')
  if config.execution.remat != 'full':
    yield Remedy({**scan, 'execution.remat': 'full'}, '+33 % FLOPs at most')
  if config.optimizer.name == 'adamw':
    yield Remedy({'optimizer.name': 'adafactor'}, 'trains differently; another rate')
  if programs.teacher:   # its logits are those of a whole batch, whatever the microbatches
    parts = max(parts, _parts(programs, forecast, examples, forecast.teaching))
  if parts > 1:
    yield Remedy({'data.batch_size': config.data.batch_size // parts}, 'trains differently')


def _can_scan(programs: Programs) -> bool:
  """Whether blocks repeat and may run in one scan."""
  try:
    paths = changed(programs, {'execution.scan': True}).run.model.param_paths
  except ConfigError:
    return False
  return any(map(stacking.is_stacked, paths))


def _splits(programs: Programs) -> Iterator[Remedy]:
  """Experts, then all parameters, split over the devices that only the data is split over."""
  config, shape = programs.run.config, programs.run.devices.mesh.shape
  pmap = config.parallel == 'pmap'
  replicas = programs.run.devices.shards if pmap else shape['data']
  experts = {leaf.shape[0] // shape.get('expert', 1)
             for path, leaf in trees.flatten(programs.run.model.shapes).items()
             if '/experts/' in path}
  for axis, parts, cost in (
      ('expert', math.gcd(replicas, *experts) if experts else 1, 'tokens sent to their experts'),
      ('fsdp', replicas, 'parameters gathered where they are used')):
    if parts > 1:
      data = {} if config.mesh.data == -1 else {'mesh.data': replicas // parts}
      yield Remedy({**({'parallel': 'mesh'} if pmap else {}), **data,
                    f'mesh.{axis}': shape.get(axis, 1) * parts}, cost)


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
