"""Who can influence a token: nobody after it where choice is its own, nobody at all in decoding."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import config

from .layer import ROOM, build, close, tokens

CAUSAL = {   # with settings of each
    'top_k': dict(router='top_k', score='sigmoid', renormalize=True, bias_rate=0.1),
    'top_p': dict(router='top_p', k=3, p=0.7),
    'norm': dict(router='norm', renormalize=True),
}
TIGHT = dict(eval_capacity_factor=0.1, group_size=12)


@pytest.mark.parametrize('settings', [
  *CAUSAL.values(), dict(router='top_k', dispatch='einsum'),
  dict(router='top_k', score='softmax_of_chosen'),
  dict(router='top_p', dispatch='grouped', k=3),
  dict(router='top_k', order='token', eval_capacity_factor=1.0)], ids=str)
def test_a_later_token_changes_no_bit_of_an_earlier_one(settings):
  """With room for all; in token order even if tokens are dropped."""
  run, params = build(4, scale=3.0, **ROOM | settings)
  x, mask = tokens(B=1, L=6)
  y, aux = run(params, x, mask)
  later = x.at[:, 3:].multiply(-5.0)
  found, _ = run(params, later, mask)
  assert np.abs(found - y)[:, 3:].max() > 0.1
  np.testing.assert_array_equal(found[:, :3], y[:, :3])
  assert (aux['dropped'] > 0) == ('order' in settings)


@pytest.mark.parametrize('router', config.CAUSAL)
def test_decoding_drops_nothing(router):
  """However little capacity there is in evaluation, and however sequences are grouped."""
  settings = CAUSAL[router]
  run, params = build(4, scale=3.0, **settings, **TIGHT)
  roomy, _ = build(4, scale=3.0, **settings, **ROOM)
  x, mask = tokens(B=5, padding=0.2)                                # not whole groups of two
  want = roomy(params, x, mask)[0]
  y, aux = run(params, x, mask, no_drop=True)
  close(y, want)
  assert aux['dropped'] == 0 and aux['unchosen'] == 0
  assert run(params, x[:4], mask[:4])[1]['dropped'] > 0
  # One token at a time, as a decoder does.
  alone, _ = run(params, x.reshape(30, 1, -1), jnp.ones((30, 1), bool), no_drop=True)
  close(jnp.where(mask[..., None], alone.reshape(y.shape), 0), want)
