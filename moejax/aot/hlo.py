"""Reads the text of a compiled program (HLO): how often instructions run, their FLOPs and bytes.

The compiler's own cost analysis counts the body of a loop once; here an instruction counts as often
as it runs. Sizes are those on one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {'pred': 1, 's4': 0.5, 'u4': 0.5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2,
         's32': 4, 'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'token': 0, 's2': 0.25,
         'u2': 0.25, 'f4e2m1fn': 0.5, 'c64': 8, 'c128': 16}   # and all others of 8 bits: f8...
# Opcodes that move and compute nothing themselves; so do those that end in -done.
FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'while',
        'call', 'call-start', 'async-start', 'async-update', 'conditional', 'partition-id',
        'replica-id', 'opt-barrier'}
# Matmuls of bfloat16 that a TPU makes of one of float32.
PASSES = {'default': 1, 'high': 3, 'highest': 6}
# Custom calls that are only hints for the compiler.
HINTS = {'AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'PrepareAsyncCallStart',
         'PrepareAsyncCallDone'}

_HEADER = re.compile(r'(?:(ENTRY) )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_ARRAY = re.compile(r'(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; `near`: it is in VMEM, beside the compute units, not in HBM."""
  dtype: str
  dims: tuple[int, ...]
  near: bool

  @property
  def bytes(self) -> float:
    return _size(self.dtype) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of the text.

  Attributes:
    name, opcode: 'dot.3' and 'dot' of '%dot.3 = ... dot(...)'.
    arrays: of the result, several if it is a tuple.
    operands: names.
    text: everything after the operands.
  """
  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  text: str

  def attribute(self, key: str) -> str:
    """Returns the name in 'key=%name', or ''."""
    match = re.search(rf'\b{key}=%?([\w.\-]+)', self.text)
    return match[1] if match else ''

  @property
  def target(self) -> str:
    """The target of a custom call, or ''."""
    match = re.search(r'custom_call_target="([^"]*)"', self.text)
    return match[1] if match else ''

  @property
  def scope(self) -> str:
    """The path of jax.named_scope and functions that it comes from."""
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else ''


class Module:
  """A compiled program.

  Args:
    text: `compiled.as_text()`.

  Attributes:
    computations: {name: {name: Instruction}} in the order in which they run.
    entry: name of the first one.
    devices: number of devices that run it together.
    unknown_loops: bodies of loops whose length is not in the text; they count once. Filled by
      `run`.
  """

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry, self.unknown_loops = '', []
    partitions = re.search(r'\bnum_partitions=(\d+)', text[:text.find('\n')])
    replicas = re.search(r'\breplica_count=(\d+)', text[:text.find('\n')])
    self.devices = math.prod(int(found[1]) for found in (partitions, replicas) if found)
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self.computations.setdefault(header[2], {})
        self.entry = header[2] if header[1] else self.entry
      elif found := _LINE.match(line):
        instruction = _parse(found[1], found[2])
        if instruction:
          current[instruction.name] = instruction

  def run(self) -> Iterator[tuple[Instruction, int, str]]:
    """Yields (instruction, how often it runs, its computation) of all that runs as an operation.

    Instructions that are fused into an operation are not among them; see `fused`.
    """
    yield from self._run(self.entry, 1)

  def _run(self, computation: str, times: int) -> Iterator[tuple[Instruction, int, str]]:
    for instruction in self.computations.get(computation, {}).values():
      yield instruction, times, computation
      if instruction.opcode == 'while':
        yield from self._run(instruction.attribute('body'), times * self._length(instruction))
      elif instruction.opcode in ('call', 'call-start'):   # the latter on a TPU's SparseCores
        yield from self._run(instruction.attribute('to_apply'), times)
      elif instruction.opcode == 'conditional':
        yield from self._run(max(_branches(instruction.text), key=self._cost), times)
      elif instruction.opcode == 'async-start':
        yield from self._run(instruction.attribute('calls'), times)

  def _cost(self, computation: str) -> tuple[float, float]:
    """FLOPs and bytes of a computation."""
    ran = list(self._run(computation, 1))
    return (sum(n * self.flops(i, c) for i, n, c in ran),
            sum(n * self.bytes(i, c) for i, n, c in ran))

  def _length(self, loop: Instruction) -> int:
    """Returns how often the body of a while runs: jax.lax.scan counts from 0 to a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
      return int(known[1])
    condition = self.computations.get(loop.attribute('condition'), {})
    compared = [i for i in condition.values() if i.opcode == 'compare' and 'direction=LT' in i.text]
    limits = [int(i.text.split(')')[0]) for i in condition.values()
              if i.opcode == 'constant' and i.text.split(')')[0].isdigit()]
    if len(compared) == 1 and len(limits) == 1:
      return limits[0]
    if loop.attribute('body') not in self.unknown_loops:
      self.unknown_loops.append(loop.attribute('body'))
    return 1

  def fused(self, instruction: Instruction) -> dict[str, Instruction]:
    """Returns the instructions of a fusion's computation; {} of anything else."""
    if instruction.opcode != 'fusion':
      return {}
    return self.computations.get(instruction.attribute('calls'), {})

  def flops(self, instruction: Instruction, computation: str, passes: bool = False) -> float:
    """Returns 2 for each multiplication of a matmul or convolution, also within a fusion.

    A custom kernel counts with the FLOPs that it declares.

    passes: count the passes in bfloat16 by which a TPU reaches precision: 3 at 'high', 6 at
      'highest'.
    """
    inner = self.fused(instruction)
    if inner:
      name = instruction.attribute('calls')
      return sum(self.flops(i, name, passes) for i in inner.values())
    if instruction.opcode == 'custom-call':
      declared = re.search(r'"cost_estimate":\{"flops":"(\d+)"', instruction.text)
      return int(declared[1]) if declared else 0
    if instruction.opcode not in ('dot', 'convolution'):
      return 0
    left, right = (self.computations[computation][name].arrays[0].dims
                   for name in instruction.operands[:2])
    out = instruction.arrays[0].dims
    times = 1
    if passes and (precision := re.search(r'operand_precision=\{(\w+),(\w+)\}', instruction.text)):
      times = max(PASSES[name] for name in precision.groups())
    if instruction.opcode == 'dot':
      contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.text)
      dims = [int(d) for d in contracted[1].split(',') if d] if contracted else []
      return times * 2 * math.prod(out) * math.prod(left[d] for d in dims)
    return times * _convolution_flops(instruction.text, left, right, out)

  def bytes(self, instruction: Instruction, computation: str) -> float:
    """Returns bytes read from and written to HBM: operands and result, or the parts used of them.
    """
    if (instruction.opcode in FREE or instruction.opcode.endswith('-done')
        or instruction.target in HINTS):
      return 0
    around = self.computations[computation]
    operands = [around[name].arrays for name in instruction.operands if name in around]
    far = lambda arrays: sum(a.bytes for a in arrays if not a.near)
    result = far(instruction.arrays)
    if instruction.opcode in ('dynamic-slice', 'slice', 'gather'):
      return 2 * result
    if instruction.opcode == 'dynamic-update-slice':
      return 2 * far(operands[1])
    if instruction.opcode == 'copy-start':      # (to, from, context)
      return far(instruction.arrays[:2])
    if instruction.opcode == 'slice-start':     # ((from), to, context)
      source, part = instruction.arrays[:2]
      return (0 if source.near else part.bytes) + (0 if part.near else part.bytes)
    inner = self.fused(instruction)
    if not inner:
      return result + sum(map(far, operands))
    read, written = _touched(inner, [far(arrays) for arrays in operands], result)
    return read + written


