"""MoE layers of transformers, on torch, as their models build them, to time beside ours.

Mixtral: top-2, no capacity, gated experts: three matrices where the others have two, so 1.5 times
the FLOPs. Switch Transformers: top-1 with capacity, so half the rows. Both as a user gets them by
default, on CPU in float32, without jitter and dropout.

    pip install -e '.[parity]'     # torch and transformers, beside moejax
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks.moe_layer_ways import CAPACITY, PASSES, Cell, Way

NAMES = ('Mixtral (transformers)', 'Switch (transformers)')
MISSING = ("left out: Mixtral and Switch of transformers; pip install -e '.[parity]' brings them, "
           'into a venv of their own if this one is to stay small')


def installed() -> bool:
  """Whether torch and transformers are there."""
  return all(importlib.util.find_spec(name) for name in ('torch', 'transformers'))


def ways(cell: Cell, threads: int) -> Iterator[Way]:
  """Both layers, on as many threads as XLA has."""
  import torch
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  x = torch.randn(1, cell.tokens, cell.d_model, requires_grad=True)
  cotangent = torch.randn(1, cell.tokens, cell.d_model)
  for name, make in zip(NAMES, (_mixtral, _switch)):
    block, flops = make(cell, x)
    runs = (_forward(block, x), _backward(block, x, cotangent))
    yield Way(name, flops, dict(zip(PASSES, runs)), {})


def _mixtral(cell: Cell, x: Any):
  """The block of a whole, small model, which chooses how its experts are multiplied; FLOPs / floor.
  """
  from transformers import MixtralConfig, MixtralModel
  config = MixtralConfig(
      vocab_size=8, hidden_size=cell.d_model, intermediate_size=cell.d_ff, num_hidden_layers=1,
      num_attention_heads=1, num_key_value_heads=1, num_local_experts=cell.experts,
      num_experts_per_tok=CAPACITY)
  return MixtralModel(config).layers[0].mlp, 1.5


def _switch(cell: Cell, x: Any):
  """The block, and FLOPs / floor: only tokens within the capacity are computed."""
  import torch
  from transformers import SwitchTransformersConfig
  from transformers.models.switch_transformers import modeling_switch_transformers as modeling
  config = SwitchTransformersConfig(
      d_model=cell.d_model, d_ff=cell.d_ff, num_experts=cell.experts, dropout_rate=0.0,
      expert_capacity=cell.rows // cell.experts, router_jitter_noise=0.0)
  block = modeling.SwitchTransformersSparseMLP(config)
  with torch.no_grad():
    placed = block.router(x)[0].sum().item()
  return block, placed / cell.rows


def _forward(block: Any, x: Any) -> Callable[[], Any]:
  import torch

  def run():
    with torch.no_grad():
      return block(x)
  return run


def _backward(block: Any, x: Any, cotangent: Any) -> Callable[[], None]:
  def run():
    block(x).backward(cotangent)
    block.zero_grad(set_to_none=True)   # XLA's gradients are new arrays each time, too
    x.grad = None
  return run
