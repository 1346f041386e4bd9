"""Every router with every dispatch against a plain NumPy layer, which shares no code with ours.

B batch, L length, D model, E experts, K choices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import config

from . import naive
from .layer import build, tokens, without_compiling

TOP = dict(router='top_k')
ROUTERS = {
    'expert_choice': {},
    'expert_choice renormalized': dict(renormalize=True),
    'top-1': dict(TOP, k=1),
    'top-2': TOP,
    'top-2 renormalized': dict(TOP, renormalize=True),
    'softmax of chosen': dict(TOP, score='softmax_of_chosen'),
    'sigmoid': dict(TOP, score='sigmoid'),
    'sigmoid, renormalized, scaled': dict(TOP, score='sigmoid', renormalize=True, weight_scale=2.5),
    'batch priority': dict(TOP, batch_priority=True),
    'sigmoid, batch priority': dict(TOP, score='sigmoid', batch_priority=True),
    'token order': dict(TOP, order='token'),
    'token order, batch priority': dict(TOP, order='token', batch_priority=True),
    'top-p': dict(router='top_p', k=3, p=0.6),
    'top-p renormalized': dict(router='top_p', k=2, p=0.9, renormalize=True),
    'norm': dict(router='norm', renormalize=True),
    'bias': dict(TOP, bias_rate=0.1),
    'bias, sigmoid': dict(TOP, score='sigmoid', bias_rate=0.1),
}
SITUATIONS = {
    'room': dict(factor=64.0),
    'drops': dict(factor=1.0),
    'padding and drops': dict(factor=1.0, padding=0.4),
    'one expert': dict(factor=1.0, E=1, padding=0.3),
    'one token': dict(factor=1.0, L=1),
    'two sequences a group': dict(factor=0.75, examples=2, padding=0.2),
    'every expert': dict(factor=64.0, k=4, padding=0.2),
    'bfloat16': dict(factor=1.0, padding=0.2, dtype=jnp.bfloat16),
}
# {(router, situation or test): why it cannot be there}.
NOT = {
    ('expert_choice', 'every expert'): 'has no k',
    ('expert_choice renormalized', 'every expert'): 'has no k',
    ('top-1', 'every expert'): 'k is 1',
    ('norm', 'bfloat16'): 'rounding may order the norms of outputs otherwise',
    # A router that never drops: (router, 'binds'); one that tells experts apart by their numbers:
    # (router, 'permuting').
}
EVERY = [(r, s) for r in ROUTERS for s in SITUATIONS if (r, s) not in NOT]
BINDING, PERMUTING = ([r for r in ROUTERS if (r, test) not in NOT] for test in (
    'binds', 'permuting'))


def dispatches(router, situation):
  """All three for 'padding and drops'; elsewhere gather, and einsum or grouped by turns.

  Dropless has no order in which tokens are placed.
  """
  others = ['einsum', 'grouped']
  if {'order', 'batch_priority'} & set(ROUTERS[router]):
    others.remove('grouped')
  if situation != 'padding and drops':
    turn = (list(ROUTERS).index(router) + list(SITUATIONS).index(situation)) % 2
    others = others[turn:turn + 1]
  return ['gather', *others]


@functools.cache
def made(router, situation, dispatch):
  """(config, E, params, x, mask, y, aux) of the layer under test."""
  settings, case = ROUTERS[router], SITUATIONS[situation]
  E, L = case.get('E', 4), case.get('L', 6)
  settings = dict(settings, dispatch=dispatch, capacity_factor=case['factor'],
                  group_size=case.get('examples', 1) * L)
  if 'k' in case or E == 1:
    settings |= dict(k=case.get('k', 1))
  run, params = build(E, scale=2.0, **settings)
  if settings.get('bias_rate'):
    bias = jnp.asarray(np.random.default_rng(5).normal(size=E), jnp.float32)
    params['router']['no_grad'] = {'bias': bias}
  x, mask = tokens(B=4, L=L, padding=case.get('padding', 0.0))
  x = x.astype(case.get('dtype', jnp.float32))
  y, aux = without_compiling(lambda: run(params, x, mask, train=True))
  return config.MoEConfig(num_experts=E, **settings), E, params, x, mask, y, aux


@pytest.mark.parametrize('router, situation', EVERY, ids=map(', '.join, EVERY))
def test_equals_plain_numpy(router, situation):
  n = SITUATIONS[situation].get('examples', 1)
  group = lambda a: np.asarray(a).reshape(len(a) // n, -1, *a.shape[2:])
  want = {}   # without capacity, or with
  for dispatch in dispatches(router, situation):
    settings, E, params, x, mask, y, aux = made(router, situation, dispatch)
    dropless = dispatch == 'grouped'
    if dropless not in want:
      bias = params.get('router', {}).get('no_grad', {}).get('bias', np.zeros(E))
      want[dropless] = naive.layer(settings, E, params, group(x), group(mask), True, bias)
    output, sums = want[dropless]
    assert np.abs(output).max() > 0.1
    assert y.dtype == x.dtype and all(leaf.dtype == jnp.float32 for leaf in aux.values())
    # bfloat16 rounds weights, hidden units and outputs of experts by 1/256 each; not the router.
    accuracy = dict(rtol=1e-4, atol=1e-5) if x.dtype == jnp.float32 else dict(rtol=0.02, atol=0.04)
    np.testing.assert_allclose(group(y).astype(np.float64), output, err_msg=dispatch, **accuracy)
    assert aux.keys() == sums.keys()
    for name, value in sums.items():
      np.testing.assert_allclose(aux[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.asarray(y)[~np.asarray(mask)].max(initial=0) == 0


def test_no_router_is_left_out():
  assert {settings.get('router', 'expert_choice') for settings in ROUTERS.values()} == set(
      config.ROUTERS)


@pytest.mark.parametrize('router', BINDING)
def test_a_binding_capacity_binds(router):
  """The situation called drops is one: otherwise the comparison above would show little."""
  aux = made(router, 'drops', 'gather')[-1]
  assert aux['unchosen' if router.startswith('expert_choice') else 'dropped'] > 0


@pytest.mark.parametrize('router', PERMUTING)
def test_permuting_experts_permutes_everything(router):
  order = np.array([2, 0, 3, 1])
  for dispatch in dispatches(router, 'padding and drops'):
    settings, E, params, x, mask, y, aux = made(router, 'padding and drops', dispatch)
    moved = {'experts': jax.tree.map(lambda w: w[order], params['experts'])}
    if 'router' in params:
      moved['router'] = jax.tree.map(lambda w: w[..., order], params['router'])
    run, _ = build(E, **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)
                         if f.name != 'num_experts'})
    y2, aux2 = without_compiling(lambda: run(moved, x, mask, train=True))  # noqa: B023
    np.testing.assert_allclose(y2, y, rtol=1e-4, atol=1e-5, err_msg=dispatch)
    for name, value in aux.items():
      value = np.asarray(value)
      np.testing.assert_allclose(aux2[name], value[order] if value.shape else value, rtol=1e-4,
                                 err_msg=f'{dispatch}, {name}')
