"""The MoE layer as a whole. B batch, L length, D model, F ffn, E experts, C capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.config import ConfigError
from moejax.moe import balance, placement, routing
from moejax.moe.layer import MoEConfig, MoELayer

from . import experts
from .layer import ROOM, D, build, close, gradient, same_experts, tokens, without_compiling

ROUTERS = [dict(router='expert_choice'), dict(router='top_k', k=2)]
BOTH = pytest.mark.parametrize('router', ROUTERS, ids=lambda r: r['router'])

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


@pytest.mark.parametrize('router', [
  dict(router='expert_choice', renormalize=True),
  dict(router='expert_choice'),    # C = S: the whole softmax
  dict(router='top_k', k=2, renormalize=True), dict(router='top_k', k=4),
  dict(router='top_k', k=4, dispatch='einsum')], ids=str)
def test_identical_experts_with_weights_that_sum_to_one_are_the_mlp(router):
  run, params = build(4, scale=3.0, **ROOM, **router)
  params = same_experts(params)
  x, mask = tokens(padding=0.2)
  y, aux = run(params, x, mask)
  close(y, jnp.where(mask[..., None], experts.mlp(params['experts'], x), 0.0))
  assert aux['dropped'] == 0 and aux['unchosen'] == 0


def test_renormalized_expert_choice_is_the_mlp_wherever_someone_chose_the_token():
  run, params = build(4, eval_capacity_factor=1.0, renormalize=True, scale=3.0)
  params = same_experts(params)
  x, mask = tokens(B=6, L=8)
  y, aux = run(params, x, mask)
  chosen = np.abs(np.asarray(y)).max(-1) > 0
  assert 0 < (~chosen).sum() == aux['unchosen']
  np.testing.assert_array_equal(np.asarray(y)[~chosen], 0)
  np.testing.assert_allclose(np.asarray(y)[chosen], experts.mlp(params['experts'], x)[chosen],
                             rtol=2e-5, atol=1e-6)


def test_raw_weights_shrink_identical_experts():
  """Without renormalisation top-1 scales the MLP by the router's probability, below 1."""
  run, params = build(4, router='top_k', k=1, **ROOM)
  params = same_experts(params)
  x, mask = tokens()
  probs = jax.nn.softmax(jnp.einsum('bld,de->ble', x, params['router']['kernel']))
  want = experts.mlp(params['experts'], x) * probs.max(-1, keepdims=True)
  close(run(params, x, mask)[0], want, 1e-5)


def lone_expert(params):
  """Router by which every token with x[0] > 0 prefers expert 0, then 1, 2, ..."""
  kernel = jnp.zeros_like(params['router']['kernel'])
  return params | {'router': {'kernel': kernel.at[0].set(-jnp.arange(kernel.shape[1]))}}


def test_dropped_tokens_are_exactly_zero():
  # C = 0.5 * 8 / 4 = 1: of each sequence only the first token finds room in expert 0.
  run, params = build(4, router='top_k', k=1, capacity_factor=0.5, eval_capacity_factor=2.0)
  params = lone_expert(params)
  x, mask = tokens(B=2, L=8)
  x = x.at[..., 0].set(1.0)

  def total(x):
    y, aux = run(params, x, mask, train=True)
    return jnp.sum(y), (y, aux)
  grad, (y, aux) = jax.tree.map(np.asarray, jax.jit(jax.grad(total, has_aux=True))(x))
  assert (np.abs(y[:, 0]).max(-1) > 0).all()
  np.testing.assert_array_equal(y[:, 1:], 0)
  assert aux['dropped'] == 14 and aux['assigned'] == 16 and aux['unchosen'] == 14
  np.testing.assert_array_equal(aux['load'], [2, 0, 0, 0])
  np.testing.assert_array_equal(grad[:, 1:], 0)


def test_train_and_eval_capacity_are_separate():
  run, params = build(4, router='top_k', k=1, capacity_factor=0.5, eval_capacity_factor=2.0)
  params = lone_expert(params)
  x, mask = tokens(B=2, L=8)
  x = x.at[..., 0].set(1.0)
  # C = 1 in training, 4 in evaluation.
  assert run(params, x, mask, train=True)[1]['load'].sum() == 2
  assert run(params, x, mask, train=False)[1]['load'].sum() == 8


def test_padding_takes_no_capacity():
  # Padding first in the sequence would fill expert 0's two slots (C = 1.0 * 8 / 4).
  run, params = build(4, router='top_k', k=1, eval_capacity_factor=1.0)
  params = lone_expert(params)
  x, _ = tokens(B=1, L=8)
  x = x.at[..., 0].set(1.0)
  mask = jnp.asarray([[False] * 5 + [True] * 3])
  y, aux = run(params, x, mask)
  np.testing.assert_array_equal(np.abs(y[0]).max(-1) > 0, [False] * 5 + [True, True, False])
  assert aux['tokens'] == 3 and aux['assigned'] == 3 and aux['dropped'] == 1