def _parse(name: str, rest: str) -> Instruction | None:
  """'f32[2]{0} add(%a, %b), metadata=...' -> Instruction."""
  shape = _until(rest, ' ')
  opcode, _, after = rest[len(shape) + 1:].partition('(')
  if not re.fullmatch(r'[\w\-]+', opcode):
    return None
  inside = _until(after, ')')
  text = after if opcode in ('constant', 'parameter') else after[len(inside) + 1:]
  return Instruction(name, opcode, _arrays(shape), tuple(re.findall(r'%([\w.\-]+)', inside)), text)


def _until(text: str, end: str) -> str:
  """Returns the text before the first `end` that is outside of brackets."""
  depth = 0
  for place, letter in enumerate(text):
    if letter == end and not depth:
      return text[:place]
    depth += (letter in '([{') - (letter in ')]}')
  return text


@functools.lru_cache(maxsize=65536)
def _arrays(shape: str) -> tuple[Array, ...]:
  return tuple(Array(dtype, tuple(int(d.strip('<=')) for d in dims.split(',') if d),
                     'S(1)' in layout)
               for dtype, dims, layout in _ARRAY.findall(shape))


def _size(dtype: str) -> float:
  """Bytes of an element. Raises ValueError for a type that is not known."""
  size = 1 if dtype.startswith('f8') else BYTES.get(dtype)
  if size is None:
    raise ValueError(f'unknown size of an array of {dtype!r}; add the type to '
                     'moejax/aot/hlo.py: BYTES')
  return size


