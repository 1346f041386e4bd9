"""How much memory a run will take on each device, known before anything is allocated there.

The train step is compiled first: the compiler then knows what it will ask for. What does not fit is
refused with the numbers and the cheapest remedies, each of them compiled too.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax

from moejax import trees
from moejax.cluster.processes import digests
from moejax.config import ConfigError
from moejax.train import malloc, remedies
from moejax.train.compiled import Step
from moejax.train.config import RunConfig
from moejax.train.parameter_groups import untouched
from moejax.train.teacher import Teacher
from moejax.trees import stacking

MIB, GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Bytes per device.

  Attributes:
    params, optimizer: of the state, by shapes and shardings.
    gradients: of the parameters that are trained, at most what the step has in temporaries: it may
      use some up before it has others.
    activations: what else the step asks for: what the backward pass keeps, the batch, sums of
      metrics, scratch, the program.
    saving: a checkpoint's copy of scanned blocks, as single ones, beside the state.
    evaluation: what an evaluation asks for beside the state. 0 if neither its batch nor
      its capacities are larger than a train step's: it then makes nothing more than the step.
    decoding: what decoding asks for beside the state, a copy of scanned blocks as single ones
      included. 0 if there is none, or one that makes nothing that the step does not make.
    teacher: its parameters, in a distillation; they stay.
    teaching: what the teacher asks for beside all that to answer a batch, its logits included: it
      runs between steps. The logits that a step reads are among its activations.
    available: what there is; None if nobody knows.
    compiled: False: gradients and activations are not counted, as the state alone is too much, or
      the step cannot be compiled ahead.
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
    """At the worst moment: in the step, saving, evaluating, decoding or teaching."""
    return self.resident + max(self.gradients + self.activations, *self.phases.values())

  @property
  def resident(self) -> int:
    """At every moment."""
    return self.params + self.optimizer + self.teacher

  @property
  def phases(self) -> dict[str, int]:
    """What is asked for at others than the step, beside what is resident; 0 as above."""
    return {'saving': self.saving, 'evaluating': self.evaluation, 'decoding': self.decoding,
            'the teacher answers': self.teaching}

  @property
  def fits(self) -> bool:
    return self.available is None or self.needed <= self.available

  def as_dict(self) -> dict[str, Any]:
    """For run.json; a teacher is in it if there is one."""
    values = {**dataclasses.asdict(self), 'needed': self.needed}
    return {k: v for k, v in values.items() if v or k not in ('teacher', 'teaching')}

  def __str__(self) -> str:
    """'params 1.2 GiB, optimizer 2.4, gradients 1.2, activations 3.1 = 7.9 of 15.7 GiB'."""
    parts = [f'params {size(self.params, self.needed)}']
    number = lambda part: size(part, self.needed).split()[0]
    names = ['optimizer', *(['teacher'] if self.teacher else []),
             *(['gradients', 'activations'] if self.compiled else [])]
    parts += [f'{name} {number(getattr(self, name))}' for name in names]
    total = self.resident + self.gradients + self.activations
    text = f'{", ".join(parts)} = {size(total, self.needed)}'
    if self.needed > total:
      text += f', {number(self.needed)} while {max(self.phases, key=self.phases.get)}'
    if self.available is not None:
      unit = f' {_unit(self.needed)[0]}'
      text = text.removesuffix(unit) if size(self.available).endswith(unit) else text
      text += f' of {size(self.available)}'
    return text + ('' if self.compiled else ', before gradients and activations')


def compile_step(step: Step, available: int | None, where: str = 'memory',
                 lowered: jax.stages.Lowered | None = None
                 ) -> tuple[Callable, Forecast]:
  """Compiles a train step, and forecasts what it takes.

  Args:
    step: not compiled yet.
    available: bytes per device, as from `free`.
    where: what an error begins with.
    lowered: of the step, where it is at hand.

  Raises:
    ConfigError: a device has less; names the numbers and the cheapest remedies.
  """
  if not step.devices.ahead and (found := _of_state(step, available)).fits:
    return step.devices.compile_step(step.fn), found
  compiled, found = measure(step, available, lowered)
  if found.fits:
    return compiled, found
  refused = f'{where}: does not fit on a device: {found}.'
  if jax.process_index() == 0:
    print(f'moejax: {refused} Compiling what would fit (Ctrl-C: stop here)', file=sys.stderr)
  tried = remedies.cheapest(step, found, lambda changed: measure(changed, available)[1])
  raise ConfigError(f'{refused} {_advice(found, tried)}')


def measure(step: Step, available: int | None, lowered: jax.stages.Lowered | None = None
            ) -> tuple[jax.stages.Compiled | None, Forecast]:
  """`compile_step` that refuses nothing: the program is None if the compiler found too little
  memory, or if it was not asked because the state alone is too large."""
  found = _of_state(step, available)
  if not (found.fits and step.devices.ahead):
    return None, found
  state, too_much = found.params + found.optimizer, (available or 0) - found.resident + 1
  try:
    compiled = (lowered or step.lower()).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    compiled, given, temporary = None, state, _asked_for(str(error), too_much)
  else:
    given, temporary, code = sizes(compiled)
    temporary += code
  gradients = min(per_device(_trained(step)), temporary)
  found = dataclasses.replace(
      found, gradients=gradients, compiled=True,
      activations=max(given - state, 0) + temporary - gradients)
  if compiled is None and available is None:   # less than that, is all that the compiler said
    found = dataclasses.replace(found, available=found.needed - 1)
  if found.fits and step.teacher:
    found = dataclasses.replace(found, teaching=_teaching(step.teacher, too_much))
  if found.fits and evaluates_more(step.config):
    found = dataclasses.replace(found, evaluation=_evaluation(step, too_much))
  if found.fits and decodes_more(step):
    found = dataclasses.replace(found, decoding=_decoding(step, too_much))
  return compiled, found


def evaluates_more(config: RunConfig) -> bool:
  """Whether an evaluation takes more at once than the train step does: examples, or slots."""
  return (config.data.eval_batch_size * config.microbatches > config.data.batch_size
          or _more_slots(config))


def _more_slots(config: RunConfig) -> bool:
  """Whether experts have more slots in evaluation than in training."""
  moes = (stack.moe for stack in config.model.stacks().values())
  return any(moe.dispatch != 'grouped' and moe.eval_capacity_factor > moe.capacity_factor
             for moe in moes)


def decodes_more(step: Step) -> bool:
  """Whether decoding may keep what the train step does not: hypotheses of more rows, keys and
  values that the step computes again, single blocks beside the scanned ones."""
  config = step.config
  rows = config.data.eval_batch_size * config.decode.beams * config.microbatches
  return step.decodes and (rows > config.data.batch_size or config.execution.scan
                           or config.execution.remat != 'none' or _more_slots(config))


def _evaluation(step: Step, too_much: int) -> int:
  """Bytes beside the parameters. too_much: what to say if the compiler finds too little memory."""
  return _beside(lambda: step.evaluate, step.shapes.params, too_much)


def _teaching(teacher: Teacher, too_much: int) -> int:
  """Likewise."""
  return _beside(lambda: teacher.logits, teacher.shapes, too_much)


def _decoding(step: Step, too_much: int) -> int:
  """Likewise."""
  copied = per_device(leaf for path, leaf in trees.flatten(step.shapes.params).items()
                      if stacking.is_stacked(path))
  return copied + _beside(lambda: step.decode, step.single.params, too_much - copied)


def _beside(program: Callable[[], jax.stages.Compiled], params: dict, too_much: int) -> int:
  """Bytes that a program of params and a batch asks for beside its params."""
  try:
    resident, temporary, code = sizes(program())
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return _asked_for(str(error), too_much)
  return resident - per_device(params) + temporary + code


def _of_state(step: Step, available: int | None) -> Forecast:
  """What is known without compiling."""
  state = trees.flatten({'params': step.shapes.params, 'opt_state': step.shapes.opt_state})
  return Forecast(per_device(step.shapes.params), per_device(step.shapes.opt_state),
                  saving=per_device(v for k, v in state.items() if stacking.is_stacked(k)),
                  teacher=per_device(step.teacher.shapes) if step.teacher else 0,
                  available=available)


def _trained(step: Step) -> list[jax.ShapeDtypeStruct]:
  """Parameters that have gradients."""
  return [leaf for path, leaf in trees.flatten(step.shapes.params).items()
          if not untouched(step.config.optimizer, path)]


def per_device(tree: Any) -> int:
  """Bytes of a tree of shapes with shardings, or of an iterable of them, on each device."""
  leaves = jax.tree.leaves(tree if isinstance(tree, dict) else list(tree))
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in leaves)


def sizes(compiled: jax.stages.Compiled) -> tuple[int, int, int]:
  """Bytes per device of a compiled step: the state and the batch (the state is updated in place),
  temporaries, the program."""
  stats = compiled.memory_analysis()
  resident = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  return resident, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes


def _asked_for(message: str, at_least: int) -> int:
  """Bytes of temporaries in the message of a compiler that found too little memory."""
  message = ' '.join(message.split())
  found = re.search(r'([\d.]+)([KMGT]) *\) exceeds available HBM', message)
  power = {'K': 10, 'M': 20, 'G': 30, 'T': 40}
  return max(at_least, int(float(found[1]) * 2 ** power[found[2]]) if found else 0)


def free(devices) -> int | None:
  """Bytes that a run may take on each of this process's devices; None if nobody knows.

  Devices that are cores of a host share its memory, those of other processes there included; so
  all processes have to call this.

  devices: of train.parallel.
  """
  local = [d for d in devices.mesh.devices.flat if d.process_index == jax.process_index()]
  stats = [device.memory_stats() or {} for device in local]
  if all('bytes_limit' in each for each in stats):
    return min(each['bytes_limit'] - each.get('bytes_in_use', 0) for each in stats)
  if local[0].platform != 'cpu':
    return None
  sharing, host = _sharing(devices, len(local)), malloc.free()
  return None if host is None else host // sharing


def _sharing(devices, local: int) -> int:
  """How many of all processes' devices this host's memory is for; local: of this process's."""
  if jax.process_count() == 1:
    return local
  told = digests(malloc.host())
  here = (told == told[jax.process_index()]).all(1)             # (processes,)
  return sum(bool(here[d.process_index]) for d in devices.mesh.devices.flat)


def _advice(found: Forecast, tried: Iterable[tuple[remedies.Remedy, Forecast]]) -> str:
  """'The cheapest remedies: --config.microbatches=4: 9.6 GiB, 4.1 less (smaller matmuls)'."""
  lines = []
  for remedy, after in tried:
    less = f', {size(found.needed - after.needed)} less' if found.compiled else ''
    short = '' if after.fits else ', still too much alone'
    lines.append(f'{remedy}: {size(after.needed)}{less}{short} ({remedy.cost})')
  if not lines:
    return 'Nothing that was tried takes less; a smaller model, or more or larger devices, would.'
  return 'The cheapest remedies, in this order: ' + '; '.join(lines)


def size(number: int, like: int | None = None) -> str:
  """'7.9 GiB', in the unit of another number if one is given."""
  name, unit = _unit(number if like is None else like)
  return f'{number / unit:.1f} {name}'


def _unit(number: int) -> tuple[str, int]:
  return ('GiB', GIB) if number >= GIB else ('MiB', MIB)
