"""Traps that only the mutation check showed to be open: see docs/mutations.md."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax import models
from moejax.models import layers
from moejax.models.t5 import T5Config
from moejax.models.vit import ViTConfig
from moejax.moe.config import MoEConfig
from tests.models.helpers import batch

MOE = MoEConfig(layers='1', num_experts=3, shared_experts=1, router='top_k', renormalize=True)
MODELS = [T5Config(vocab_size=40, d_model=8, d_ff=16, d_kv=4, encoder_moe=MOE, decoder_moe=MOE),
          ViTConfig(image_size=8, patch_size=4, d_model=8, d_ff=16, num_heads=2, num_layers=2,
                    moe=MOE)]


def equations(jaxpr):
  """All there are, at any depth."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values()),
                                 is_leaf=lambda v: hasattr(v, 'eqns') or hasattr(v, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def matmuls(jaxpr):
  """(left shape, right shape) of each matrix product without batch dimensions, at any depth."""
  for equation in equations(jaxpr):
    if equation.primitive.name == 'dot_general':
      (_, _), batch = equation.params['dimension_numbers']
      if not batch[0]:
        yield tuple(v.aval.shape for v in equation.invars)


@pytest.mark.parametrize('config', MODELS, ids=lambda config: config.family)
def test_activations_are_two_dimensional_around_matmuls(config):
  """On XLA's CPU (B*L, D) @ (D, F) is nearly twice as fast as (B, L, D) @ (D, F)."""
  model = models.build(config)
  found = list(matmuls(jax.make_jaxpr(model.apply)(model.shapes, batch(config)).jaxpr))
  assert len(found) > 10
  assert not [shapes for shapes in found if any(len(shape) != 2 for shape in shapes)]


@pytest.mark.parametrize('norm', [layers.RMSNorm, layers.LayerNorm])
def test_the_gradient_of_a_norms_scale_is_a_sum_over_rows(norm):
  """Over two axes, XLA on GPUs transposes the residual stream for it."""
  graph, params = nnx.split(norm(6, eps=1e-6, rngs=nnx.Rngs(0)))
  run = jax.grad(lambda params, x: jnp.square(nnx.merge(graph, params)(x)).sum())
  sums = [e for e in equations(jax.make_jaxpr(run)(params, jnp.ones((2, 5, 6))).jaxpr)
          if e.primitive.name == 'reduce_sum' and e.outvars[0].aval.shape == (6,)]
  assert sums
  assert all(e.invars[0].aval.ndim == 2 for e in sums)
