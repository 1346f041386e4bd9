"""The ways that moe_layer.py times: our layers, two baselines, and the layers of transformers.

Every way takes float32 tokens of width 512 through E experts of 2,048 ReLU units, at a capacity
factor of 2: there are two slots per token in the experts' buffers, and top-2 has two choices. It
runs forward, and forward with the gradients of tokens and all weights. One routing group holds all
tokens. Two of the ways are baselines:

  floor  the experts alone on 2 x tokens rows that are sorted already, (E, rows / E, D): two batched
         matmuls and the activation between them, and their gradients, by the code of the layer
         (moe.experts.Experts.apply). No routing, nothing moved.
  dense  one MLP of an expert's size on as many rows: equal FLOPs, one set of weights.

Layers compute telemetry, losses and the gradient of the balance loss as in training.

The layers of transformers run on torch, on CPU in float32, as their models build them by default,
without jitter and dropout: Mixtral (top-2, no capacity, gated: three matrices where the others have
two, so 1.5 times the FLOPs) and Switch (top-1 with capacity, so half the rows).

Dimensions: E experts, D model, F ffn.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
TORCH = ('Mixtral (transformers)', 'Switch (transformers)')
NO_TORCH = ("left out: Mixtral and Switch of transformers; pip install -e '.[parity]' installs "
            'them, into a venv of their own if this one is to stay small')


@dataclasses.dataclass(frozen=True)
class Size:
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
    """FLOPs of the floor's forward pass."""
    return 4.0 * self.rows * self.d_model * self.d_ff


@dataclasses.dataclass(frozen=True)
class Way:
  """One way of doing work of some size.

  Attributes:
    name: 'floor', 'dense MLP', 'ROUTER, DISPATCH', or of TORCH.
    flops: those of its experts' matmuls over the floor's.
    calls: {pass: does it once and waits for it}.
    temporary: {pass: bytes XLA takes beside inputs and outputs}; empty if not known.
  """
  name: str
  flops: float
  calls: dict[str, Callable[[], Any]]
  temporary: dict[str, int]


def ways(size: Size, names: tuple[str, ...]) -> Iterator[Way]:
  """The floor, the dense MLP and the layers of these names (of `ALL`), compiled."""
  E, D, F = size.experts, size.d_model, size.d_ff
  draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
  make = lambda *shape: jnp.asarray(draw(shape))
  weights = {'wi': make(E, D, F) / D ** 0.5, 'wo': make(E, F, D) / F ** 0.5}
  experts = nnx.eval_shape(lambda: _experts(size))
  alone = lambda given, fixed: (experts.apply(*given), ())
  rows, cotangent = make(E, size.rows // E, D), make(E, size.rows // E, D)
  yield compiled(FLOOR, alone, (weights, rows), (), cotangent)

  flat = lambda a: a.reshape(size.rows, D)
  first = jax.tree.map(lambda w: w[0], weights)
  yield compiled(DENSE, alone, (first, flat(rows)), (), flat(cotangent))

  x, mask = make(1, size.tokens, D), jnp.ones((1, size.tokens), bool)
  params = {'router': {'kernel': 0.02 * make(D, E)}, 'experts': weights}
  for name in names:
    yield compiled(name, layer(size, name), (params, x), mask, (make(1, size.tokens, D), 1.0))


def layer(size: Size, name: str) -> Callable:
  """((params, x), mask) -> ((y, sum of the losses), telemetry), of the layer of that name."""
  router, how = name.split(', ')
  config = MoEConfig(num_experts=size.experts, capacity_factor=float(CAPACITY), dispatch=how,
                     **ROUTERS[router])
  graphdef, _, rest = nnx.split(nnx.eval_shape(lambda: MoELayer(
      config, size.experts, _experts(size), None, size.d_model, rngs=nnx.Rngs(0))), nnx.Param, ...)

  def apply(given, mask):
    params, x = given
    y, aux = nnx.merge(graphdef, params, rest)(x, mask, train=True)
    losses = sum(value for name, value in aux.items() if name.endswith('_loss'))
    return (y, losses / size.tokens), aux
  return apply


def _experts(size: Size) -> Experts:
  spec = nn.MLPSpec(size.d_model, size.d_ff, gated=False, activation='relu', bias=False,
                    init=nn.fan_in_normal())
  return Experts(spec, size.experts, rngs=nnx.Rngs(0))


def compiled(name: str, function: Callable, given: Any, fixed: Any, cotangent: Any) -> Way:
  """A way of the floor's FLOPs: function(given, fixed) -> (out, rest), and gradients of `given`."""
  def backward(given, fixed, cotangent):
    out, pull, rest = jax.vjp(lambda given: function(given, fixed), given, has_aux=True)
    return out, rest, pull(cotangent)
  cotangent = jax.tree.map(jnp.float32, cotangent)
  calls, temporary = {}, {}
  for which, program, operands in ((PASSES[0], function, (given, fixed)),
                                   (PASSES[1], backward, (given, fixed, cotangent))):
    program = jax.jit(program).lower(*operands).compile()
    calls[which] = lambda program=program, operands=operands: jax.block_until_ready(
        program(*operands))
    temporary[which] = program.memory_analysis().temp_size_in_bytes
  return Way(name, 1.0, calls, temporary)


def torch_installed() -> bool:
  """Whether torch and transformers are installed."""
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def torch_ways(size: Size, threads: int) -> Iterator[Way]:
  """Both layers of transformers, on as many threads as XLA has."""
  import torch
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  x = torch.randn(1, size.tokens, size.d_model, requires_grad=True)
  cotangent = torch.randn(1, size.tokens, size.d_model)
  for name, make in zip(TORCH, (_mixtral, _switch)):
    block, flops = make(size, x)

    def forward(block=block):
      with torch.no_grad():
        return block(x)

    def backward(block=block):
      block(x).backward(cotangent)
      block.zero_grad(set_to_none=True)   # XLA's gradients are new arrays each time, too
      x.grad = None
    yield Way(name, flops, dict(zip(PASSES, (forward, backward))), {})


def _mixtral(size: Size, x: Any):
  """(block, FLOPs / floor). The block is of a whole, small model, which chooses how its experts are
  multiplied."""
  from transformers import MixtralConfig, MixtralModel
  config = MixtralConfig(
      vocab_size=8, hidden_size=size.d_model, intermediate_size=size.d_ff, num_hidden_layers=1,
      num_attention_heads=1, num_key_value_heads=1, num_local_experts=size.experts,
      num_experts_per_tok=CAPACITY)
  return MixtralModel(config).layers[0].mlp, 1.5


def _switch(size: Size, x: Any):
  """(block, FLOPs / floor): only tokens within the capacity are computed."""
  import torch
  from transformers import SwitchTransformersConfig
  from transformers.models.switch_transformers import modeling_switch_transformers as modeling
  config = SwitchTransformersConfig(
      d_model=size.d_model, d_ff=size.d_ff, num_experts=size.experts, dropout_rate=0.0,
      expert_capacity=size.rows // size.experts, router_jitter_noise=0.0)
  block = modeling.SwitchTransformersSparseMLP(config)
  with torch.no_grad():
    placed = block.router(x)[0].sum().item()
  return block, placed / size.rows