def _branches(text: str) -> list[str]:
  """Returns the computations of a conditional, of which one runs."""
  if listed := re.search(r'branch_computations=\{([^}]*)\}', text):
    return [name.strip(' %') for name in listed[1].split(',')]
  return re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', text)


def _touched(inner: dict[str, Instruction], sizes: list[float], result: float
             ) -> tuple[float, float]:
  """Returns bytes that a fusion reads and writes: of a sliced operand the slice, of an updated one
  the update.

  Args:
    inner: the fusion's instructions.
    sizes: of its operands, in HBM.
    result: size of its result, in HBM.
  """
  users: dict[str, list[Instruction]] = {}
  for instruction in inner.values():
    for operand in instruction.operands:
      users.setdefault(operand, []).append(instruction)
  read, written = 0.0, result
  for instruction in inner.values():
    if instruction.opcode != 'parameter':
      continue
    number = int(instruction.text.split(')')[0])
    size = sizes[number] if number < len(sizes) else 0.0
    uses = users.get(instruction.name, [])
    if uses and all(u.opcode == 'dynamic-slice' and u.operands[0] == instruction.name
                    for u in uses):
      size = min(size, sum(u.arrays[0].bytes for u in uses))
    elif uses and all(u.opcode == 'dynamic-update-slice' and u.operands[0] == instruction.name
                      for u in uses):
      updates = sum(inner[u.operands[1]].arrays[0].bytes for u in uses if u.operands[1] in inner)
      written = max(0.0, written - size) + updates if size else written
      size = 0.0
    read += size
  return read, written


def _convolution_flops(text: str, left: tuple, right: tuple, out: tuple) -> float:
  """Returns FLOPs of a convolution; a TPU runs matmuls as one, batch dimensions as windows."""
  kernel = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', text)
  lhs, rhs, result = kernel.groups()
  spatial = sorted(letter for letter in rhs if letter.isdigit())
  window = {key: values.split('x') for key, values in re.findall(
      r'(\w+)=([\dx_\-]+)', (re.search(r'window=\{([^}]*)\}', text) or [None, ''])[1])}
  total = 2.0 * out[result.index('b')] * out[result.index('f')] * right[rhs.index('i')]
  for i, letter in enumerate(spatial):
    number = lambda key, default: int(window[key][i]) if key in window else default   # noqa: B023
    low = int(window['pad'][i].split('_')[0]) if 'pad' in window else 0
    position = (np.arange(out[result.index(letter)])[:, None] * number('stride', 1) - low
                + np.arange(right[rhs.index(letter)]) * number('rhs_dilate', 1))
    dilation, size = number('lhs_dilate', 1), left[lhs.index(letter)]
    inside = (position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)
    total *= int(inside.sum())
  return total
