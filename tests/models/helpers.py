"""Models ready to run in tests, with weights by numpy: compiling an init costs more than a test."""

import functools

import jax
import numpy as np

from moejax import models, trees


def random_params(shapes: dict, seed: int = 0) -> dict:
  """Weights of ordinary size, none of them at a special initial value such as 0 or 1."""
  rng = np.random.default_rng(seed)

  def draw(path, shape):
    z = rng.standard_normal(shape.shape).astype(np.float32)
    if len(shape.shape) == 1:
      return 0.3 * z + path.endswith('scale')
    return z if 'embed' in path else z / np.float32(np.sqrt(shape.shape[-2]))
  return trees.map_with_path(draw, shapes)


@functools.cache
def made(config):
  """(model, params, jitted apply) of a config; equal shapes get equal params."""
  model = models.build(config)
  return model, random_params(model.shapes), jax.jit(model.apply, static_argnames='train')
