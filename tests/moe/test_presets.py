"""Presets: the figures they publish, and that a model can be trained with each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe import presets
from moejax.moe.config import MoEConfig
from tests.models.helpers import batch

DROPLESS = dict(dispatch='grouped')
TWICE = dict(capacity_factor=2.0, eval_capacity_factor=2.0)

# What each preset says, field by field, from its sources and its stated choices; every other field
# has its default. Balance weights are for a loss of 1 when balanced.
PUBLISHED = {
    'sparsely_gated': dict(
        router='top_k', num_experts=32, k=4, score='softmax_of_chosen', learned_noise=True,
        router_init_std=0.0, importance_weight=0.1, load_weight=0.1, layers='every_2', **DROPLESS),
    'gshard': dict(
        router='top_k', num_experts=32, k=2, renormalize=True, second_threshold=0.5,
        balance_weight=0.01, balance_counts='first', layers='every_2', **TWICE),
    'switch': dict(
        router='top_k', num_experts=128, k=1, balance_weight=0.01, jitter=0.01, min_capacity=4,
        capacity_factor=1.25, eval_capacity_factor=2.0, layers='every_2'),
    'glam': dict(
        router='top_k', num_experts=64, k=2, renormalize=True, balance_weight=0.01,
        balance_counts='first', layers='every_2', **TWICE),
    'vmoe': dict(   # 1.05 and 4 times k = 2
        router='top_k', num_experts=8, k=2, noise_std=1.0, importance_weight=0.005,
        load_weight=0.005, capacity_factor=2.1, eval_capacity_factor=8.0, layers='every_2'),
    'st_moe': dict(   # 0.01 times k = 2
        router='top_k', num_experts=32, k=2, renormalize=True, second_threshold=0.2,
        balance_weight=0.02, z_weight=0.001, capacity_factor=1.25, eval_capacity_factor=2.0,
        min_capacity=4, layers='every_4'),
    'expert_choice': dict(router='expert_choice', num_experts=64, layers='every_2', **TWICE),
    'sparse_upcycling': dict(
        router='expert_choice', num_experts=32, router_init_std=0.02, layers='every_2', **TWICE),
    'sparse_upcycling_decoder': dict(
        router='top_k', num_experts=32, k=2, balance_weight=0.02, router_init_std=0.02,
        min_capacity=4, layers='every_2', **TWICE),
    'deepseek_moe': dict(
        router='top_k', num_experts=64, k=6, granularity=4, shared_experts=2,
        balance_weight=0.001, layers='every_1', **DROPLESS),
    'deepseek_v3': dict(
        router='top_k', num_experts=256, k=8, granularity=4, shared_experts=1, score='sigmoid',
        renormalize=True, weight_scale=2.5, bias_rate=0.001, layers='every_1', **DROPLESS),
    'mixtral': dict(   # 0.02 times k = 2
        router='top_k', num_experts=8, k=2, score='softmax_of_chosen', balance_weight=0.04,
        layers='every_1', **DROPLESS),
    'grok': dict(   # 0.001 times k = 2
        router='top_k', num_experts=8, k=2, balance_weight=0.002, layers='every_1', **DROPLESS),
    'top_p': dict(
        router='top_p', num_experts=16, k=8, p=0.4, entropy_weight=0.0001, balance_weight=0.01,
        layers='every_1', **DROPLESS),
    'norm': dict(router='norm', num_experts=8, k=2, renormalize=True, layers='every_2'),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_figures(name):
  config = presets.preset(name)
  expected = {f.name: f.default for f in dataclasses.fields(MoEConfig)} | PUBLISHED[name]
  assert dataclasses.asdict(config) == expected


def test_every_preset_is_in_the_table_and_says_its_source():
  assert set(presets.BY_NAME) == set(PUBLISHED)
  assert all('20' in f.__doc__ or 'public' in f.__doc__ for f in presets.BY_NAME.values())


def test_fields_are_replaced_and_misspelt_names_answered_with_the_nearest():
  assert presets.switch(num_experts=16) == dataclasses.replace(presets.switch(), num_experts=16)
  assert presets.preset('vmoe', batch_priority=True).batch_priority
  with pytest.raises(ConfigError, match="moe preset: got 'swich', .*Did you mean 'switch'"):
    presets.preset('swich')
  with pytest.raises(ConfigError, match="moe field: got 'num_expert', .*mean 'num_experts'"):
    presets.gshard(num_expert=4)
  with pytest.raises(ConfigError, match='moe.k: got 2, .*num_experts = 1'):
    presets.gshard(num_experts=1)   # what is replaced is checked too


CAUSAL = sorted(name for name, fields in PUBLISHED.items() if fields['router'] != 'expert_choice')
PAIRS = list(zip(CAUSAL[::2], [*CAUSAL[1::2], CAUSAL[0]]))   # encoder's and decoder's


@functools.cache
def small(name):
  return presets.preset(name, num_experts=10, layers='0')


def check_trains(config, batch, moes):
  """Finite logits and losses; the task alone reaches every router's kernel, and the experts."""
  model, rng = models.build(config), np.random.default_rng(0)
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, s.dtype),
                        model.shapes)
  flat = trees.flatten(params)
  inside = {path: leaf for path, leaf in flat.items() if '/moe/' in path}

  def total(inside):   # their gradients alone, to compile less
    logits, aux = model.apply(trees.unflatten(flat | inside), batch, train=True,
                              key=jax.random.key(0))
    return jnp.square(logits).mean(), (logits, aux)

  grads, (logits, aux) = jax.jit(jax.grad(total, has_aux=True))(inside)
  for leaf in jax.tree.leaves((grads, logits, aux)):
    assert np.isfinite(leaf).all()
  for path, moe in moes.items():
    reached = {name.removeprefix(f'{path}/moe/') for name, g in grads.items()
               if name.startswith(path) and np.abs(g).max() > 1e-8}
    routers = {'router/kernel'} if moe.router != 'norm' else set()
    if moe.learned_noise:
      routers.add('router/noise_kernel')
    assert {name for name in reached if name.startswith('router')} == routers
    assert any(name.startswith('experts/wo') for name in reached)
    assert any(name.startswith('shared/') for name in reached) == (moe.shared_experts > 0)
    for weight in ('balance', 'importance', 'z'):
      if getattr(moe, f'{weight}_weight'):
        assert aux[path][f'{weight}_loss'] > 0
    assert ('smooth_load_loss' in aux[path]) == (moe.load_weight > 0)
    if moe.entropy_weight:
      assert aux[path]['entropy_penalty_loss'] > 0


@pytest.mark.parametrize('encoder, decoder', PAIRS)
def test_a_t5_can_be_trained_with_it(encoder, decoder):
  moes = {'encoder/layers/00': small(encoder), 'decoder/layers/00': small(decoder)}
  config = t5.config('tiny', encoder_layers=1, decoder_layers=1, encoder_moe=small(encoder),
                     decoder_moe=small(decoder))
  check_trains(config, batch(config, B=2, L=10, M=8), moes)


def test_a_vit_can_be_trained_with_expert_choice():
  assert small('expert_choice') == small('sparse_upcycling')   # but for E
  moe = small('expert_choice')
  config = vit.config('tiny', num_layers=1, moe=moe)
  check_trains(config, batch(config, B=2), {'encoder/layers/00': moe})
