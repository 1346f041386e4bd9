"""Settings of a MoE stack: what is refused, and which blocks are sparse."""

import re

import pytest

from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig

TOP = dict(router='top_k')
NOISY = dict(TOP, noise_std=1.0)

# Settings that cannot work: what is given, and key, value, allowed and a word of the reason.
REFUSED = [
  (dict(TOP, k=1, renormalize=True), ['moe.renormalize: got True', 'False at k = 1', 'gradient']),
  (dict(TOP, k=1, renormalize=True, experts_per_layer=(1, 8)), ['moe.renormalize', 'gradient']),
  (dict(router='top_p', k=1, renormalize=True), ['moe.renormalize: got True', 'gradient']),
  (dict(TOP, k=1, score='softmax_of_chosen'),
   ["moe.score: got 'softmax_of_chosen'", 'softmax or sigmoid at k = 1', 'gradient']),
  (dict(TOP, k=9), ['moe.k: got 9', '1 to num_experts = 8', 'more experts than there are']),
  (dict(TOP, k=0), ['moe.k: got 0', '>= 1']),
  (dict(TOP, k=3, experts_per_layer=(8, 2)), ['moe.k: got 3', 'num_experts = 2']),
  (dict(experts_per_layer=(8, 0)), ['moe.experts_per_layer: got (8, 0)', 'integers >= 1']),
  (dict(experts_per_layer=(8, 2.5)), ['moe.experts_per_layer']),
  # A misspelt name is answered with the nearest.
  (dict(router='expert_choise'), ['moe.router', "'expert_choise'", "mean 'expert_choice'?"]),
  (dict(dispatch='einsun'), ['moe.dispatch', "mean 'einsum'?"]),
  (dict(dispatch='group'), ['moe.dispatch', "mean 'grouped'?"]),
  (dict(TOP, score='sigmoids'), ['moe.score', 'softmax_of_chosen', "mean 'sigmoid'?"]),
  (dict(TOP, order='tokens'), ['moe.order', 'choice, token', "mean 'token'?"]),
  (dict(TOP, balance_counts='firsts'), ['moe.balance_counts', 'all, first', "mean 'first'?"]),
  # Ranges.
  (dict(num_experts=0), ['moe.num_experts: got 0', '>= 1']),
  (dict(granularity=0), ['moe.granularity: got 0', '>= 1']),
  (dict(min_capacity=0), ['moe.min_capacity: got 0', '>= 1']),
  (dict(capacity_factor=0.0), ['moe.capacity_factor: got 0.0', '> 0']),
  (dict(eval_capacity_factor=-1.0), ['moe.eval_capacity_factor: got -1.0', '> 0']),
  (dict(TOP, weight_scale=0.0), ['moe.weight_scale: got 0.0', '> 0']),
  *((dict(TOP, **{key: -1}), [f'moe.{key}: got -1', '>= 0', '0 turns it off']) for key in (
    'shared_experts', 'group_size', 'noise_std', 'router_init_std', 'second_threshold',
    'balance_weight', 'importance_weight', 'load_weight', 'z_weight', 'entropy_weight',
    'bias_rate')),
  (dict(TOP, jitter=1.0), ['moe.jitter: got 1.0', '0 <= x < 1']),
  (dict(router='top_p', p=0.0), ['moe.p: got 0.0', '0 < p <= 1']),
  (dict(dropout_rate=1.0), ['moe.dropout_rate: got 1.0', '[0, 1)']),
  # What expert choice has no use for.
  *((dict([setting]), [f'moe.{setting[0]}: got {setting[1]!r}', 'with router=expert_choice'])
    for setting in dict(score='sigmoid', weight_scale=2.0, second_threshold=0.2,
                        learned_noise=True, batch_priority=True, order='token', balance_weight=0.1,
                        balance_counts='first', importance_weight=0.1, load_weight=0.1,
                        entropy_weight=0.1, bias_rate=0.1).items()),
  # What does not go together.
  (dict(TOP, dispatch='grouped', order='token'), ["moe.order: got 'token'", 'dispatch=grouped']),
  (dict(TOP, dispatch='grouped', batch_priority=True), ['moe.batch_priority: got True', 'grouped']),
  (dict(TOP, p=0.5), ['moe.p: got 0.5', "router='top_p'"]),
  (dict(router='top_p', noise_std=1.0, load_weight=0.1), ['moe.load_weight', 'router=top_p']),
  (dict(router='top_k', noise_std=1.0, load_weight=0.1, bias_rate=0.001),
   ['moe.load_weight', '0 with bias_rate']),
  (dict(TOP, load_weight=0.1), ['moe.load_weight: got 0.1', '0 without noise', 'learned_noise']),
  (dict(TOP, load_weight=0.1, jitter=0.1), ['moe.load_weight']),
  (dict(TOP, k=3, second_threshold=0.2), ['moe.second_threshold: got 0.2', 'k=2']),
  (dict(TOP, k=1, second_threshold=0.2), ['moe.second_threshold']),
  (dict(router='top_p', second_threshold=0.2), ['moe.second_threshold']),
  (dict(NOISY, learned_noise=True), ['moe.noise_std: got 1.0', '0 with learned_noise']),
  (dict(router='top_p', score='sigmoid'), ['moe.score', "'softmax' with router=top_p", 'top_k']),
  (dict(router='norm', score='sigmoid'), ['moe.score', "'softmax' with router=norm"]),
  (dict(router='top_p', bias_rate=0.1), ['moe.bias_rate: got 0.1', '0 with router=top_p']),
  (dict(router='norm', bias_rate=0.1), ['moe.bias_rate', '0 with router=norm']),
  (dict(router='norm', noise_std=0.5), ['moe.noise_std: got 0.5', '0.0 with router=norm']),
  (dict(router='norm', jitter=0.5), ['moe.jitter: got 0.5', '0.0 with router=norm']),
  (dict(router='norm', learned_noise=True), ['moe.learned_noise: got True', 'False with router']),
]


