"""Scanned and rematerialised stacks compute what unrolled ones do, in value and every gradient."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import attention, t5, vit
from moejax.models.scan import REMAT, Execution
from moejax.moe.layer import MoEConfig
from moejax.trees import stacking
from tests.models.helpers import random_params

CHOSEN = MoEConfig(layers='every_2', num_experts=4, capacity_factor=1.5, group_size=24, z_weight=1.)
CONFIGS = {   # each has stacked blocks, and the ViT one that is not
    't5': t5.config('tiny', encoder_layers=4, decoder_layers=4, dropout_rate=0.1,
                    encoder_moe=CHOSEN, decoder_moe=MoEConfig(
                        layers='last_2', router='top_k', num_experts=4, group_size=12,
                        balance_weight=1., noise_std=1., capacity_factor=1.25)),
    'vit': vit.config('tiny', num_layers=5, dropout_rate=0.1, moe=MoEConfig(
        layers='1,3', num_experts=4, group_size=8, dropout_rate=0.2)),
}
HELD = {'t5': {'encoder': {'00+2x2', '01+2x2'}, 'decoder': {'00+1x2', '02+1x2'}},
        'vit': {'encoder': {'00+2x2', '01+2x2', '04'}}}


def batch(config):
  rng = np.random.default_rng(0)
  index = np.arange(4, dtype=np.int32)
  if config.family == 'vit':
    return {'image': rng.normal(size=(4, 8, 8, 1)).astype(np.float32), 'index': index,
            'weight': np.array([1, 1, 1, 0], np.float32)}
  ids = rng.integers(1, 60, (4, 12)).astype(np.int32)
  ids[1, 7:] = 0
  return {'encoder_input': ids, 'decoder_input': ids[:, :6], 'index': index,
          'weight': (ids[:, 3:9] > 0).astype(np.float32)}


def objective(model, config, train=True):
  """params -> (a loss that every output moves, aux), and its gradient."""
  given, key = batch(config), jax.random.key(3)

  def loss(params):
    logits, aux = model.apply(params, given, train=train, key=key if train else None)
    extra = sum(v for sums in aux.values() for k, v in sums.items() if k.endswith('_loss'))
    return jnp.square(logits).mean() + extra / 48, aux
  return jax.value_and_grad(loss, has_aux=True)


def stacked(params, model):
  copy = jax.tree.map(lambda x: x, params)
  return stacking.stack(copy, model.param_paths, lambda path, leaves: jnp.stack(leaves))


def stacked_shapes(model):
  return jax.eval_shape(lambda: stacked(jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype), model.shapes), model))


@pytest.fixture(scope='module', params=CONFIGS)
def unrolled(request):
  config = CONFIGS[request.param]
  model = models.build(config)
  params = random_params(model.shapes)
  return request.param, config, params, jax.jit(objective(model, config))(params)


@pytest.mark.parametrize('scan, remat', [(True, 'none'), (True, 'dots'), (False, 'full')])
def test_the_same_values_and_gradients(unrolled, scan, remat):
  family, config, params, ((loss, aux), grads) = unrolled
  model = models.build(config, Execution(scan, remat))
  if scan:
    for stack, names in HELD[family].items():
      found = {path.split('/')[2] for path in model.param_paths
               if path.startswith(f'{stack}/layers/')}
      assert found == names
  held = stacked(params, model)
  assert set(trees.flatten(held)) == set(model.param_paths)
  (again, same), slopes = jax.jit(objective(model, config))(held)
  np.testing.assert_allclose(again, loss, rtol=1e-5)
  assert list(same) == list(aux)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), same, aux)
  slopes = trees.flatten(stacking.unstack(slopes, lambda path, leaf: list(leaf)))
  for path, grad in trees.flatten(grads).items():
    largest = np.abs(grad).max()
    np.testing.assert_allclose(slopes[path], grad, atol=1e-5 * largest + 1e-8, err_msg=path)


def test_a_scan_compiles_one_repetition_however_deep():
  def size(depth, scan):
    config = vit.config('tiny', num_layers=depth)
    model = models.build(config, Execution(scan))
    held = stacked_shapes(model)
    return len(str(jax.make_jaxpr(objective(model, config))(held)))
  assert size(12, True) < 1.05 * size(4, True)
  assert size(12, False) > 2 * size(4, False)


def test_what_is_computed_again_need_not_be_kept():
  config = vit.config('tiny', num_layers=4, d_model=64, d_ff=256)

  def kept(remat):
    model = models.build(config, Execution(True, remat))
    held = stacked_shapes(model)
    residuals = jax.eval_shape(lambda p: jax.vjp(
        lambda p: objective_value(model, config, p), p)[1], held)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))

  def objective_value(model, config, params):
    return jnp.square(model.apply(params, batch(config), train=True, key=None)[0]).mean()

  assert list(REMAT) == ['none', 'dots', 'sent', 'full']
  assert kept('none') > kept('dots') > kept('sent') == kept('full')   # on one device none is sent


@pytest.mark.parametrize('remat', ['dots', 'sent', 'full'])
def test_what_routers_sort_is_kept_and_not_sorted_again(remat):
  def sorts(remat):
    config = CONFIGS['t5']
    model = models.build(config, Execution(True, remat))
    held = stacked_shapes(model)
    text = jax.jit(objective(model, config)).lower(held).as_text()
    return len(re.findall(r'chlo.top_k|stablehlo.sort', text))
  assert sorts(remat) == sorts('none') >= 3   # expert choice, top-k and its placing


@pytest.mark.parametrize('dispatch', ['gather', 'grouped'])
def test_matmuls_of_experts_are_kept_as_those_of_dense_layers_are(dispatch):
  """`dots` computes no matmul with weights again: attention's two have none."""
  def matmuls(remat):
    config = vit.config('tiny', num_layers=2, moe=MoEConfig(
        layers='every_2', num_experts=4, router='top_k', group_size=8, dispatch=dispatch))
    model = models.build(config, Execution(False, remat))
    text = jax.jit(objective(model, config)).lower(model.shapes).as_text()
    return len(re.findall('stablehlo.dot_general', text))
  attention_again = 2 * 2
  assert matmuls('none') < matmuls('dots') <= matmuls('none') + attention_again
  assert matmuls('full') >= matmuls('dots') + 2 * 4 + 2 * 2   # projections and MLPs of two blocks


