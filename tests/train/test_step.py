"""The train step by hand, on a model of one weight and one router, then on a ViT.

Toy: logits (w x, 0), so at w = 0 every loss is ln 2 and the gradient with respect to w is -x/2 for
label 0 and +x/2 for label 1. Its router r has the balance loss r * y, summed over real examples.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses, models
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.train import metrics, optimizer
from moejax.train.step import (
  StepSettings,
  auxiliary_loss,
  make_train_step,
  split,
)
from tests.models.helpers import random_params
from tests.train import small

LN2 = np.log(2)
SGD = optimizer.OptimizerConfig(name='sgd', clip_norm=0.0)
LAYER = 'encoder/layers/00'


def apply(params, batch, *, train, key):
  assert train
  w, r = params['w'], params['encoder']['layers']['00']['moe']['router']['kernel']
  x, real = batch['x'], (batch['weight'] > 0).astype(jnp.float32)
  logits = jnp.stack([w[0] * x, jnp.zeros_like(x)], -1)
  aux = {'tokens': real.sum(), 'balance_loss': (r[0, 0] * batch['y'] * real).sum(),
         'noise': jax.random.uniform(key) * real.sum()}
  return logits, {LAYER: jax.lax.stop_gradient(aux) | {'balance_loss': aux['balance_loss']}}


TOY = types.SimpleNamespace(
    apply=apply, token_counts=lambda batch: {'encoder': (batch['weight'] > 0).sum()})


def toy_state(step=0, r=0.0):
  router = {'layers': {'00': {'moe': {'router': {'kernel': jnp.full((1, 1), r)}}}}}
  params = {'w': jnp.zeros(1), 'encoder': router}
  return small.state(SGD, params, step)


def router(params):
  return float(params['encoder']['layers']['00']['moe']['router']['kernel'][0, 0])


# Six real examples and two fillers. Rows 0, 2, 4, 6 make one microbatch of two, with 3 real ones;
# of four microbatches (rows 0 and 4, ...) one has a single real row.
BATCH = {'x': jnp.array([2., 4., 8., -2., 6., 10., 99., 99.]),
         'y': jnp.array([6., 0., 3., 9., 0., 6., 99., 99.]),
         'label': jnp.array([0, 0, 1, 1, 1, 0, 0, 0]),
         'weight': jnp.array([1., 1., 1., 1., 1., 1., 0., 0.])}
# -(2 + 4 + 10)/2 + (8 - 2 + 6)/2 = -8 + 6 = -2 over six examples; and (6 + 3 + 9 + 6)/6 = 4.
GRAD_W, GRAD_R = -2 / 6, 4.0


@functools.cache
def compiled(config, lr, reduce=lambda x: x, **settings):
  return jax.jit(make_train_step(TOY, StepSettings(config, lr, **settings), reduce))


def half(step):
  return jnp.float32(0.5)


def step(state, batch=BATCH, config=SGD, lr=half, **kwargs):
  return compiled(config, lr, **kwargs)(state, batch)


def test_one_step_by_hand():
  state, objective = step(toy_state(r=0.25))
  assert float(state.params['w'][0]) == pytest.approx(-0.5 * GRAD_W, rel=1e-6)
  assert router(state.params) == pytest.approx(0.25 - 0.5 * GRAD_R, rel=1e-6)
  # The objective adds the balance loss, 0.25 * 24 / 6 = 1; the reported loss does not.
  assert float(objective) == pytest.approx(LN2 + 1, rel=1e-6)
  assert int(state.step) == 1
  seen = metrics.trees.flatten(state.window)
  assert float(seen['loss']) == pytest.approx(6 * LN2, rel=1e-6)
  assert float(seen['aux_loss']) == pytest.approx(1, rel=1e-6)
  assert float(seen['grad_norm']) == pytest.approx(np.hypot(GRAD_W, GRAD_R), rel=1e-6)
  # At w = 0 the logits tie and class 0 wins: the first two and the sixth are right.
  assert (seen['correct'], seen['weight'], seen['steps']) == (3, 6, 1)
  assert seen[f'layers/{LAYER}/tokens'] == 6
  assert float(seen[f'layers/{LAYER}/router_grad_norm']) == pytest.approx(4, rel=1e-6)
  assert not any('balance_loss' in path for path in seen)   # in aux_loss already


@pytest.mark.parametrize('microbatches', [2, 4])
def test_accumulation_is_no_accumulation_with_unequal_token_counts(microbatches):
  whole, cut = step(toy_state(r=0.25)), step(toy_state(r=0.25), microbatches=microbatches)
  for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_windows_add_up():
  first, _ = step(toy_state())
  both, _ = step(first)
  assert both.window['steps'] == 2 and both.window['weight'] == 12
  alone, _ = step(dataclasses.replace(first, window={}))
  for a, b, c in zip(*map(jax.tree.leaves, (first.window, alone.window, both.window)), strict=True):
    np.testing.assert_allclose(a + b, c, rtol=1e-6)


def test_a_batch_of_fillers_only_changes_nothing():
  state, objective = step(toy_state(r=0.25), BATCH | {'weight': jnp.zeros(8)})
  assert float(objective) == 0 and router(state.params) == 0.25


def test_learning_rate_reads_the_global_step():
  """Update n has rate 0.5 at step 3 and 4 at step 10, whatever the counts in the slots."""
  lr = lambda step: jnp.where(step == 3, 0.5, jnp.where(step == 10, 4.0, jnp.nan))
  for at, rate in ((3, 0.5), (10, 4.0)):
    state, _ = step(toy_state(at), lr=lr)
    assert int(state.step) == at + 1
    assert float(state.params['w'][0]) == pytest.approx(-rate * GRAD_W, rel=1e-6)


def test_noise_follows_the_step_and_the_key():
  noise = lambda state: float(state.window['layers']['encoder']['layers']['00']['noise']) / 6
  expected = lambda at: jax.random.uniform(jax.random.fold_in(jax.random.key(0), at))
  for at in (0, 7):
    state, _ = step(toy_state(at))
    assert noise(state) == pytest.approx(float(expected(at)), rel=1e-6)
    np.testing.assert_array_equal(state.key, toy_state().key)
  assert expected(0) != expected(7)


# A gradient of length 5: x of label 0 sums to 6, so -6/2 = -3; y sums to 4; one example.
THREE_FOUR = {'x': jnp.array([6.]), 'y': jnp.array([4.]), 'label': jnp.array([0]),
              'weight': jnp.array([1.])}


@pytest.mark.parametrize('devices', [1, 2])
def test_clipping_comes_after_the_reduction(devices):
  """Devices that see the same example double sums and counts; the mean gradient stays (-3, 4).

  Clipped to 1 it is (-0.6, 0.8). Each of two devices has half of it, length 2.5: clipped before the
  reduction, the sum would have length 2.
  """
  config = dataclasses.replace(SGD, clip_norm=1.0)
  reduce = lambda tree: jax.tree.map(lambda x: devices * x, tree)
  state, _ = step(toy_state(), THREE_FOUR, config, lambda step: jnp.float32(1), reduce=reduce)
  assert float(state.params['w'][0]) == pytest.approx(0.6, rel=1e-6)
  assert router(state.params) == pytest.approx(-0.8, rel=1e-6)
  assert float(state.window['grad_norm']) == pytest.approx(5, rel=1e-6)   # before clipping
  layer = state.window['layers']['encoder']['layers']['00']
  assert float(layer['router_grad_norm']) == pytest.approx(0.8, rel=1e-6)  # after
  assert state.window['steps'] == 1 and state.window['weight'] == devices


def test_a_stack_without_a_loss_does_not_dilute_that_of_the_other():
  """Both stacks are sparse; the mean is over the decoder's layer, which alone has weights."""
  moe = MoEConfig(layers='0', num_experts=4, router='top_k')
  model = models.build(t5.config('tiny', encoder_moe=moe, decoder_moe=dataclasses.replace(
      moe, balance_weight=1.0, z_weight=1.0)))
  ones = jnp.ones((2, 4), jnp.int32)
  batch = {'encoder_input': ones, 'decoder_input': ones, 'weight': jnp.ones((2, 4))}
  _, aux = jax.jit(model.apply)(random_params(model.shapes), batch)
  layer = aux['decoder/layers/00']
  total = auxiliary_loss(aux, {'encoder': 8, 'decoder': 8})
  np.testing.assert_allclose(total, (layer['balance'] + layer['z']) / 8, rtol=1e-6)
  assert aux['encoder/layers/00']['balance'] > 0


