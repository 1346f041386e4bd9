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


def batch(config, B: int = 4, L: int = 12, M: int = 9) -> dict:
  """A batch of random examples without padding, as data.Dataset has it: L and M tokens for a T5."""
  rng = np.random.default_rng(0)
  index = np.arange(B)
  if config.family == 'vit':
    image = rng.standard_normal((B, *config.image_shape)).astype(np.float32)
    return {'image': image, 'label': index, 'weight': np.ones(B, np.float32), 'index': index}
  ids = lambda length: rng.integers(1, min(config.vocab_size, 64), (B, length))
  target = ids(M)
  return {'encoder_input': ids(L), 'target': target,
          'decoder_input': np.pad(target, ((0, 0), (1, 0)))[:, :-1],
          'weight': np.ones((B, M), np.float32), 'index': index}
