"""Each pathology on a real model of one MoE layer, and silence on healthy ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from moejax import losses, models, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.train import config as settings
from moejax.train import metrics, optimizer, router_health
from moejax.train.schedule import ScheduleConfig
from moejax.train.step import StepSettings, make_train_step
from tests.models.helpers import random_params
from tests.train import small

TOP_1 = MoEConfig(layers='0', num_experts=4, router='top_k', k=1, capacity_factor=4.0,
                  eval_capacity_factor=4.0)
TOP_2 = dataclasses.replace(TOP_1, k=2, renormalize=True)
EXPERT_CHOICE = MoEConfig(layers='0', num_experts=4, renormalize=True, group_size=16)
HALVES = dataclasses.replace(EXPERT_CHOICE, num_experts=2, eval_capacity_factor=1.0)


def run_config(moe, freeze='', steps_of_run=100, warmup=10):
  return settings.RunConfig(
      model=vit.config('tiny', num_layers=1, moe=moe), steps=steps_of_run,
      optimizer=optimizer.OptimizerConfig(name='sgd', freeze=freeze),
      schedule=ScheduleConfig(warmup_steps=warmup))


@functools.cache
def built(moe):
  model = models.build(run_config(moe).model)
  return model, random_params(model.shapes)


def with_router(params, change):
  """params with the router's kernel (D, E) put through `change`."""
  node = params['encoder']['layers']['00']
  moe = node['moe'] | {'router': {'kernel': change(node['moe']['router']['kernel'])}}
  return params | {'encoder': params['encoder'] | {'layers': {'00': node | {'moe': moe}}}}


@functools.cache
def eval_step(moe):
  def sums(params, batch):
    logits, aux = built(moe)[0].apply(params, batch)
    return {**losses.loss_sums(logits, batch), 'layers': trees.unflatten(aux)}
  return jax.jit(sums)


def evaluated(moe, change=lambda kernel: kernel):
  sums = eval_step(moe)(with_router(built(moe)[1], change), small.images(8))
  return metrics.summarize(jax.device_get(sums))


def trained(moe, params, freeze='', steps=3):
  """Metrics of the last of some train steps."""
  config = run_config(moe, freeze)
  settings = StepSettings(config.optimizer, lambda step: 0.1)
  train_step = jax.jit(make_train_step(built(moe)[0], settings))
  state = small.state(config.optimizer, params)
  for _ in range(steps):
    state, _ = train_step(dataclasses.replace(state, window={}), small.images(8))
  return metrics.summarize(jax.device_get(state.window))


def found(values, moe, steps=50, **kwargs):
  lines = router_health.warnings(values, run_config(moe, **kwargs), steps)
  for line in lines.values():
    assert line.startswith('warning: ') and '\n' not in line and 'encoder/00: ' in line
  return lines


@pytest.mark.parametrize('moe', [TOP_1, TOP_2, EXPERT_CHOICE])
def test_silent_on_a_healthy_model(moe):
  assert found(evaluated(moe), moe) == {}


def test_silent_on_healthy_training():
  values = trained(TOP_1, built(TOP_1)[1])
  assert values['moe/encoder/00/router_grad_norm'] > 1e-4 * values['grad_norm']
  assert found(values, TOP_1) == {}


def test_equal_router_rows_send_all_tokens_to_the_same_experts():
  same = lambda kernel: jnp.broadcast_to(kernel[:, :1], kernel.shape)
  lines = found(evaluated(TOP_1, same), TOP_1)
  assert set(lines) == {'collapse'} and '3 of 4 experts got no token' in lines['collapse']
  lines = found(evaluated(TOP_2, same), TOP_2)
  assert set(lines) == {'collapse'} and '2 of 4 experts got no token' in lines['collapse']
  # Expert choice: each of 4 takes half of the tokens, and all the same half.
  lines = found(evaluated(EXPERT_CHOICE, same), EXPERT_CHOICE)
  assert set(lines) == {'collapse'}
  assert '4 experts together pick 50% of tokens, each picks 50%' in lines['collapse']


