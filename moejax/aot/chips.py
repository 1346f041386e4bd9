"""Speed, memory and links of TPU chips, and JAX's description of their slices.

Figures are published by Google (cloud.google.com/tpu/docs); bandwidths of links are from "How to
Scale Your Model" (jax-ml.github.io/scaling-book, chapters 2 and 3).
"""

import dataclasses
import math
import os
import re

from moejax.config import ConfigError, check, check_choice

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of chip.

  Attributes:
    flops: bfloat16 operations per second.
    memory: bytes of HBM that a program may use (which the compiler reports as available).
    bandwidth: of HBM, bytes per second.
    link: bytes per second of one link to a neighbour, both directions together.
    torus: dimensions of the network: 2 or 3.
  """
  flops: float
  memory: float
  bandwidth: float
  link: float
  torus: int


CHIPS = {
    'v4': Chip(275e12, 30.75 * GIB, 1.2e12, 9e10, 3),
    'v5e': Chip(197e12, 15.75 * GIB, 8.1e11, 9e10, 2),
    'v5p': Chip(459e12, 95.0 * GIB, 2.765e12, 1.8e11, 3),
    'v6e': Chip(918e12, 31.25 * GIB, 1.64e12, 1.8e11, 2),
}


def parse(slice_name: str) -> tuple[Chip, int]:
  """Returns the chip of a slice such as 'v5p:4x4x8', and their number. Raises ConfigError."""
  kind, _, shape = slice_name.partition(':')
  check_choice('--compile_for', kind, CHIPS)
  check(bool(re.fullmatch(r'\d+(x\d+)+', shape)), '--compile_for', slice_name,
        'CHIP:AxB or CHIP:AxBxC', 'For example v5e:4x4 or v5p:4x4x8.')
  return CHIPS[kind], math.prod(map(int, shape.split('x')))


def topology(slice_name: str):
  """Returns JAX's description of a slice.

  Fewer than 4 chips count as those of one host. Hosts of v4 and v5p have 4, and are not shared.

  Raises:
    ConfigError: no such slice, or no compiler for TPUs.
  """
  parse(slice_name)
  shape = [int(side) for side in slice_name.partition(':')[2].split('x')]
  hosts = {'chips_per_host_bounds': (shape + [1, 1])[:3]} if math.prod(shape) < 4 else {}
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')           # there is no TPU to query
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')   # nor one to lock
  from jax.experimental import topologies
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=slice_name, **hosts)
  except Exception as error:   # libtpu raises errors of many types
    message = ' '.join(str(error).split())[:300]
    raise ConfigError(
        f'--compile_for: {slice_name}: {type(error).__name__}: {message}. Give a slice '
        "that exists, and install the compiler for TPUs: pip install -e '.[tpu]'.") from error