@pytest.mark.parametrize('router, dispatch', [
  (ROUTERS[0], 'gather'), (ROUTERS[1], 'gather'), (ROUTERS[1], 'einsum')], ids=str)
def test_padding_neither_gives_nor_takes(router, dispatch):
  """Its content changes no output, loss or gradient; its own output and gradient are exactly 0."""
  weights = {} if router['router'] == 'expert_choice' else dict(balance_weight=0.1)
  run, params = build(4, dispatch=dispatch, capacity_factor=1.0, group_size=12, z_weight=0.1,
                      **weights, **router)
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


@BOTH
def test_permuting_experts_permutes_everything(router):
  run, params = build(4, capacity_factor=1.0, **router)
  x, mask = tokens(padding=0.2)
  order = np.array([2, 0, 3, 1])
  permuted = {'router': {'kernel': params['router']['kernel'][:, order]},
              'experts': jax.tree.map(lambda w: w[order], params['experts'])}

  def objective(params):
    y, aux = run(params, x, mask, train=True)
    return jnp.sum(jnp.sin(y)), (y, aux)

  both = jax.jit(jax.value_and_grad(objective, has_aux=True))
  ((_, (y, aux)), grads), ((_, (py, paux)), pgrads) = both(params), both(permuted)
  close(py, y)
  assert len(set(np.asarray(aux['load']).tolist())) > 1 or router['router'] == 'expert_choice'
  close(paux, aux | {name: aux[name][order] for name in ('load', 'asked') if name in aux}, 1e-5)
  close(pgrads['experts'], jax.tree.map(lambda w: w[order], grads['experts']))
  close(pgrads['router']['kernel'], grads['router']['kernel'][:, order], 1e-5)


@BOTH
@pytest.mark.parametrize('group_size', [6, 12])
def test_groups_do_not_see_each_other_and_their_sums_add_up(router, group_size):
  run, params = build(4, capacity_factor=1.0, group_size=group_size, **router)
  x, mask = tokens(B=4, L=6, padding=0.2)
  y, aux = run(params, x, mask, train=True)
  halves = [run(params, x[rows], mask[rows], train=True) for rows in (slice(0, 2), slice(2, 4))]
  close(y, jnp.concatenate([h[0] for h in halves]))
  close(aux, jax.tree.map(jnp.add, halves[0][1], halves[1][1]), 1e-5)


@BOTH
def test_group_size_decides_who_competes(router):
  x, mask = tokens(B=4, L=6)
  outputs = []
  for group_size in (0, 6, 12, 24):   # of 0 each sequence is a group
    run, params = build(4, capacity_factor=1.0, group_size=group_size, **router)
    outputs.append(run(params, x, mask, train=True)[0])
  np.testing.assert_array_equal(outputs[0], outputs[1])
  assert np.abs(outputs[1] - outputs[2]).max() > 1e-3
  assert np.abs(outputs[2] - outputs[3]).max() > 1e-3


def test_top_k_with_room_for_all_is_causal():
  run, params = build(4, router='top_k', k=2, scale=3.0, **ROOM)
  x, mask = tokens(B=1, L=6)
  jacobian = jax.jit(jax.jacobian(lambda x: run(params, x, mask)[0].sum(-1)))(x)
  jacobian = np.asarray(jacobian)[0, :, 0]                                # (L, L, D)
  influence = np.abs(jacobian).max(-1)
  np.testing.assert_array_equal(influence[np.triu_indices(6, 1)], 0)
  assert (np.diag(influence) > 0).all()


def test_expert_choice_is_not_causal():
  """Why it is refused in decoders: a later token can take an earlier one's place."""
  run, params = build(4, scale=3.0, eval_capacity_factor=1.0)
  x, mask = tokens(B=6, L=8)
  later = x.at[:, 3:].multiply(-5.0)
  assert np.abs(run(params, later, mask)[0][:, :3] - run(params, x, mask)[0][:, :3]).max() > 1e-3


def test_router_is_float32_under_bfloat16_input():
  # Expert 1 leads by 2**-10 in its kernel, which bfloat16 (8 bits) would round away to a tie.
  run, params = build(2, router='top_k', k=1, **ROOM)
  kernel = jnp.zeros((D, 2)).at[0].set(jnp.asarray([1.0, 1.0 + 2.0**-10]))
  params['router']['kernel'] = kernel
  x, mask = tokens()
  y, aux = run(params, jnp.abs(x).astype(jnp.bfloat16).at[..., 0].set(1.0), mask)
  np.testing.assert_array_equal(aux['load'], [0, 24])
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in aux.values())


def test_router_logits_are_not_rounded_when_the_input_is():
  # z = sum over 24 tokens of logsumexp^2 of two equal logits l = 1 + 2**-10: (l + ln 2)^2.
  run, params = build(2, router='top_k', k=2, **ROOM)
  params['router']['kernel'] = jnp.zeros((D, 2)).at[0].set(1.0 + 2.0**-10)
  x, mask = tokens()
  aux = run(params, x.astype(jnp.bfloat16).at[..., 0].set(1.0), mask)[1]
  np.testing.assert_allclose(aux['z'], 24 * (1 + 2.0**-10 + np.log(2))**2, rtol=1e-6)