def test_a_favourite_expert_is_seen_though_the_others_live():
  values = evaluated(TOP_1) | {'moe/encoder/00/max_violation': 1.6}   # 2.6 / 4 = 65 % of tokens
  assert 'asked for by 65% of tokens' in found(values, TOP_1)['collapse']
  values['moe/encoder/00/max_violation'] = 1.4                        # 60 %; halfway is 62.5 %
  assert found(values, TOP_1) == {}
  # With k = 2 of 4 an even share is already half, and the worst all tokens: halfway is 75 %.
  values = evaluated(TOP_2) | {'moe/encoder/00/max_violation': 0.4}   # 1.4 * 2 / 4 = 70 %
  assert found(values, TOP_2) == {}
  values['moe/encoder/00/max_violation'] = 0.6                        # 80 %
  assert 'asked for by 80% of tokens' in found(values, TOP_2)['collapse']


def test_a_huge_router_is_saturated():
  lines = found(evaluated(TOP_1, lambda kernel: kernel * 1e3), TOP_1)
  assert 'saturation' in lines and 'root mean square' in lines['saturation']
  # Less than that, and probabilities are one-hot while logits still look harmless.
  values = evaluated(TOP_1, lambda kernel: kernel * 30)
  assert values['moe/encoder/00/z'] < 1e4
  assert 'nats' in found(values, TOP_1)['saturation']


def test_equal_experts_give_their_router_no_gradient():
  """Weights that sum to 1 of experts that all return the same: frozen copies of one MLP."""
  params = built(TOP_2)[1]
  node = params['encoder']['layers']['00']
  experts = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), node['moe']['experts'])
  layer = node | {'moe': node['moe'] | {'experts': experts}}
  params = params | {'encoder': params['encoder'] | {'layers': {'00': layer}}}
  values = trained(TOP_2, params, freeze='experts')
  lines = found(values, TOP_2)
  assert set(lines) == {'zero_gradient'} and 'gradient norm' in lines['zero_gradient']
  assert values['moe/encoder/00/load_max_over_mean'] < 2   # its load looks well

  # Not before the warm-up's end, the middle of a shorter run, or the experts' first updates.
  at = lambda steps, **kwargs: bool(found(values, TOP_2, steps=steps, **kwargs))
  assert [at(10), at(11)] == [False, True]
  assert [at(6, steps_of_run=13), at(7, steps_of_run=13)] == [False, True]
  assert [at(2, warmup=0), at(3, warmup=0)] == [False, True]


def test_frozen_routers_are_not_blamed():
  values = trained(TOP_1, built(TOP_1)[1], freeze='router', steps=1)
  assert values['grad_norm'] > 0 and found(values, TOP_1, freeze='router') == {}


def test_single_experts_under_renormalisation():
  """Two experts, each with half of the slots: by softmax over two they pick opposite halves."""
  values = evaluated(HALVES)
  assert values['moe/encoder/00/single'] == 1
  lines = found(values, HALVES)
  assert set(lines) == {'single'} and '100% of tokens' in lines['single']
  plain = dataclasses.replace(HALVES, renormalize=False)
  assert found(values, plain) == {}
  top_p = dataclasses.replace(TOP_2, router='top_p')
  many = evaluated(TOP_2) | {'moe/encoder/00/single': 0.6}
  assert set(found(many, top_p)) == {'single'}
  assert found(many, TOP_2) == {}   # dropped after renormalising: a weight below 1 stays


def test_a_single_expert_is_no_pathology():
  values = evaluated(TOP_1)
  values |= {'moe/encoder/00/entropy': 0.0, 'moe/encoder/00/router_grad_norm': 0.0,
             'moe/encoder/00/max_violation': 0.0, 'grad_norm': 1.0}
  assert set(found(values, TOP_1)) == {'zero_gradient', 'saturation'}
  assert found(values, dataclasses.replace(TOP_1, num_experts=1)) == {}


