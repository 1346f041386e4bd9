"""Auxiliary losses as the layer reports them. B batch, L length, D model, E experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import sharding
from moejax.moe import balance, router, routing
from moejax.moe.config import MoEConfig
from moejax.sharding import MeshConfig

from .layer import ROOM, D, build, close, keys_of, tokens

WEIGHTS = dict(balance=0.5, importance=0.25, smooth_load=0.125, z=0.0625, entropy_penalty=2.0)
ALL = dict(router='top_k', k=2, noise_std=2.0, jitter=0.2, balance_weight=0.5,
           importance_weight=0.25, load_weight=0.125, z_weight=0.0625, entropy_weight=2.0)


def losses_of(aux):
  return {name: value for name, value in aux.items() if name in WEIGHTS or name.endswith('_loss')}


def test_every_loss_is_its_value_times_its_weight():
  run, params = build(4, **ALL)
  x, mask = tokens(padding=0.3)
  aux = run(params, x, mask, keys_of(4), train=True)[1]
  assert {name for name in aux if name.endswith('_loss')} == {f'{name}_loss' for name in WEIGHTS}
  for name, weight in WEIGHTS.items():
    assert aux[name] > 0
    np.testing.assert_allclose(aux[f'{name}_loss'], weight * aux[name], rtol=1e-6)
  np.testing.assert_allclose(aux['entropy_penalty'], aux['entropy'], rtol=1e-6)
  plain = build(4, router='top_k')[0](params, x, mask)[1]
  assert set(losses_of(plain)) == {'z', 'balance'}   # always measured
  assert plain['balance'] > 0


@pytest.mark.parametrize('learned', [False, True])
def test_importance_and_load_are_vmoes_or_shazeers(learned):
  """Noiseless probabilities and all thresholds, or the gates and the thresholds of others."""
  config = MoEConfig(num_experts=4, **{**ALL, 'noise_std': 0.0 if learned else 2.0},
                     learned_noise=learned)
  clean, noise = np.random.default_rng(0).normal(size=(2, 3, 8, 4)).astype(np.float32)
  mask = tokens(B=3, L=8, padding=0.3)[1]
  output = router.RouterOutput(clean + 0.5 * noise, jnp.asarray(clean), jnp.full(clean.shape, 0.5))
  probs = routing.probabilities(output.logits)
  choices = routing.top_k(output.logits, mask, 2)
  found = router.losses(config, output, probs, choices, mask)
  shares = balance.gates(choices, 4) if learned else jax.nn.softmax(clean)
  np.testing.assert_allclose(found['importance'][1], (balance.importance(shares, mask)
                                                      * mask.sum(1)).sum(), rtol=1e-5)
  load = balance.smooth_load(clean, output.logits, 0.5, 2, mask, exclude_self=learned)
  np.testing.assert_allclose(found['smooth_load'][1], (load * mask.sum(1)).sum(), rtol=1e-5)
  np.testing.assert_allclose(found['z'][1], balance.router_z(output.logits, mask).sum(),
                             rtol=1e-5)


def test_first_choices_or_all_make_the_balance_loss():
  # Probabilities 5/10, 4/10, 1/10 for every token: first choices all e0, second ones all e1.
  x, mask = tokens()
  x = x.at[..., 0].set(1.0)
  # Of first choices f = (1, 0, 0): 3 * 1/2. Of all f = (1/2, 1/2, 0): 3 * (1/4 + 1/5).
  for counts, value in (('first', 1.5), ('all', 1.35)):
    run, params = build(3, router='top_k', balance_weight=0.1, balance_counts=counts, **ROOM)
    params['router']['kernel'] = jnp.zeros((D, 3)).at[0].set(jnp.log(jnp.asarray([5., 4., 1.])))
    aux = run(params, x, mask)[1]
    np.testing.assert_allclose(aux['balance'], 24 * value, rtol=1e-5)
    np.testing.assert_allclose(aux['balance_loss'], 2.4 * value, rtol=1e-5)


def test_losses_do_not_depend_on_padding_or_microbatches():
  """More sequences and tokens of padding, the batch in halves: the same sums and draws."""
  run, params = build(4, **ALL)
  x, mask = tokens(padding=0.3)
  keys = keys_of(6)
  aux = run(params, x, mask, keys[:4], train=True)[1]
  more_x = jnp.full((6, 9, D), 7.0).at[:4, :6].set(x)
  more_mask = jnp.zeros((6, 9), bool).at[:4, :6].set(mask)
  close(losses_of(run(params, more_x, more_mask, keys, train=True)[1]), losses_of(aux), 1e-5)
  halves = [run(params, x[r], mask[r], keys[r], train=True)[1] for r in (slice(2), slice(2, 4))]
  close(jax.tree.map(jnp.add, *halves), aux, 1e-5)


def test_losses_do_not_depend_on_the_number_of_devices():
  run, params = build(4, **ALL, second_threshold=0.5, group_size=12)
  x, mask = tokens(B=8, padding=0.3)
  mask = mask.at[:2].set(False)   # a group of padding alone, with finite gradients

  def total(params):
    y, aux = run(params, x, mask, keys_of(8), train=True)
    return sum(v for k, v in aux.items() if k.endswith('_loss')), (y, aux)

  differentiate = jax.value_and_grad(total, has_aux=True)
  (_, one), grads = jax.jit(differentiate)(params)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=2), jax.devices()[:4])):
    (_, many), many_grads = jax.jit(differentiate)(params)
  close(many, one, 1e-5)
  close(many_grads['router'], grads['router'], 1e-5)
  assert np.abs(grads['router']['kernel']).max() > 1e-3
