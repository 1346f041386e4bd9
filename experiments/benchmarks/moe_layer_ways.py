"""What does an MoE layer cost beyond the matmuls of its experts?

Every way goes through float32 tokens of width 512 with E experts of 2,048 ReLU units, at C = 2:
experts' buffers hold two slots per token, and top-2 has two choices. Forward, and forward with the
gradients of tokens and all weights. One routing group holds all tokens. Two things to compare with:

  floor  the experts alone on 2 x tokens rows that stand sorted in (E, rows / E, D): two batched
         matmuls and the activation between them, and their gradients, by the code that the layer
         runs (moe.experts.Experts.apply). No routing, nothing moved.
  dense  one MLP of the same size on the same 2 x tokens rows: equal FLOPs, one set of weights.

Layers compute telemetry, losses and the gradient of the balance loss as they do in training.

Dimensions: E experts, D model, F ffn, N rows of an expert.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmarks.turns import Run
from moejax import nn
from moejax.moe.config import MoEConfig
from moejax.moe.experts import Experts
from moejax.moe.layer import MoELayer

PASSES = ('forward', 'forward and backward')
FLOOR, DENSE = 'floor', 'dense MLP'
CAPACITY = 2   # slots per token, and choices
ROUTERS = {'expert choice': {'router': 'expert_choice'},
           'top-2': {'router': 'top_k', 'k': CAPACITY, 'balance_weight': 0.01}}
LIGHT = ('expert choice, gather', 'top-2, gather', 'top-2, grouped')
ALL = tuple(f'{router}, {how}' for router in ROUTERS for how in ('gather', 'einsum', 'grouped'))


@dataclasses.dataclass(frozen=True)
class Cell:
  """The size of the work."""
  experts: int
  tokens: int
  d_model: int = 512
  d_ff: int = 2048

  @property
  def rows(self) -> int:
    """Rows through the experts."""
    return CAPACITY * self.tokens

  @property
  def flops(self) -> float:
    """Of the floor's forward pass."""
    return 4.0 * self.rows * self.d_model * self.d_ff


@dataclasses.dataclass(frozen=True)
class Way:
  """One way of doing the work of a cell.

  Attributes:
    name: 'floor', 'dense MLP', 'ROUTER, DISPATCH', or of another library.
    flops: those of its experts' matmuls over the floor's.
    runs: {pass: run}.
    temporary: {pass: bytes XLA takes beside inputs and outputs}; empty if not known.
  """
  name: str
  flops: float
  runs: dict[str, Run]
  temporary: dict[str, int]


def ways(cell: Cell, names: tuple[str, ...]) -> Iterator[Way]:
  """The floor, the dense MLP and the layers of these names (of `ALL`), compiled."""
  E, D, F = cell.experts, cell.d_model, cell.d_ff
  draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
  make = lambda *shape: jnp.asarray(draw(shape))
  weights = {'wi': make(E, D, F) / D ** 0.5, 'wo': make(E, F, D) / F ** 0.5}
  experts = nnx.eval_shape(lambda: _experts(cell))
  alone = lambda given, fixed: (experts.apply(*given), ())
  rows, cotangent = make(E, cell.rows // E, D), make(E, cell.rows // E, D)
  yield compiled(FLOOR, alone, (weights, rows), (), cotangent)

  flat = lambda a: a.reshape(cell.rows, D)
  first = jax.tree.map(lambda w: w[0], weights)
  yield compiled(DENSE, alone, (first, flat(rows)), (), flat(cotangent))

  x, mask = make(1, cell.tokens, D), jnp.ones((1, cell.tokens), bool)
  params = {'router': {'kernel': 0.02 * make(D, E)}, 'experts': weights}
  for name in names:
    yield compiled(name, layer(cell, name), (params, x), mask, (make(1, cell.tokens, D), 1.0))


def layer(cell: Cell, name: str) -> Callable:
  """((params, x), mask) -> ((y, sum of the losses), telemetry), of the layer of that name."""
  router, how = name.split(', ')
  config = MoEConfig(num_experts=cell.experts, capacity_factor=float(CAPACITY), dispatch=how,
                     **ROUTERS[router])
  graphdef, _, rest = nnx.split(nnx.eval_shape(lambda: MoELayer(
      config, cell.experts, _experts(cell), None, cell.d_model, rngs=nnx.Rngs(0))), nnx.Param, ...)

  def run(given, mask):
    params, x = given
    y, aux = nnx.merge(graphdef, params, rest)(x, mask, train=True)
    losses = sum(value for name, value in aux.items() if name.endswith('_loss'))
    return (y, losses / cell.tokens), aux
  return run


def _experts(cell: Cell) -> Experts:
  spec = nn.MLPSpec(cell.d_model, cell.d_ff, gated=False, activation='relu', bias=False,
                    init=nn.fan_in_normal())
  return Experts(spec, cell.experts, rngs=nnx.Rngs(0))


def compiled(name: str, function: Callable, given: Any, fixed: Any, cotangent: Any) -> Way:
  """A way of the floor's FLOPs: function(given, fixed) -> (out, rest), and gradients of `given`."""
  def backward(given, fixed, cotangent):
    out, pull, rest = jax.vjp(lambda given: function(given, fixed), given, has_aux=True)
    return out, rest, pull(cotangent)
  cotangent = jax.tree.map(jnp.float32, cotangent)
  runs, temporary = {}, {}
  for which, program, operands in ((PASSES[0], function, (given, fixed)),
                                   (PASSES[1], backward, (given, fixed, cotangent))):
    program = jax.jit(program).lower(*operands).compile()
    runs[which] = lambda program=program, operands=operands: jax.block_until_ready(
        program(*operands))
    temporary[which] = program.memory_analysis().temp_size_in_bytes
  return Way(name, 1.0, runs, temporary)