@pytest.mark.parametrize('settings, words', REFUSED, ids=lambda given: ' '.join(map(str, given)))
def test_settings_that_cannot_work_are_refused(settings, words):
  with pytest.raises(ConfigError) as error:
    MoEConfig(**settings)
  message = str(error.value)
  assert re.fullmatch(r'moe\.\w+: got .+, allowed: .+\. \w.+[.?]', message)   # on one line
  for word in words:
    assert word in message


@pytest.mark.parametrize('settings', [
  {}, dict(TOP, k=8), dict(TOP, k=1), dict(TOP, k=2, renormalize=True),
  dict(num_experts=1, k=2),                                    # k is the tokens'
  dict(TOP, num_experts=1, k=1, renormalize=True),             # no choice, hence no router to learn
  dict(router='norm', k=1, renormalize=True),                  # no router to learn
  dict(TOP, k=1, score='sigmoid'), dict(NOISY, load_weight=0.1),
  dict(TOP, learned_noise=True, load_weight=0.1), dict(noise_std=1.0, jitter=0.1),
  dict(TOP, second_threshold=0.2, renormalize=True), dict(TOP, second_threshold=0.5),
  dict(TOP, score='sigmoid', bias_rate=0.1), dict(dropout_rate=0.0), dict(router='top_p', p=1.0)],
  ids=str)
def test_settings_that_can_work_are_not(settings):
  MoEConfig(**settings)


def test_slots_per_expert():
  config = MoEConfig(capacity_factor=0.5, eval_capacity_factor=2.0)
  assert [config.slots_per_expert(8, 4, train) for train in (True, False)] == [1, 4]
  config = MoEConfig(capacity_factor=0.5, eval_capacity_factor=2.0, min_capacity=3)
  assert [config.slots_per_expert(8, 4, train) for train in (True, False)] == [3, 4]
  assert config.slots_per_expert(2, 4, True) == 2   # never more than tokens


def test_granularity_divides_the_hidden_units():
  assert MoEConfig(granularity=4).expert_d_ff(64) == 16
  with pytest.raises(ConfigError, match=r'encoder_moe\.granularity: got 5, .*divisor of d_ff = 64'):
    t5.T5Config(d_ff=64, encoder_moe=MoEConfig(layers='1', granularity=5))
  with pytest.raises(ConfigError, match=r'model\.moe\.granularity: got 3, .*divisor of d_ff = 64'):
    vit.ViTConfig(d_ff=64, moe=MoEConfig(layers='1', granularity=3))
  t5.T5Config(d_ff=64, encoder_moe=MoEConfig(granularity=5))   # no sparse block, no experts


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
