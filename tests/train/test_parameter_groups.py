"""Groups by hand, frozen leaves bit for bit, and patterns that match nothing."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.train import config as settings
from moejax.train import optimizer
from moejax.train.optimizer import AdafactorConfig, OptimizerConfig

MOE = MoEConfig(layers='1', num_experts=4)
T5_PATHS = list(trees.flatten(models.build(t5.config('tiny', encoder_moe=MOE)).shapes))
VIT_PATHS = list(trees.flatten(models.build(vit.config('tiny', moe=MOE)).shapes))
BIAS = 'encoder/layers/01/moe/router/no_grad/bias'
OPTIMIZERS = [
    dict(name='adamw'), dict(name='sgd', momentum=0.9),
    dict(name='adafactor', adafactor=AdafactorConfig(min_dim_size_to_factor=2))]
SHAPES = {'encoder/layers/01/moe/experts/wi': (3, 4, 5), 'encoder/layers/01/moe/router/kernel':
          (4, 3), BIAS: (3,), 'encoder/layers/00/attention/q/kernel': (4, 4), 'head/kernel': (4, 6)}


def random_tree(seed, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  return trees.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32)
                          for p, s in shapes.items()})


def step(config, params, state, seed, lr=0.1):
  return jax.jit(optimizer.update, static_argnums=0)(config, random_tree(seed), state, params, lr)


def moved(before, after):
  """Paths of the leaves that are not bit for bit the same."""
  before, after = trees.flatten(before), trees.flatten(after)
  return {p for p in before if not np.array_equal(before[p], after[p])}


def test_rates_and_decays_by_hand():
  # p = 2, g = 3, lr 0.5, decay 0.1. Plain: 2 - 0.5 * (3 + 0.1 * 2) = 0.4. Rate times 0.1:
  # 2 - 0.05 * 3.2 = 1.84. Decay times 5: 2 - 0.5 * (3 + 0.5 * 2) = 0. Both: 2 - 0.05 * 4 = 1.8.
  # Decay times 0: 2 - 0.5 * 3 = 0.5. A bias is in no mask: 2 - 0.05 * 3 = 1.85 whatever the decay.
  config = OptimizerConfig(name='sgd', weight_decay=0.1, groups=(
      ('slow', 0.1, 1.0), ('decayed', 1.0, 5.0), ('both', 0.1, 5.0), ('never', 1.0, 0.0)))
  expected = {'plain': 0.4, 'slow': 1.84, 'decayed': 0.0, 'both': 1.8, 'never': 0.5,
              'slow_bias': 1.85}
  params = {name: jnp.array([2.0]) for name in expected}
  grads = {name: jnp.array([3.0]) for name in expected}
  new, _ = optimizer.update(config, grads, optimizer.init(config, params), params, 0.5)
  for name, value in expected.items():
    np.testing.assert_allclose(new[name], [value], atol=1e-6, err_msg=name)


def test_the_first_match_wins():
  narrow, wide = ('experts/wo', 0.5, 1.0), ('experts', 0.25, 3.0)
  config = OptimizerConfig(groups=(narrow, wide))
  assert optimizer.group(config, 'layers/01/moe/experts/wo') == optimizer.Group(0.5, 1.0)
  assert optimizer.group(config, 'layers/01/moe/experts/wi') == optimizer.Group(0.25, 3.0)
  assert optimizer.group(config, 'layers/01/mlp/wo') == optimizer.Group(1.0, 1.0)
  swapped = OptimizerConfig(groups=(wide, narrow))
  assert optimizer.group(swapped, 'layers/01/moe/experts/wo') == optimizer.Group(0.25, 3.0)


@pytest.mark.parametrize('choice', OPTIMIZERS, ids=lambda c: c['name'])
def test_a_frozen_leaf_and_its_slots_stay_bit_for_bit(choice):
  """Frozen by name, by pattern or by rate 0; what is not frozen moves as if nothing were."""
  plain = OptimizerConfig(**choice, weight_decay=0.1)
  params, state = step(plain, random_tree(0), optimizer.init(plain, random_tree(0)), 1)
  expected, _ = step(plain, params, state, 2)
  router = {'encoder/layers/01/moe/router/kernel'}
  attention = {'encoder/layers/00/attention/q/kernel'}
  for still, changes in ((router, dict(freeze='router')), (attention, dict(freeze='attention')),
                         (router, dict(freeze='re:router/kernel$')),
                         (router, dict(groups=(('/router/', 0, 1),))),
                         (router | attention, dict(freeze='router',
                                                   groups=(('attention', 0.0, 1.0),)))):
    config = OptimizerConfig(**choice, weight_decay=0.1, **changes)
    new, new_state = step(config, params, state, 2)
    assert moved(params, new) == SHAPES.keys() - still - {BIAS}
    for path in moved(params, new):
      np.testing.assert_array_equal(trees.flatten(new)[path], trees.flatten(expected)[path])
    slots = moved(state, new_state)
    assert {p for p in SHAPES if not any(s.startswith(p) for s in slots)} == still | {BIAS}


def test_a_thawed_leaf_goes_on_with_the_slots_it_had():
  plain, frozen = OptimizerConfig(), OptimizerConfig(freeze='experts')
  params = random_tree(0)
  state = optimizer.init(frozen, params)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, optimizer.init(plain, params))

  def after(*configs_and_seeds):
    p, s = params, state
    for config, seed in configs_and_seeds:
      p, s = step(config, p, s, seed)
    return {'params': p, 'slots': s}

  paused = after((plain, 1), (frozen, 2), (frozen, 3), (plain, 4))
  never_frozen = after((plain, 1), (plain, 4))
  different = moved(paused, never_frozen)
  assert different and not any('/experts/' in path for path in different)


@pytest.mark.parametrize('choice', OPTIMIZERS, ids=lambda c: c['name'])
def test_state_without_gradient_has_a_count_and_stays(choice):
  config = OptimizerConfig(**choice, weight_decay=0.1, weight_decay_mask='.',
                           groups=(('no_grad', 2.0, 2.0),))
  params = random_tree(0)
  state = optimizer.init(config, params)
  slots = {p: x for p, x in trees.flatten(state).items() if p.startswith(BIAS)}
  assert list(slots) == [f'{BIAS}/count'] and slots[f'{BIAS}/count'].shape == ()
  assert slots[f'{BIAS}/count'].dtype == jnp.int32
  new, new_state = step(config, params, state, 1)
  assert moved(params, new) == SHAPES.keys() - {BIAS}
  assert trees.flatten(new_state)[f'{BIAS}/count'] == 0


# Leaves of the tiny T5 whose encoder layer 1 is MoE. Its 4 layers have 6 attentions of 4 kernels (a
# decoder layer has 2), and each stack a relative bias; norms 2 and 2 in the encoder, 3 and 3 in the
# decoder, 1 after each; 3 MLPs and the experts of 3 kernels each.
SIZES = {'experts': 3, 'router': 1, 'moe': 4, 'mlp': 9, 'attention': 26, 'norm': 12, 'embedding': 1,
         'head': 1}


@pytest.mark.parametrize('name', optimizer.PARTS)
def test_named_parts(name):
  def still(freeze):
    config = OptimizerConfig(freeze=freeze)
    optimizer.check_groups(config, T5_PATHS)
    return {p for p in T5_PATHS if optimizer.frozen(config, p)}
  assert len(still(name)) == SIZES[name]
  assert still(f'all_but_{name}') == set(T5_PATHS) - still(name)
  assert still(f're:{optimizer.PARTS[name][0]}') == still(name)


@pytest.mark.parametrize('paths', [T5_PATHS, VIT_PATHS])
def test_parts_cover_a_model_without_overlap(paths):
  """Every leaf is in one part; moe holds experts and routers."""
  parts = [name for name in optimizer.PARTS if name not in ('experts', 'router')]
  for path in paths:
    found = [n for n in parts if optimizer.frozen(OptimizerConfig(freeze=n), path)]
    assert len(found) == 1, (path, found)
  assert optimizer.frozen(OptimizerConfig(freeze='moe'), 'encoder/layers/01/moe/shared/wi')
  assert not optimizer.frozen(OptimizerConfig(freeze='experts'), 'encoder/layers/01/moe/shared/wi')


def test_a_router_is_frozen_with_its_bias():
  assert optimizer.frozen(OptimizerConfig(freeze='router'), BIAS)
  assert optimizer.frozen(OptimizerConfig(freeze='all_but_experts'), BIAS)
  assert not optimizer.frozen(OptimizerConfig(freeze='experts'), BIAS)
  assert optimizer.untouched(OptimizerConfig(freeze='experts'), BIAS)


@pytest.mark.parametrize('settings, message', [
    (dict(groups=(('moe/ruoter', 0.1, 1),)),
     r"optimizer\.groups\[0\]: got 'moe/ruoter'.*Nearest leaves: encoder/layers/01/moe/router/k"),
    (dict(groups=(('experts', 0.1, 1), ('atention', 0.1, 1))),
     r"optimizer\.groups\[1\]: got 'atention'.*Nearest leaves: .*attention.*attention"),
    (dict(groups=(('experts', 0.1, 1), ('experts/wo', 1, 1))),
     r"groups\[1\]: got 'experts/wo', .*no earlier group.*narrower pattern first"),
    (dict(groups=((r'no_grad', 0.1, 1),)), r'groups\[0\]'),
    (dict(freeze='re:^decoder/router'), r"optimizer\.freeze: got 're:\^decoder/router'.*Nearest"),
    (dict(freeze='mlp', groups=(('.', 0, 1),)), 'leaves something to train'),
    (dict(freeze='re:.'), r"optimizer\.freeze: got 're:\.', allowed: a set that leaves something")])
def test_patterns_that_do_nothing(settings, message):
  with pytest.raises(ConfigError, match=message):
    optimizer.check_groups(OptimizerConfig(**settings), [*T5_PATHS, BIAS])


@pytest.mark.parametrize('settings, message', [
    (dict(groups=('head', 0.1, 1)), r"optimizer\.groups\[0\]: got 'head', .*\(\('\^head/', 10, 1"),
    (dict(groups=(('head', 0.1),)), r'optimizer\.groups\[0\]'),
    (dict(groups=(('head', True, 1),)), r'optimizer\.groups\[0\]'),
    (dict(groups=((1, 0.1, 1),)), r'optimizer\.groups\[0\]'),
    (dict(groups=(('head', -0.1, 1),)), 'multipliers of 0 or more'),
    (dict(groups=(('(', 0.1, 1),)), 'does not compile'),
    (dict(freeze='re:('), 'optimizer.freeze.*does not compile'),
    (dict(freeze='expert'), r"freeze: got 'expert'.*all_but_NAME with NAME one of experts \(routed"
     r".*head \(.*Did you mean 'experts'\?"),
    (dict(freeze='all_but_'), 'optimizer.freeze')])
def test_errors(settings, message):
  with pytest.raises(ConfigError, match=message):
    OptimizerConfig(**settings)


def test_groups_survive_a_config_file_and_json():
  config = settings.default(vit.config('tiny'))
  config.optimizer.groups = (('^head/', 10, 1), ('bias', 2.0, 0.0))
  config.optimizer.freeze = 'attention'
  run = settings.resolve(config)
  assert run.optimizer.groups == (('^head/', 10.0, 1.0), ('bias', 2.0, 0.0))
  again = settings.from_dict(json.loads(settings.to_json(run)))
  assert again == run and hash(again.optimizer) == hash(run.optimizer)
  assert settings.to_json(again) == settings.to_json(run)
