"""MoE layers of these tests as pure functions, and their inputs and comparisons.

B batch, L length, D model, F ffn, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.moe.layer import MoEConfig, MoELayer

from . import experts

D, F = 6, 10
ROOM = dict(capacity_factor=64.0, eval_capacity_factor=64.0)   # C = S: nothing is dropped


def build(E, scale=1.0, seed=0, d_model=D, mlps=None, shared=None, **settings):
  """(run, params): run(params, x, mask, keys, train, no_drop) -> (y, aux); logits of order `scale`.

  mlps, shared: modules that replace this folder's experts (which have neither biases nor dropout),
  and shared experts. Layers without them are compiled once for all tests.
  """
  config = MoEConfig(num_experts=E, **settings)
  make = _layer if mlps or shared else _shared_layer
  run, params = make(config, E, mlps or experts.Experts(E, d_model, F, seed), shared, d_model, seed)
  kernel = np.random.default_rng(seed + 1).normal(size=(d_model, E)) / np.sqrt(d_model) * scale
  if 'router' in params:
    params['router']['kernel'] = jnp.asarray(kernel, jnp.float32)
  return run, params


def _layer(config, E, mlps, shared, d_model, seed):
  layer = MoELayer(config, E, mlps, shared, d_model, rngs=nnx.Rngs(seed))
  graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

  @functools.partial(jax.jit, static_argnames=('train', 'no_drop'))
  def run(params, x, mask, keys=None, train=False, no_drop=False):
    return nnx.merge(graphdef, params, rest)(x, mask, train=train, keys=keys, no_drop=no_drop)
  return run, nnx.to_pure_dict(params)


_RUNS = {}


def _shared_layer(config, E, mlps, shared, d_model, seed):
  run, params = _layer(config, E, mlps, shared, d_model, seed)
  return _RUNS.setdefault((config, E, d_model), run), params


def tokens(B=4, L=6, padding=0.0, seed=0):
  """x (B, L, D) float32 and mask (B, L)."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32)
  return x, jnp.asarray(rng.random((B, L)) >= padding)


def keys_of(B, seed=0):
  """(B,) keys, one per example."""
  return jax.random.split(jax.random.key(seed), B)


def gradient(function):
  return jax.jit(jax.grad(function))


def without_compiling(function, *args):
  """function(*args), one operation at a time: faster than compiling where shapes recur."""
  with jax.disable_jit():
    return function(*args)


def close(found, wanted, tolerance=2e-6):
  """Asserts that trees are equal, within tolerance of each wanted leaf's largest value."""
  def one(have, want):
    have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
    assert have.shape == want.shape
    assert np.abs(have - want).max() <= tolerance * max(np.abs(want).max(), 1e-6)
  jax.tree.map(one, found, wanted)


def same_experts(params):
  """Every expert a copy of expert 0, as after upcycling."""
  copies = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params['experts'])
  return params | {'experts': copies}