def test_the_bound_of_a_vanishing_gradient():
  """A millionth of the clipped gradient: the router's norm comes clipped, the whole's not."""
  small = {'router_grad_norm': 0.9e-6}
  assert 'gradient norm 9e-07 of 1 in all' in router_health.zero_gradient(small, 1.0, 0.0)
  assert router_health.zero_gradient(small, 1000.0, 1.0)
  assert not router_health.zero_gradient(small, 1000.0, 0.5)
  assert not router_health.zero_gradient({'router_grad_norm': 1.1e-6}, 1.0, 0.0)
  assert not router_health.zero_gradient({'router_grad_norm': 0.0}, 0.0, 0.0)   # nothing is learnt
  assert not router_health.zero_gradient({}, 1.0, 0.0)             # no router to speak of


def test_all_layers_are_named_on_one_line_and_each_kind_is_told_once():
  config = dataclasses.replace(run_config(TOP_1), model=vit.config(
      'tiny', num_layers=2, moe=dataclasses.replace(TOP_1, layers='0,1')))
  one = {k.removeprefix('moe/encoder/00/'): v for k, v in evaluated(TOP_1).items() if '/' in k}
  layer = lambda n, **changes: {f'moe/encoder/{n}/{k}': v for k, v in (one | changes).items()}
  watch = router_health.Watch(config, first=1000)
  assert watch.lines(1050, layer('00') | layer('01')) == []
  collapsed = layer('00', dead_experts=2) | layer('01', dead_experts=3)
  line, = watch.lines(1100, collapsed)
  assert 'encoder/00: 2 of 4' in line and 'encoder/01: 3 of 4' in line
  assert watch.lines(1150, collapsed) == []
  line, = watch.lines(1200, collapsed | {'moe/encoder/00/z': 1e5})
  assert 'saturated' in line and 'encoder/01' not in line
  # The run's own steps count, not the parent's 1000.
  still = layer('00', router_grad_norm=0.0) | layer('01') | {'grad_norm': 1.0}
  assert router_health.Watch(config, first=1000).lines(1005, still) == []
  assert len(router_health.Watch(config, first=1000).lines(1011, still)) == 1


@pytest.mark.parametrize('name', ['loss', 'grad_norm'])
def test_training_that_diverges_is_ended(name):
  router_health.check_finite({'loss': 1.0, 'grad_norm': 2.0}, 50, None)
  with pytest.raises(ConfigError, match=f'step 50: train/{name}: got nan.*learning_rate.*'
                                        'The last checkpoint is of step 40'):
    router_health.check_finite({'loss': 1.0, name: float('nan')}, 50, 40)
  with pytest.raises(ConfigError, match='There is no checkpoint yet'):
    router_health.check_finite({name: float('inf')}, 50, None)


def test_both_stacks_of_a_t5():
  """Each with its own settings: only the encoder renormalises."""
  moe = dataclasses.replace(EXPERT_CHOICE, layers='1', group_size=0)
  decoder = dataclasses.replace(TOP_1, layers='0', num_experts=8)
  config = dataclasses.replace(run_config(TOP_1), model=t5.config(
      'tiny', encoder_moe=moe, decoder_moe=decoder))
  healthy = {'z': 4.0, 'entropy': 1.0, 'single': 0.9, 'unchosen': 0.0, 'dead_experts': 3,
             'experts_per_token': 1.0}
  values = {f'moe/{name}/{k}': v for name in ('encoder/01', 'decoder/00')
            for k, v in healthy.items()}
  lines = router_health.warnings(values, config, 50)
  assert set(lines) == {'collapse', 'single'}   # 3 of 4 are dead there, here 3 of 8 are not half
  assert all('encoder/01: ' in line and 'decoder/00' not in line for line in lines.values())