def test_auxiliary_loss_by_hand():
  """Means over tokens, then over the layers that have the loss, then the two kinds added.

  balance: (6/4 + 2/4) / 2 = 1. z: (3/4 + 5/4 + 10/5) / 3 = 4/3.
  """
  aux = {'encoder/layers/01': {'balance_loss': 6., 'z_loss': 3., 'z': 999., 'balance': 999.},
         'encoder/layers/03': {'balance_loss': 2., 'z_loss': 5.},
         'decoder/layers/01': {'z_loss': 10., 'tokens': 999.}}
  tokens = {'encoder': 4., 'decoder': 5., 'loss': 7.}
  assert float(auxiliary_loss(aux, tokens)) == pytest.approx(1 + 4 / 3)
  aux['decoder/layers/01'] |= {'importance_loss': 3., 'loss': 99.}   # every loss by itself
  assert float(auxiliary_loss(aux, tokens)) == pytest.approx(1 + 4 / 3 + 3 / 5)
  assert float(auxiliary_loss({}, tokens)) == 0
  assert float(auxiliary_loss({'encoder/layers/01': {'z': 9.}}, tokens)) == 0


SMOOTH = losses.TaskConfig(label_smoothing=0.25, z_loss=0.5)


@pytest.mark.parametrize('microbatches', [1, 4])
def test_the_task_is_trained_on_and_cross_entropy_reported(microbatches):
  """At w = 0 both logits are 0: log(Z) = ln 2, and soft targets (3/4, 1/4) cost ln 2 as well.

  Gradients of one logit: p - q = 1/2 - 3/4 where its label is 0, 1/2 - 1/4 else; half of before.
  The z-loss adds 0.5 * 2 ln 2 * p = ln(2) / 2 for any label.
  """
  state, objective = step(toy_state(r=0.25), task=SMOOTH, microbatches=microbatches)
  window = state.window
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
  task_objective = LN2 - entropy + 0.5 * LN2**2
  assert float(window['loss'] / window['weight']) == pytest.approx(LN2, rel=1e-6)
  assert float(window['task_objective']) == pytest.approx(task_objective, rel=1e-5)
  assert float(window['aux_loss']) == pytest.approx(1, rel=1e-6)
  assert float(objective) == float(window['objective']) == pytest.approx(
      task_objective + 1, rel=1e-6)
  grad_w = GRAD_W / 2 + LN2 / 2 * 28 / 6   # x sums to 28
  assert float(state.params['w'][0]) == pytest.approx(-0.5 * grad_w, rel=1e-5)


