"""The experts the tests of this folder route to. E experts, N tokens, D model, F ffn."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def apply(weights, x, layout=None):
  """Gated tanh-GELU MLP of each expert, without biases: (E, N, D) -> (E, N, D) in x's dtype.

  With a layout (grouped_matmul.RowLayout) x is (P, D), and the layout gives each row's expert.
  """
  matmul = jnp.matmul if layout is None else layout.gmm
  w = {name: leaf.astype(x.dtype) for name, leaf in weights.items()}
  hidden = jax.nn.gelu(matmul(x, w['wi_gate']), approximate=True) * matmul(x, w['wi'])
  return matmul(hidden, w['wo'])


def random_weights(rng, E, D, F):
  """Float32 weights with which a unit input gives pre-activations and outputs of order one."""
  shapes = {'wi_gate': (E, D, F), 'wi': (E, D, F), 'wo': (E, F, D)}
  return {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[1]), jnp.float32)
          for name, shape in shapes.items()}


def mlp(weights, x):
  """The dense twin: expert 0 of weights on (B, L, D)."""
  first = {name: leaf[:1] for name, leaf in weights.items()}
  return apply(first, x.reshape(1, -1, x.shape[-1])).reshape(x.shape)


class Experts(nnx.Module):
  """Experts as MoELayer takes them: stacked weights, and a function that applies them."""
  dropout_rate = 0.0

  def __init__(self, E, D, F, seed=0):
    for name, value in random_weights(np.random.default_rng(seed), E, D, F).items():
      setattr(self, name, nnx.Param(value))

  def weights(self):
    return {name: getattr(self, name)[...] for name in ('wi_gate', 'wi', 'wo')}

  def apply(self, weights, x, drop=None, layout=None):
    assert drop is None, 'these experts have no dropout'
    return apply(weights, x, layout)
