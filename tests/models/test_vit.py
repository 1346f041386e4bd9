"""ViT: heads, tokens, fillers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import vit
from moejax.models.scan import Execution
from moejax.moe.layer import MoEConfig
from tests.models import helpers
from tests.models.helpers import made

GAP = vit.config('tiny')
CLS = vit.config('tiny', head='cls')
SPARSE = vit.config('tiny', moe=MoEConfig(layers='last_1', num_experts=4, group_size=8))
make_batch = functools.partial(helpers.batch, GAP)


@pytest.mark.parametrize('config', [GAP, CLS], ids=['gap', 'cls'])
def test_position_matters_and_so_does_every_patch(config):
  _, params, apply = made(config)
  batch = make_batch()
  logits = apply(params, batch)[0]
  assert logits.shape == (4, 10) and logits.dtype == jnp.float32
  swapped = batch | {'image': np.roll(batch['image'], 4, axis=1)}    # whole patches change places
  assert (np.abs(apply(params, swapped)[0] - logits).max(-1) > 1e-3).all()
  for row, column in np.ndindex(2, 2):
    image = batch['image'].copy()
    image[:, 4 * row:4 * row + 4, 4 * column:4 * column + 4] += 1.0
    assert (np.abs(apply(params, batch | {'image': image})[0] - logits).max(-1) > 1e-3).all()


def test_cls_adds_a_token():
  gap, cls = (trees.flatten(made(c)[0].shapes) for c in (GAP, CLS))
  assert set(cls) - set(gap) == {'cls'}
  assert gap['position_embed/embedding'].shape == (4, 16)
  assert cls['position_embed/embedding'].shape == (5, 16)
  assert (GAP.num_tokens, CLS.num_tokens) == (4, 5)


def test_fillers_share_no_expert_with_examples_of_their_group():
  """Two images to a group: what stands in a filler must not move its neighbour's tokens."""
  _, params, apply = made(SPARSE)
  batch = make_batch()
  batch['weight'][3] = 0
  other = batch | {'image': batch['image'].copy()}
  other['image'][3] += 5.0
  (a, aux), (b, _) = apply(params, batch), apply(params, other)
  np.testing.assert_allclose(a[:3], b[:3], rtol=1e-5, atol=1e-5)
  assert np.abs(a[3] - b[3]).max() > 1e-3
  assert float(aux['encoder/layers/01']['tokens']) == 3 * 4
  real = other | {'weight': np.ones(4, np.float32)}                 # the same image as a real one
  assert np.abs(apply(params, real)[0][2] - a[2]).max() > 1e-6


@pytest.mark.parametrize('config', [GAP, CLS], ids=['gap', 'cls'])
def test_features_are_what_the_head_reads(config):
  model, params, apply = made(config)
  features = jax.jit(model.features)(params, make_batch())
  assert features.shape == (4, 16) and features.dtype == jnp.float32
  logits = features @ params['head']['kernel'] + params['head']['bias']
  np.testing.assert_allclose(apply(params, make_batch())[0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('change, message', [
    ({'patch_size': 3}, r'model\.patch_size: got 3.*divisor of model\.image_size = 8'),
    ({'num_heads': 3}, r'model\.num_heads: got 3.*divisor of model\.d_model = 16'),
    ({'head': 'gab'}, r"model\.head: got 'gab'.*Did you mean 'gap'"),
    ({'activation': 'gelu'}, r'model\.activation'),
    ({'moe': MoEConfig(layers='last_3')}, r'model\.moe\.layers'),
    ({'norm_eps': 0.0}, r'model\.norm_eps'),
])
def test_what_cannot_work_is_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(GAP, **change)


def test_float64_is_refused_where_jax_would_compute_in_float32():
  with pytest.raises(ConfigError, match="config.model.dtype: got 'float64', allowed: float32"):
    models.build(vit.config('tiny', dtype='float64'))
  with jax.enable_x64(True):
    models.build(vit.config('tiny', dtype='float64'))


@pytest.mark.parametrize('dtype, refused', [('float32', True), ('float64', True), (
    'bfloat16', False)])
def test_the_fused_kernel_of_a_gpu_is_for_bfloat16(dtype, refused, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  build = lambda: models.build(vit.config('tiny', dtype=dtype), Execution(attention='fused'))
  with jax.enable_x64(True):
    if not refused:
      build()
      return
    with pytest.raises(ConfigError, match=f"got 'fused', allowed: 'plain' in {dtype}"):
      build()
