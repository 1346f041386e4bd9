"""Shared and fine-grained experts, the experts' own dropout, and the bias that balances.

B batch, L length, D model, F ffn, E experts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import models, nn, trees
from moejax.models import layers, t5, vit
from moejax.moe.config import MoEConfig
from moejax.moe.experts import Experts

from .layer import D, F, build, close, gradient, keys_of, tokens

TOP = dict(router='top_k', k=2, capacity_factor=1.0)


def mlp(E=None, rate=0.0, d_ff=F, seed=0):
  spec = nn.MLPSpec(D, d_ff, gated=True, activation='gelu_tanh', bias=False,
                    init=nn.fan_in_normal(), dropout_rate=rate)
  return Experts(spec, E, rngs=nnx.Rngs(seed)) if E else layers.MLP(spec, rngs=nnx.Rngs(seed))


@pytest.mark.parametrize('settings', [
  dict(TOP, weight_scale=2.5, renormalize=True, capacity_factor=0.5), dict(capacity_factor=0.5)],
  ids=str)
def test_shared_experts_are_added_with_weight_one(settings):
  """Also for a token that was dropped, and whatever the routed weights are scaled by."""
  run, params = build(4, **settings)
  both, both_params = build(4, shared=mlp(seed=3), shared_experts=1, **settings)
  shared = both_params['shared']
  assert set(both_params) == {*params, 'shared'}
  x, mask = tokens(padding=0.2)
  (y, aux), (y_both, aux_both) = (f(p, x, mask, train=True)
                                  for f, p in ((run, params), (both, both_params)))
  hidden = jax.nn.gelu(x @ shared['wi_gate'], approximate=True) * (x @ shared['wi_up'])
  close(y_both, y + hidden @ shared['wo'])
  assert aux['unchosen'] > 0
  jax.tree.map(np.testing.assert_array_equal, aux_both, aux)


def test_sizes_of_fine_grained_and_shared_experts_and_of_the_bias():
  """granularity 4 of d_ff = 32: 8 units each; 3 shared ones are one MLP of 24."""
  moe = MoEConfig(layers='1', router='top_k', num_experts=6, granularity=4, shared_experts=3)
  shapes = trees.flatten(models.build(t5.config('tiny', encoder_moe=moe, decoder_moe=moe)).shapes)
  for stack in ('encoder', 'decoder'):
    at = {path.removeprefix(f'{stack}/layers/01/moe/'): leaf.shape for path, leaf in shapes.items()
          if path.startswith(f'{stack}/layers/01/m') and '/moe/' in path}
    assert at == {
        'router/kernel': (16, 6), 'experts/wi_gate': (6, 16, 8), 'experts/wi_up': (6, 16, 8),
        'experts/wo': (6, 8, 16), 'shared/wi_gate': (16, 24), 'shared/wi_up': (16, 24),
        'shared/wo': (24, 16)}
  biased = vit.config('tiny', moe=dataclasses.replace(moe, bias_rate=0.1))
  shapes = trees.flatten(models.build(biased).shapes)
  assert shapes['encoder/layers/01/moe/router/no_grad/bias'].shape == (6,)
  assert shapes['encoder/layers/01/moe/experts/wi'].shape == (6, 16, 8)
  assert shapes['encoder/layers/01/moe/shared/wi_bias'].shape == (24,)


@pytest.mark.parametrize('rate, expected', [(0.4, 0.4), (0.0, 0.0), (-1.0, 0.1)])
def test_the_experts_dropout_is_theirs_alone(rate, expected):
  moe = MoEConfig(layers='1', router='top_k', num_experts=2, dropout_rate=rate, shared_experts=1)
  made = nnx.eval_shape(lambda: vit.ViT(vit.config('tiny', moe=moe, dropout_rate=0.1),
                                        rngs=nnx.Rngs(0)))
  rates = {}
  for path, module in nnx.iter_modules(made):
    if hasattr(module, 'dropout_rate') or isinstance(module, nn.MLPParams):
      rates[path] = getattr(module, 'spec', module).dropout_rate
  inside = {path: r for path, r in rates.items() if 'moe' in path}
  assert len(inside) == 2 and set(inside.values()) == {expected}
  assert {r for path, r in rates.items() if path not in inside} <= {0.1, 0.0}
  assert rates['encoder', 'layers', '00', 'mlp'] == rates['encoder', 'layers', '01'] == 0.1


RATE = 0.25


@functools.cache
def transparent(router, dispatch, shared=False, group_size=0):
  """A layer whose output shows its dropout: hidden unit f of an expert is output f, and is x_f.

  Gate and product are positive, so y / y without dropout is 0 or 1 / (1 - rate) for one expert.
  """
  def identity(E):
    made = mlp(E, RATE, d_ff=D)
    wide = lambda w: w if E is None else jnp.broadcast_to(w, (E, D, D))
    made.wi_gate[...] = made.wo[...] = wide(jnp.eye(D))
    made.wi_up[...] = wide(jnp.ones((D, D)))
    return made
  run, params = build(2, scale=2.0, mlps=identity(2), shared=identity(None) if shared else None,
                      router=router, k=1, dispatch=dispatch, capacity_factor=1.0,
                      group_size=group_size)
  x, mask = tokens(B=6, L=32)
  return run, params, jnp.abs(x) + 0.1, mask


def assert_kept_at_the_rate(kept):
  assert kept.mean() == pytest.approx(1 - RATE, abs=4 * np.sqrt(RATE * (1 - RATE) / kept.size))


@pytest.mark.parametrize('router, dispatch, group_size', [
  ('top_k', 'gather', 0), ('top_k', 'gather', 64), ('top_k', 'grouped', 0),
  ('expert_choice', 'grouped', 0)])
def test_dropout_of_experts(router, dispatch, group_size):
  run, params, x, mask = transparent(router, dispatch, group_size=group_size)
  clean = run(params, x, mask, train=True)[0]
  keys = keys_of(6)
  y = run(params, x, mask, keys, train=True)[0]
  if router == 'top_k':   # one expert, hence one mask, for each token
    ratio = np.asarray(y / jnp.where(clean == 0, 1, clean))[np.asarray(clean) != 0]
    np.testing.assert_allclose(ratio[ratio > 0], 1 / (1 - RATE), rtol=1e-5)
    assert_kept_at_the_rate(ratio > 0)
    # y is linear in wo, whose gradient therefore has the same mask.
    grads = gradient(lambda p: run(p, x, mask, keys, train=True)[0].sum())(params)
    np.testing.assert_allclose((grads['experts']['wo'] * params['experts']['wo']).sum(), y.sum(),
                               rtol=1e-5)
  # Tokens, examples and steps differ; an example's masks do not depend on the batch it is in.
  masks = (np.asarray(y) != 0).reshape(6 * 32, D)
  assert len({row.tobytes() for row in masks}) > 30                   # of 64
  assert len({row.tobytes() for row in masks.reshape(6, -1)}) == 6
  assert np.abs(run(params, x, mask, keys_of(6, seed=1), train=True)[0] - y).max() > 0.1
  order = np.array([2, 3, 0, 1, 4, 5])                                # whole groups change places
  close(run(params, x[order], mask[order], keys[order], train=True)[0], y[order])
  close(run(params, x[:2], mask[:2], keys[:2], train=True)[0], y[:2])   # other blocks of rows


@pytest.mark.parametrize('dispatch', ['gather', 'grouped'])
def test_shared_experts_drop_their_own_units(dispatch):
  """Their masks follow the example, and are not those of the routed experts."""
  run, params, x, mask = transparent('top_k', dispatch)
  both, both_params, *_ = transparent('top_k', dispatch, shared=True)
  keys = keys_of(6)
  y = run(params, x, mask, keys, train=True)[0]
  added = np.asarray(both(both_params, x, mask, keys, train=True)[0] - y)
  clean = jax.nn.gelu(x, approximate=True) * x.sum(-1, keepdims=True)
  kept = added > 1e-4
  np.testing.assert_allclose(added[kept], np.asarray(clean)[kept] / (1 - RATE), rtol=1e-4)
  assert_kept_at_the_rate(kept)
  placed = np.asarray(run(params, x, mask, train=True)[0]) != 0
  together = (kept == (np.asarray(y) != 0))[placed].mean()
  chance = RATE**2 + (1 - RATE)**2
  assert together == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / placed.sum()))
  order = np.array([3, 1, 0, 5, 4, 2])
  close(both(both_params, x[order], mask[order], keys[order], train=True)[0][jnp.argsort(order)],
        y + added, 1e-5)