def test_an_unknown_policy_is_refused():
  with pytest.raises(ConfigError, match="config.execution.remat: got 'ful'.*'full'"):
    Execution(remat='ful')


@pytest.mark.parametrize('scan', [False, True])
def test_a_vit_with_fused_attention_is_the_same_vit(scan, monkeypatch):
  config = CONFIGS['vit']
  plain = models.build(config, Execution(scan=scan))
  fused = models.build(config, Execution(scan=scan, attention='fused'))
  params = stacked(random_params(plain.shapes), plain)
  (a, _), grads = jax.jit(objective(plain, config))(params)
  (b, _), fused_grads = jax.jit(objective(fused, config))(params)
  assert float(a) == pytest.approx(float(b), rel=1e-5)
  grads, fused_grads = trees.flatten(grads), trees.flatten(fused_grads)
  assert grads.keys() == fused_grads.keys()
  for path, grad in grads.items():
    # The true gradient of a key's bias is 0: what there is of it is rounding.
    atol = 1e-5 if '/k/bias' in path else 1e-4 * np.abs(grad).max()
    np.testing.assert_allclose(fused_grads[path], grad, atol=atol, rtol=0, err_msg=path)
  calls, kernel = [], attention.fused
  monkeypatch.setattr(attention, 'fused', lambda *qkv: calls.append(1) or kernel(*qkv))
  for model, blocks in ((plain, 0), (fused, 3 if scan else 5)):
    jax.eval_shape(lambda p, model=model: model.apply(p, batch(config)), params)
    assert len(calls) == blocks


def test_where_fused_attention_cannot_be():
  with pytest.raises(ConfigError, match=r"config\.execution\.attention: got 'fused'.*T5"):
    models.build(CONFIGS['t5'], Execution(attention='fused'))
