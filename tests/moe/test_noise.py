"""Noise, jitter and the second-expert rule: when they act, on what, and whose they are.

B batch, L length, D model, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.moe.config import MoEConfig
from moejax.moe.router import Router, RouterKeys

from . import experts
from .layer import ROOM, D, build, close, keys_of, same_experts, tokens

TOP = dict(router='top_k', k=2, capacity_factor=1.0)
RANDOM = {
    'learned noise': dict(learned_noise=True),
    'noise': dict(noise_std=4.0),
    'jitter': dict(jitter=0.5),
    'second choices': dict(second_threshold=1.0),
}


@pytest.mark.parametrize('name', RANDOM)
def test_training_draws_for_each_key_and_evaluation_draws_nothing(name):
  """Nor does training without keys."""
  x, mask = tokens(padding=0.2)
  (plain, params), (run, random) = build(4, **TOP), build(4, **TOP, **RANDOM[name])
  for train, keys in ((False, keys_of(4)), (True, None)):
    want, found = (f(p, x, mask, keys, train) for f, p in ((plain, params), (run, random)))
    jax.tree.map(np.testing.assert_array_equal, found, want)
  trained, again = (run(random, x, mask, keys_of(4, seed), train=True)[0] for seed in (0, 1))
  assert np.abs(trained - want[0]).max() > 1e-2
  assert np.abs(trained - again).max() > 1e-2


@pytest.mark.parametrize('settings', [
  dict(learned_noise=True, jitter=0.5, second_threshold=1.0), dict(noise_std=4.0, router='top_p'),
  dict(router='expert_choice', noise_std=4.0, jitter=0.5)], ids=str)
def test_an_examples_draws_are_its_own(settings):
  """They move with it, and do not depend on the others of its batch; an example is a group here."""
  run, params = build(4, **TOP | settings)
  x, mask = tokens(padding=0.2)
  keys = keys_of(4)
  y, _ = run(params, x, mask, keys, train=True)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_array_equal(run(params, x[order], mask[order], keys[order], train=True)[0],
                                np.asarray(y)[order])
  other = np.array([0, 1, 0, 1])
  found, _ = run(params, x[other], mask[other], keys[other], train=True)
  np.testing.assert_array_equal(found[:2], y[:2])


@pytest.mark.parametrize('settings', [dict(jitter=0.9), dict(noise_std=40.0),
                                      dict(learned_noise=True, jitter=0.9)], ids=str)
def test_experts_never_see_noise_or_jitter(settings):
  """Whatever is chosen, identical experts whose weights sum to 1 are the MLP of the clean x."""
  averaging = dict(router='top_k', k=4, renormalize=True, **ROOM)
  (plain, _), (run, params) = build(4, **averaging), build(4, **averaging, **settings)
  params = same_experts(params)
  x, mask = tokens()
  y, aux = run(params, x, mask, keys_of(4), train=True)
  close(y, experts.mlp(params['experts'], x))
  params['router'].pop('noise_kernel', None)
  assert abs(aux['z'] - plain(params, x, mask)[1]['z']) > 1e-2   # the router did see it


def router(E, **settings):
  """A Router of D = E whose kernel is the identity: logits are its inputs."""
  made = Router(MoEConfig(num_experts=E, router='top_k', **settings), E, E, rngs=nnx.Rngs(0))
  made.kernel[...] = jnp.eye(E)
  return made


def draws(B):
  return RouterKeys(keys_of(B, seed=0), keys_of(B, seed=1), keys_of(B, seed=2))


def test_jitter_is_a_uniform_factor_of_each_number():
  x = jnp.asarray(np.random.default_rng(0).uniform(1, 2, (4, 100, 8)), jnp.float32)
  factors = np.asarray(router(8, jitter=0.25)(x, draws(4)).logits / x)
  assert 0.75 <= factors.min() < 0.76 and 1.24 < factors.max() <= 1.25
  assert len(np.unique(factors)) > 0.99 * factors.size * (1 - factors.size / 2**23)
  # Uniform on an interval of 0.5: standard deviation 0.5 / sqrt(12). 3200 draws: within 4 sigma.
  assert factors.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.04)
  assert factors.mean() == pytest.approx(1, abs=4 * 0.145 / np.sqrt(3200))


def test_noise_of_vmoe_is_its_scale_over_the_number_of_experts():
  x = jnp.zeros((4, 100, 8))
  out = router(8, noise_std=2.0)(x, draws(4))
  noise = np.asarray(out.logits)                                   # the clean logits are 0
  np.testing.assert_array_equal(out.clean, 0)
  np.testing.assert_array_equal(out.std, np.float32(0.25))
  assert noise.std() == pytest.approx(0.25, rel=0.05)              # 4 / sqrt(2 * 3200)
  assert abs(noise.mean()) < 4 * 0.25 / np.sqrt(3200)
  assert len(np.unique(noise)) > 0.99 * noise.size


def test_learned_noise_is_scaled_for_each_token_and_expert():
  made = router(8, learned_noise=True)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 100, 8)), jnp.float32)
  out = made(x, draws(4))
  np.testing.assert_allclose(out.std, np.log(2), rtol=1e-6)     # softplus(0), at the start
  made.noise_kernel[...] = 2 * jnp.eye(8)[::-1]
  out = made(x, draws(4))
  np.testing.assert_allclose(out.std, np.log1p(np.exp(2 * x[..., ::-1])), rtol=1e-5)
  np.testing.assert_array_equal(out.clean, x)
  normal = np.asarray((out.logits - out.clean) / out.std)
  assert normal.std() == pytest.approx(1, rel=0.05) and abs(normal.mean()) < 4 / np.sqrt(3200)


def test_second_choices_are_kept_as_often_as_they_weigh():
  # Each token's probabilities are 8/11, 2/11, 1/11: the second's share is 1/5, of 1/2 that is 2/5.
  run, params = build(3, router='top_k', second_threshold=0.5, **ROOM)
  params['router']['kernel'] = jnp.zeros((D, 3)).at[0].set(jnp.log(jnp.asarray([2., 8., 1.])))
  x, mask = tokens(B=16, L=64)
  x = x.at[..., 0].set(1.0)
  y, aux = run(params, x, mask, keys_of(16), train=True)
  both, _ = run(params, x, mask, train=True)
  np.testing.assert_array_equal(aux['load'][:2], [aux['load'][0], 1024])
  assert aux['load'][0] / 1024 == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / 1024))
  assert aux['single'] == 1024 - aux['load'][0] and aux['dropped'] == 0
  kept = np.abs(y - both).max(-1) < 1e-5
  assert kept.sum() == aux['load'][0]
  # Whose second choice is kept differs from example to example.
  assert len({tuple(row) for row in kept.tolist()}) == 16
