"""The experts that the tests of this folder route to: gated tanh-GELU MLPs without biases.

naive.mlp is their formula. E experts, D model, F ffn.
"""

import types

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import nn
from moejax.moe import experts

SPEC = nn.MLPSpec(0, 0, gated=True, activation='gelu_tanh', bias=False)   # sizes are the weights'


class Experts(experts.Experts):
  """With weights by NumPy: compiling an init costs more than a test."""

  def __init__(self, E, D, F, seed=0):
    self.spec = SPEC
    for name, value in random_weights(np.random.default_rng(seed), E, D, F).items():
      setattr(self, name, nnx.Param(value))


def apply(weights, x, layout=None):
  return Experts.apply(types.SimpleNamespace(spec=SPEC), weights, x, layout=layout)


def random_weights(rng, E, D, F):
  """Float32 weights with which a unit input gives pre-activations and outputs of order one."""
  shapes = {'wi_gate': (E, D, F), 'wi_up': (E, D, F), 'wo': (E, F, D)}
  return {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[1]), jnp.float32)
          for name, shape in shapes.items()}


def mlp(weights, x):
  """The dense twin: expert 0 of weights on (B, L, D)."""
  first = {name: leaf[:1] for name, leaf in weights.items()}
  return apply(first, x.reshape(1, -1, x.shape[-1])).reshape(x.shape)
