"""What makes a run smaller that does not fit into memory, and what it costs instead."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moejax import models, trees
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import parallel
from moejax.train.compiled import Step
from moejax.train.parameter_groups import check_stacked
from moejax.trees import stacking

if TYPE_CHECKING:
  from moejax.train.memory import Forecast

WANTED = 3
# Of the room beside the state. Not all in it shrinks with the batch: a sixteenth of ViT-B/16's took
# 17 % more than a sixteenth of its activations, compiled for a TPU.
SLACK = 0.75


@dataclasses.dataclass(frozen=True)
class Remedy:
  """changes: {dotted config key: value}; cost: what is worse then."""
  changes: Mapping[str, Any]
  cost: str

  def __str__(self) -> str:
    """As one types it."""
    return ' '.join(f'--config.{key}={value}' for key, value in self.changes.items())


def cheapest(step: Step, found: 'Forecast', measure: Callable[[Step], 'Forecast']
             ) -> list[tuple[Remedy, 'Forecast']]:
  """At most WANTED remedies: first those that suffice by themselves, by cost; then others, by what
  they save.

  Args:
    step: what does not fit.
    found: its forecast.
    measure: the forecast of a changed step.

  Returns:
    [(remedy, what the run then takes)], each less than before.
  """
  lower = []
  for remedy in candidates(step, found):
    try:
      after = measure(changed(step, remedy.changes))
    except ConfigError:   # not with this model, batch or number of devices
      continue
    if after.needed < found.needed and after.compiled >= found.compiled:
      lower.append((remedy, after))
    if sum(after.fits for _, after in lower) == WANTED:
      break
  return sorted(lower, key=lambda pair: 0 if pair[1].fits else pair[1].needed)[:WANTED]


def changed(step: Step, changes: Mapping[str, Any]) -> Step:
  """The step of the run with other settings, on the same devices. Raises ConfigError."""
  values = trees.flatten(dataclasses.asdict(step.config))
  values |= {key.replace('.', '/'): value for key, value in changes.items()}
  config = run_config.from_dict(trees.unflatten(values))
  devices = parallel.make(config.parallel, config.mesh, list(step.devices.mesh.devices.flat))
  return Step.of(config, step.plan, devices, step.examples, step.decodes)


def candidates(step: Step, found: 'Forecast') -> Iterator[Remedy]:
  """What might help, the cheapest first: what costs time on the network before what costs FLOPs,
  and last what trains differently.

  Blocks are rematerialised under a scan where that can be: it keeps the compiler from merging the
  two passes again, as it does on CPU.
  """
  config, platform = step.config, step.devices.mesh.devices.flat[0].platform
  if step.teacher and config.steps_per_call > 1:
    yield Remedy({'steps_per_call': 1}, "logits of one step's examples at a time")
  asked = max(found.evaluation, found.decoding)
  if asked > found.gradients + found.activations:
    parts = _parts(step, found, config.data.eval_batch_size, asked, 0)
    if parts > 1:
      yield Remedy({'data.eval_batch_size': config.data.eval_batch_size // parts},
                   'smaller matmuls while evaluating')
    if asked == found.decoding and config.decode.beams > 1:
      yield Remedy({'decode.beams': 1}, 'greedy decoding')
  if config.model.dtype == 'float32' and platform != 'cpu':
    yield Remedy({'model.dtype': 'bfloat16'}, 'coarser rounding, and faster')
  scan = {'execution.scan': True} if not config.execution.scan and _can_scan(config) else {}
  if scan:
    yield Remedy(scan, 'no FLOPs; saving copies the blocks')
  yield from _splits(step)
  if config.execution.remat == 'none':
    yield Remedy({**scan, 'execution.remat': 'dots'}, 'attention and activations computed twice')
  examples = config.data.batch_size // config.microbatches
  parts = _parts(step, found, examples, found.activations, found.gradients)
  if parts > 1:
    yield Remedy({'microbatches': config.microbatches * parts}, 'no FLOPs; smaller matmuls')
  if config.execution.remat != 'full':
    yield Remedy({**scan, 'execution.remat': 'full'}, '+33 % FLOPs at most')
  if config.optimizer.name == 'adamw':
    yield Remedy({'optimizer.name': 'adafactor'}, 'trains differently; another rate')
  if step.teacher:   # answers a whole batch at once, whatever the microbatches
    parts = max(parts, _parts(step, found, examples, found.teaching, 0))
  if parts > 1:
    yield Remedy({'data.batch_size': config.data.batch_size // parts}, 'trains differently')


def _can_scan(config: run_config.RunConfig) -> bool:
  """Whether blocks may run in one scan, and there are blocks that repeat."""
  model = models.build(config.model, dataclasses.replace(config.execution, scan=True))
  try:
    check_stacked(config.optimizer, model.param_paths)
  except ConfigError:
    return False
  return any(map(stacking.is_stacked, model.param_paths))


def _splits(step: Step) -> Iterator[Remedy]:
  """Experts, then all parameters, over the devices that only the data is split over."""
  config, shape = step.config, step.devices.mesh.shape
  free = len(step.devices.mesh.devices.flat) if config.parallel == 'pmap' else shape['data']
  kind = {} if config.parallel == 'mesh' else {'parallel': 'mesh'}
  size = lambda axis: shape.get(axis, 1)
  experts = {leaf.shape[0] for path, leaf in trees.flatten(step.model.shapes).items()
             if '/experts/' in path}
  for axis, parts, cost in (
      ('expert', math.gcd(free, *(E // size('expert') for E in experts)) if experts else 1,
       'tokens sent to their experts'),
      ('fsdp', free, 'parameters gathered where they are used')):
    if parts > 1:
      data = {} if config.mesh.data == -1 else {'mesh.data': free // parts}
      yield Remedy({**kind, **data, f'mesh.{axis}': size(axis) * parts}, cost)


def _parts(step: Step, found: 'Forecast', examples: int, takes: int, beside: int) -> int:
  """Into how many parts so many examples at once would have to be cut; 1 if they cannot be.

  If no number is enough, the largest there is: it may be, together with something else.

  takes: bytes that are in proportion to the examples; beside: that are not, but for the state.
  """
  most = examples // (step.rows * step.devices.shards)
  room = SLACK * (found.available - found.resident - beside)
  possible = [k for k in range(2, most + 1) if most % k == 0]
  enough = [k for k in possible if takes <= k * room]
  return (enough or possible[-1:] or [1])[0]