def test_distillation_reads_the_teacher_of_its_own_examples():
  """Teacher logits are cut and dealt with the batch; here the student is all it says but one."""
  task = losses.TaskConfig(distill_weight=1.0, teacher='/a/run')
  teacher = jnp.zeros((8, 2)).at[2, 0].set(np.log(3))   # (3/4, 1/4); x = 8
  for microbatches in (1, 4):
    state, objective = step(toy_state(), BATCH | {'teacher_logits': teacher}, task=task,
                            microbatches=microbatches)
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    assert float(objective) == pytest.approx(kl / 6, rel=1e-5)
    assert float(state.params['w'][0]) == pytest.approx(0.5 * (0.25 * 8 / 6), rel=1e-5)
    assert float(state.window['loss']) == pytest.approx(6 * LN2, rel=1e-6)
    assert float(state.window['teacher_agreement']) == 6   # class 0 wins ties


def test_a_frozen_leaf_stands_still_and_counts_for_nothing():
  config = dataclasses.replace(SGD, freeze='router', clip_norm=0.1)
  state, _ = step(toy_state(r=0.25), config=config)
  assert router(state.params) == 0.25
  # Clipped by its own norm of 1/3, not by that of both gradients, which is 4.
  assert float(state.window['grad_norm']) == pytest.approx(-GRAD_W, rel=1e-6)
  assert float(state.params['w'][0]) == pytest.approx(0.5 * 0.1, rel=1e-6)
  assert 'router_grad_norm' not in state.window['layers']['encoder']['layers']['00']
  assert float(state.window['aux_loss']) == pytest.approx(1, rel=1e-6)   # still measured