@pytest.mark.parametrize('settings', [
  dict(router='top_k', score='sigmoid', renormalize=True, dispatch='grouped'),
  dict(router='top_p', p=0.7, dispatch='einsum'), dict(router='expert_choice')], ids=str)
def test_bfloat16_routes_as_float32_and_computes_close_to_it(settings):
  run, params = build(4, scale=2.0, capacity_factor=1.0, **settings)
  x, mask = tokens(padding=0.2)
  x = x.astype(jnp.bfloat16)
  y, aux = run(params, x, mask, train=True)
  want, want_aux = run(params, x.astype(jnp.float32), mask, train=True)
  jax.tree.map(np.testing.assert_array_equal, aux, want_aux)   # the same logits, to the last bit
  assert y.dtype == jnp.bfloat16
  # From x to y there are a dozen roundings in a row, of weights and of values, by 2**-9 each.
  close(y.astype(jnp.float32), want, 12 * 2.0**-9)


def test_losses_by_hand():
  """Logits log(2, 1, 1) and log(1, 1, 6) for one-hot tokens show each step of the loss."""
  run, params = build(3, router='top_k', k=1, balance_weight=0.5, z_weight=0.25, **ROOM)
  kernel = jnp.zeros((D, 3)).at[0].set(jnp.log(jnp.asarray([2., 1., 1.])))
  params['router']['kernel'] = kernel.at[1].set(jnp.log(jnp.asarray([1., 1., 6.])))
  a, b = jnp.eye(D)[0], jnp.eye(D)[1]
  x = jnp.stack([jnp.stack([a, a, b, b]), jnp.stack([a, b, a, a])])
  mask = jnp.asarray([[True, True, True, False], [True, False, False, False]])
  aux = run(params, x, mask)[1]
  # Row 0: p = (1/2 + 1/2 + 1/8, 1/4 + 1/4 + 1/8, 1/4 + 1/4 + 3/4) / 3 = (9, 5, 10) / 24,
  # f = (2/3, 0, 1/3): 3 * (18 + 10) / 72 = 7/6, times 3 tokens 7/2.
  # Row 1: f = (1, 0, 0), p0 = 1/2: 3/2, times 1 token. Together 5.
  np.testing.assert_allclose(aux['balance'], 5, rtol=1e-5)
  np.testing.assert_allclose(aux['balance_loss'], 2.5, rtol=1e-5)
  z = 3 * np.log(4)**2 + np.log(8)**2
  np.testing.assert_allclose(aux['z'], z, rtol=1e-5)
  np.testing.assert_allclose(aux['z_loss'], z / 4, rtol=1e-5)
  # Entropy of (1/2, 1/4, 1/4) is 3/2 ln 2; of (1/8, 1/8, 3/4): 2/8 ln 8 + 3/4 ln 4/3.
  entropy = 3 * 1.5 * np.log(2) + np.log(8) / 4 + 0.75 * np.log(4 / 3)
  np.testing.assert_allclose(aux['entropy'], entropy, rtol=1e-5)
  np.testing.assert_array_equal(aux['load'], [3, 0, 1])


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


@pytest.mark.parametrize('router', [*ROUTERS, dict(router='top_k', k=1),
                                    dict(router='expert_choice', renormalize=True)], ids=str)
def test_the_task_alone_trains_router_and_experts(router):
  run, params = build(4, capacity_factor=2.0, **router)
  x, mask = tokens(B=8)
  grads = gradient(lambda p: jnp.sum(jnp.sin(run(p, x, mask, train=True)[0])))(params)
  assert np.abs(grads['router']['kernel']).max() > 1e-3
  for leaf in jax.tree.leaves(grads['experts']):
    assert (np.abs(leaf).reshape(4, -1).max(-1) > 0).all()


def test_layer_follows_its_router_and_losses():
  """The layer is its parts: routing of its logits, and the losses of its routing before drops."""
  run, params = build(4, router='top_k', k=2, capacity_factor=0.5)
  x, mask = tokens(padding=0.2)
  aux = run(params, x, mask, train=True)[1]
  logits = jnp.einsum('bld,de->ble', x, params['router']['kernel'])
  chosen = routing.top_k(logits, mask, 2)
  each = balance.load_balance(jax.nn.softmax(logits), chosen, mask)
  np.testing.assert_allclose(aux['balance'], jnp.sum(each * mask.sum(1)), rtol=1e-5)
  slots = placement.place(chosen, 4, routing.expert_capacity(6, 4, 0.5))
  np.testing.assert_array_equal(aux['load'], slots.valid.sum((0, 2)))
  assert aux['dropped'] > 0


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
