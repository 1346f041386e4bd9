"""Settings of a MoE stack: what is refused, and which blocks are sparse."""

import pytest

from moejax.config import ConfigError
from moejax.moe.layer import MoEConfig


@pytest.mark.parametrize('settings, words', [
  (dict(router='top_k', k=1, renormalize=True), ['renormalize', 'gradient']),
  (dict(router='top_k', k=1, renormalize=True, experts_per_layer=(1, 8)), ['renormalize']),
  (dict(router='top_k', k=9), ['moe.k', '9', '8']),
  (dict(router='top_k', k=0), ['moe.k']),
  (dict(router='top_k', k=3, experts_per_layer=(8, 2)), ['moe.k', '3', '2']),
  (dict(router='expert_choise'), ['moe.router', 'expert_choise', "'expert_choice'"]),
  (dict(dispatch='einsun'), ['moe.dispatch', "'einsum'"]),
  (dict(num_experts=0), ['num_experts']),
  (dict(capacity_factor=0.0), ['capacity_factor']),
  (dict(eval_capacity_factor=-1.0), ['eval_capacity_factor']),
  (dict(min_capacity=0), ['min_capacity']),
  (dict(group_size=-6), ['group_size']),
])
def test_settings_that_cannot_work_are_refused(settings, words):
  with pytest.raises(ConfigError) as error:
    MoEConfig(**settings)
  assert '\n' not in str(error.value)
  for word in words:
    assert word in str(error.value)


def test_settings_that_can_work_are_not():
  MoEConfig()
  MoEConfig(router='top_k', k=8)
  MoEConfig(router='top_k', k=1)
  MoEConfig(router='top_k', k=2, renormalize=True)
  MoEConfig(router='expert_choice', num_experts=1, k=2)   # k is top_k's


@pytest.mark.parametrize('layers, depth, expected', [
  ('none', 4, {}),
  ('every_1', 3, {0: 8, 1: 8, 2: 8}),
  ('every_2', 2, {1: 8}),                 # the second of two
  ('every_2', 5, {1: 8, 3: 8}),
  ('every_3', 6, {2: 8, 5: 8}),
  ('last_2', 6, {4: 8, 5: 8}),
  ('last_6', 6, {i: 8 for i in range(6)}),
  ('0', 1, {0: 8}),
  ('1,3', 4, {1: 8, 3: 8}),
  ('1, 3', 4, {1: 8, 3: 8}),
])
def test_sparse_layers(layers, depth, expected):
  assert MoEConfig(layers=layers).sparse_layers(depth, 'encoder.moe') == expected


def test_sparse_layers_with_a_number_of_experts_each():
  config = MoEConfig(layers='last_3', experts_per_layer=(4, 8, 16))
  assert config.sparse_layers(6, 'encoder.moe') == {3: 4, 4: 8, 5: 16}


@pytest.mark.parametrize('settings', [
  dict(layers='last_7'), dict(layers='last_0'), dict(layers='every_0'), dict(layers='every_7'),
  dict(layers='1,6'), dict(layers='6'), dict(layers='1,1'), dict(layers='-1'), dict(layers=''),
  dict(layers='evry_2'), dict(layers='1;3'),
  dict(layers='last_2', experts_per_layer=(4,)), dict(layers='1', experts_per_layer=(4, 8)),
])
def test_sparse_layers_out_of_range(settings):
  with pytest.raises(ConfigError) as error:
    MoEConfig(**settings).sparse_layers(6, 'encoder.moe')
  assert 'encoder.moe.' + ('experts' if len(settings) > 1 else 'layers') in str(error.value)
