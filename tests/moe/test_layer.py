"""The MoE layer as a whole. B batch, L length, D model, F ffn, E experts, C capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.moe.layer import MoEConfig, MoELayer

from . import experts
from .layer import ROOM, D, build, close, same_experts, tokens, without_compiling

LONE = [
    dict(router='expert_choice'), dict(router='expert_choice', renormalize=True),
    dict(router='top_k', k=1), dict(router='top_k', k=1, score='softmax_of_chosen'),
    dict(router='top_k', k=1, score='sigmoid', renormalize=True, bias_rate=0.1),
    dict(router='top_k', k=1, batch_priority=True, order='token'), dict(router='top_p', k=1),
    dict(router='norm', k=1, renormalize=True)]


@pytest.mark.parametrize('router, dispatch', [
    *((router, 'gather') for router in LONE), *((LONE[i], 'einsum') for i in (0, 2)),
    *((LONE[i], 'grouped') for i in (0, 2, 4, 6))], ids=str)
def test_one_expert_is_the_dense_mlp_forward_and_backward(router, dispatch):
  """With every router and score whose weight is then 1: all but a sigmoid that is left as it is."""
  run, params = build(1, capacity_factor=1.0, dispatch=dispatch, **router)
  x, mask = tokens(padding=0.3)
  real = mask[..., None]

  def sparse(params, x):
    y, _ = run(params, x, mask, train=True)
    return jnp.sum(jnp.sin(y)), y

  def dense(weights, x):
    y = jnp.where(real, experts.mlp(weights, x), 0.0)
    return jnp.sum(jnp.sin(y)), y

  differentiate = lambda f: jax.value_and_grad(f, argnums=(0, 1), has_aux=True)
  (_, y), (gp, gx) = without_compiling(differentiate(sparse), params, x)
  (_, want), (gw, want_gx) = without_compiling(differentiate(dense), params['experts'], x)
  close((y, gx, gp['experts']), (want, want_gx, gw))
  for leaf in jax.tree.leaves(gp.get('router', {})):   # a softmax of one has nothing to learn
    assert np.abs(leaf).max() < 1e-6


@pytest.mark.parametrize('settings', [
  dict(renormalize=True, eval_capacity_factor=1.0), dict(ROOM, renormalize=True),
  dict(ROOM),    # C = S: the whole softmax
  dict(ROOM, router='top_k', renormalize=True), dict(ROOM, router='top_k', k=4)], ids=str)
def test_identical_experts_with_weights_that_sum_to_one_are_the_mlp(settings):
  """Wherever a token has an expert."""
  run, params = build(4, scale=3.0, **settings)
  params = same_experts(params)
  x, mask = tokens(B=6, L=8, padding=0.2)
  y, aux = run(params, x, mask)
  held = np.abs(y).max(-1, keepdims=True) > 0
  assert (np.asarray(mask)[..., None] & ~held).sum() == aux['unchosen']
  assert (aux['unchosen'] > 0) == (settings['eval_capacity_factor'] == 1.0)
  close(y, jnp.where(held, experts.mlp(params['experts'], x), 0.0))


def test_dropped_tokens_are_exactly_zero():
  """And training has a capacity of its own: C = 0.5 * 8 / 4 = 1, in evaluation 4."""
  run, params = build(4, router='top_k', k=1, capacity_factor=0.5, eval_capacity_factor=2.0)
  x, mask = tokens(B=2, L=8)
  x = x.at[..., 0].set(1.0)
  params['router'] = {'kernel': jnp.zeros((D, 4)).at[0, 0].set(1.0)}   # all tokens choose expert 0

  def total(x):
    y, aux = run(params, x, mask, train=True)
    return jnp.sum(y), (y, aux)
  grad, (y, aux) = jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(x))
  assert (np.abs(y[:, 0]).max(-1) > 0).all()
  np.testing.assert_array_equal(y[:, 1:], 0)
  assert aux['dropped'] == 14 and aux['assigned'] == 16 and aux['unchosen'] == 14
  np.testing.assert_array_equal(aux['load'], [2, 0, 0, 0])
  np.testing.assert_array_equal(grad[:, 1:], 0)
  assert run(params, x, mask, train=False)[1]['load'].sum() == 8


@pytest.mark.parametrize('router, dispatch', [
  (dict(), 'gather'), *((dict(router='top_k', balance_weight=0.1), name)
                        for name in ('gather', 'einsum', 'grouped'))], ids=str)
def test_padding_neither_gives_nor_takes(router, dispatch):
  """Its content changes no output, loss or gradient; its own output and gradient are exactly 0."""
  run, params = build(4, dispatch=dispatch, capacity_factor=1.0, group_size=12, z_weight=0.1,
                      **router)
  x, mask = tokens(padding=0.4)
  mask = mask.at[2:].set(False)                       # a group of filler examples
  other = jnp.where(mask[..., None], x, 50.0 * tokens(seed=9)[0])

  def total(params, x):
    y, aux = run(params, x, mask, train=True)
    losses = sum(v for name, v in aux.items() if name.endswith('_loss'))
    return jnp.sum(jnp.sin(y)) + losses, (y, aux)

  differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  first, second = differentiate(params, x), differentiate(params, other)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(second))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), first, second)
  (_, (y, _)), (_, gx) = jax.tree.map(np.asarray, second)
  mask = np.asarray(mask)
  np.testing.assert_array_equal(y[~mask], 0)
  np.testing.assert_array_equal(gx[~mask], 0)


def test_router_logits_are_not_rounded_when_the_input_is():
  # z = sum over 24 tokens of logsumexp^2 of two equal logits l = 1 + 2**-10: (l + ln 2)^2.
  run, params = build(2, router='top_k', k=2, **ROOM)
  params['router']['kernel'] = jnp.zeros((D, 2)).at[0].set(1.0 + 2.0**-10)
  x, mask = tokens()
  aux = run(params, x.astype(jnp.bfloat16).at[..., 0].set(1.0), mask)[1]
  np.testing.assert_allclose(aux['z'], 24 * (1 + 2.0**-10 + np.log(2))**2, rtol=1e-6)


def test_auxiliary_losses_train_the_router_alone_and_telemetry_nothing():
  run, params = build(4, router='top_k', k=2, balance_weight=0.01, z_weight=0.001)
  x, mask = tokens()

  def totals(params):
    aux = run(params, x, mask, train=True)[1]
    return jnp.stack([aux['balance_loss'], aux['z_loss'], sum(
        jnp.sum(v) for name, v in aux.items() if not name.endswith('_loss'))])

  grads = jax.jit(jax.jacrev(totals))(params)
  assert (np.abs(grads['router']['kernel'][:2]).max((1, 2)) > 1e-6).all()   # of each loss
  assert np.abs(grads['router']['kernel'][2]).max() == 0                    # of telemetry
  assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(grads['experts']))


def test_router_initialisation():
  config = MoEConfig(num_experts=64, router_init_std=0.02)
  layer = MoELayer(config, 64, experts.Experts(64, 128, 1), None, 128, rngs=nnx.Rngs(0))
  kernel = np.asarray(nnx.to_pure_dict(nnx.state(layer, nnx.Param))['router']['kernel'])
  assert kernel.shape == (128, 64) and kernel.dtype == np.float32
  assert kernel.std() == pytest.approx(0.02, rel=0.05) and abs(kernel.mean()) < 1e-3


@pytest.mark.parametrize('group_size, words', [(8, ['group_size', '8', '6']), (4, ['group_size']),
                                               (18, ['4', '3'])])
def test_groups_that_do_not_divide_are_refused(group_size, words):
  run, params = build(4, group_size=group_size)
  with pytest.raises(ConfigError) as error:
    run(params, *tokens(B=4, L=6))
  for word in words:
    assert word in str(error.value)