def test_no_gradient_of_a_frozen_leaf_is_computed():
  @jax.custom_vjp
  def costly(r):
    return r

  def backward(*_):
    raise AssertionError('the backward pass of a frozen leaf was traced')
  costly.defvjp(lambda r: (r, None), backward)

  def run(params, batch, *, train, key):
    kernel = params['encoder']['layers']['00']['moe']['router']['kernel']
    kernel = {'encoder': {'layers': {'00': {'moe': {'router': {'kernel': costly(kernel)}}}}}}
    return apply(params | kernel, batch, train=train, key=key)
  model = types.SimpleNamespace(apply=run, token_counts=TOY.token_counts)
  frozen = dataclasses.replace(SGD, freeze='router')
  make_train_step(model, StepSettings(frozen, half))(toy_state(), BATCH)
  with pytest.raises(AssertionError, match='backward'):
    make_train_step(model, StepSettings(SGD, half))(toy_state(), BATCH)


@pytest.mark.parametrize('microbatches, freeze', [(1, ''), (2, 'router')])
def test_the_outline_has_the_shapes_of_a_step(microbatches, freeze):
  moe = MoEConfig(layers='0', num_experts=4, router='top_k', bias_rate=0.1, balance_weight=0.5,
                  score='sigmoid')
  model = models.build(vit.config('tiny', num_layers=1, moe=moe))
  adamw = optimizer.OptimizerConfig(freeze=freeze)
  state = jax.eval_shape(lambda params: small.state(adamw, params), model.shapes)
  settings = StepSettings(adamw, half, microbatches=microbatches)
  whole, outline = (
      jax.eval_shape(make_train_step(model, settings, outline=flag), state, small.images(4))
      for flag in (False, True))
  assert outline == whole and ('router_grad_norm' in str(whole)) == (not freeze)


def test_split_deals_whole_groups_in_turn():
  rows = {'a': jnp.arange(12), 'b': jnp.arange(24).reshape(12, 2)}
  parts = split(rows, 3, 2)
  # Groups of two rows: (0 1) (2 3) (4 5) (6 7) (8 9) (10 11), dealt to three parts.
  np.testing.assert_array_equal(parts['a'], [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
  np.testing.assert_array_equal(parts['b'][1], [[4, 5], [6, 7], [16, 17], [18, 19]])


def test_bfloat16_compute_keeps_a_float32_state_and_adds_the_balance_loss():
  moe = MoEConfig(layers='0', num_experts=4, router='top_k', balance_weight=0.5)
  config = vit.config('tiny', num_layers=1, dtype='bfloat16', moe=moe)
  model = models.build(config)
  params = random_params(model.shapes)
  adamw = optimizer.OptimizerConfig()
  state = small.state(adamw, params)
  train_step = jax.jit(make_train_step(model, StepSettings(adamw, lambda step: jnp.float32(1e-3))))
  new, objective = train_step(state, small.images(4))
  assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {
      np.dtype(t) for t in (np.float32, np.int32, np.uint32)}
  # Adam's first update is the rate times the gradient's sign: far below bfloat16's spacing of 1/256
  # at 1, so it survives only in float32.
  scale = lambda p: np.asarray(p['encoder']['final_norm']['scale'])
  moved = np.abs(scale(new.params) - scale(params))
  np.testing.assert_allclose(moved, 1e-3, rtol=2e-3)
  summary = metrics.summarize(new.window)
  assert summary['aux_loss'] == pytest.approx(0.5 * summary['moe/encoder/00/balance'], rel=1e-5)
  assert summary['aux_loss'] > 0.5   # 0.5 * 1 when balanced, more when not
  assert float(objective) == pytest.approx(summary['loss'] + summary['aux_loss'], rel=1e-5)
  assert summary['moe/encoder/00/router_grad_norm'] > 0
