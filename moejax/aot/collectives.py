"""Finds the communication of a compiled program: kinds, bytes, and the devices that take part."""

import dataclasses
import math
import re

import numpy as np

from moejax.aot.hlo import Instruction, Module

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Collective:
  """Communication of one kind.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole buffer on one device: the result of an all-gather, the argument of a
      reduce-scatter, either one elsewhere.
    groups: (groups, devices) numbers of the devices that take part together; of a
      collective-permute, (pairs, 2) sender and receiver.
    times: how often it runs in a step.
    scope: path of jax.named_scope and functions that it comes from.
  """
  kind: str
  bytes: float
  groups: np.ndarray = dataclasses.field(compare=False)
  times: int
  scope: str

  @property
  def devices(self) -> int:
    """The number of devices in a group."""
    return self.groups.shape[1]

  @property
  def sent(self) -> float:
    """Bytes that one device sends in a step: (n-1)/n of the buffer, twice for an all-reduce."""
    share = 1.0 if self.kind == 'collective-permute' else (self.devices - 1) / self.devices
    return self.bytes * share * self.times * (2 if self.kind == 'all-reduce' else 1)


def of(module: Module) -> list[Collective]:
  """Returns all communication of a step between more than one device."""
  collectives = []
  for instruction, times, computation in module.run():
    inside = module.fused(instruction)
    around = inside or module.computations[computation]
    for part in communication(module, instruction):
      kind, groups = _kind(part), groups_of(part.text, module.devices)
      devices = groups.shape[1]
      size = sum(a.bytes for name in part.operands if name in around for a in around[name].arrays)
      if kind == 'all-gather':
        size *= devices
      if inside and 'all-reduce-scatter' in instruction.attribute('calls'):
        kind = 'reduce-scatter'
      if devices > 1:
        collectives.append(Collective(kind, size, groups, times, part.scope or instruction.scope))
  return collectives


def communication(module: Module, instruction: Instruction) -> list[Instruction]:
  """Returns the collectives that an operation is, contains or begins.

  A TPU fuses collectives into operations: an all-reduce with the slice that each device keeps of
  it, which is a reduce-scatter; and, in three parts, one that goes on during other computation. Of
  those parts the first counts.
  """
  inside = module.fused(instruction)
  if not inside:
    return [instruction] if _kind(instruction) else []
  if (instruction.name.startswith('async-collective-done')
      or instruction.attribute('calls').startswith('async_collective_fusion')):
    return []
  return [part for part in inside.values() if _kind(part)]


def _kind(instruction: Instruction) -> str:
  """Returns which of KINDS this is, or starts; '' if none."""
  kind = instruction.opcode.removesuffix('-start')
  return kind if kind in KINDS else ''


def groups_of(text: str, devices: int) -> np.ndarray:
  """Returns which devices take part together, from any notation of replica_groups, or from pairs.

  Args:
    text: of a collective.
    devices: that run the program.

  Returns:
    int (groups, devices of a group); of 'source_target_pairs' (pairs, 2).

  Raises:
    ValueError: a notation that is none of them.
  """
  if pairs := re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}', text):
    return np.array(_listed(pairs[1]))
  if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\) )?\s*\{([^}]*)\}",
                       text):
    return _mesh_groups(*mesh.groups())
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\S+?)(?:, |\s|$)', text):
    return _iota(f'[{iota[3].split("[")[1]}').reshape(int(iota[1]), int(iota[2]))
  if listed := re.search(r'replica_groups=\{((?:\{[\d,]*\},?)+)\}', text):
    return np.array(_listed(listed[1]))
  if 'replica_groups={}' in text:
    return np.arange(devices)[None]
  raise ValueError(f'cannot tell who takes part in a collective: {text[:200]}')


def _listed(text: str) -> list[list[int]]:
  """'{0,1},{2,3}' -> [[0, 1], [2, 3]]."""
  return [list(map(int, group.split(','))) for group in re.findall(r'\{([\d,]+)\}', text)]


def _iota(text: str) -> np.ndarray:
  """'[4,8]T(1,0)' -> the numbers 0 to 31 as (4, 8), transposed."""
  dims, order = re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  numbers = np.arange(math.prod(map(int, dims.split(',')))).reshape(list(map(int, dims.split(','))))
  return numbers.transpose(list(map(int, order.split(',')))) if order else numbers


def _mesh_groups(axes: str, order: str | None, taken: str) -> np.ndarray:
  """Groups over axes of a mesh, or parts of axes: 'a':(2)4 is the middle one of 2 x 4 x rest."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in re.findall(
      r"'(\w+)'(?::\((\d+)\)(\d+))?", taken)}
  dims, inside = [], []
  for name, size in sizes.items():
    before, part = parts.get(name, (size, 1))
    inside.append(len(dims) + 1)
    dims += [before, part, size // before // part]
  numbers = (_iota(order) if order else np.arange(math.prod(dims))).reshape(dims)
  return np.moveaxis(numbers, inside, range(-len(inside), 0)).reshape(
      -1, math.prod(part for _, part in parts.values()))
