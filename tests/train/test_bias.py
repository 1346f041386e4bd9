"""Loss-free balancing in the train step: an example asks for the expert of highest score + bias."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.sharding import MeshConfig
from moejax.train import optimizer, parallel
from moejax.train.step import StepSettings, make_train_step
from tests.train import small

SGD = optimizer.OptimizerConfig(name='sgd', clip_norm=0.0)


def half(step):
  return jnp.float32(0.5)


def choosing(params, batch, *, train, key):
  moe = params['decoder']['layers']['03']['moe']['router']
  real = (batch['weight'] > 0).astype(jnp.float32)
  chosen = jax.nn.one_hot((batch['scores'] + moe['no_grad']['bias']).argmax(-1), 3)
  logits = jnp.stack([params['w'] * real, jnp.zeros_like(real)], -1)
  aux = {'tokens': real.sum(), 'asked': (chosen * real[:, None]).sum(0)}
  return logits, {'decoder/layers/03': aux}


def with_rates(**rates):
  """A model config with the bias rates of its stacks."""
  stacks = {name: types.SimpleNamespace(moe=types.SimpleNamespace(bias_rate=rate))
            for name, rate in rates.items()}
  return types.SimpleNamespace(stacks=lambda: stacks)


# The rates of the two stacks differ, so that taking the wrong one shows.
CHOOSING = types.SimpleNamespace(
    apply=choosing, config=with_rates(encoder=99.0, decoder=0.25),
    token_counts=lambda batch: {'decoder': (batch['weight'] > 0).sum()})
# Asked of experts: 4, 2, 0 by the six real ones, mean 2; fillers would make it 4, 2, 2.
SCORES = {'scores': jnp.array([[.4, 0, 0], [.9, 0, .1], [0, .5, 0], [0, .9, 0], [.9, 0, 0],
                               [.9, 0, 0], [0, 0, 9], [0, 0, 9]]),
          'label': jnp.zeros(8, int), 'weight': jnp.array([1., 1., 1., 1., 1., 1., 0., 0.])}


def choosing_state(bias=(0., 0., 0.), config=SGD):
  router = {'kernel': jnp.zeros((2, 3)), 'no_grad': {'bias': jnp.array(bias)}}
  params = {'w': jnp.zeros(()), 'decoder': {'layers': {'03': {'moe': {'router': router}}}}}
  return small.state(config, params)


def choose(state, batch=SCORES, config=SGD, model=CHOOSING, **settings):
  return jax.jit(make_train_step(model, StepSettings(config, half, **settings)))(state, batch)[0]


def bias(state):
  return np.asarray(state.params['decoder']['layers']['03']['moe']['router']['no_grad']['bias'])


@pytest.mark.parametrize('microbatches', [1, 2, 4])
def test_biases_move_once_a_step_from_all_the_load_and_for_the_next_batch(microbatches):
  """Up where asked less than the mean, down where more, not at it; by the rate of their stack.

  4, 2, 0 -> (-1/4, 0, 1/4). Then the first example, 0.4 - 1/4 against 1/4, goes to the third
  expert: asked 3, 2, 1 -> (-1/2, 0, 1/2). Microbatch by microbatch it would be other loads.
  """
  state = choose(choosing_state(), microbatches=microbatches)
  np.testing.assert_array_equal(bias(state), [-0.25, 0, 0.25])
  layer = lambda state: state.window['layers']['decoder']['layers']['03']
  np.testing.assert_array_equal(layer(state)['asked'], [4, 2, 0])   # by the biases it came with
  assert float(layer(state)['router_bias_max']) == 0.25
  state = choose(state, microbatches=microbatches)
  np.testing.assert_array_equal(bias(state), [-0.5, 0, 0.5])
  np.testing.assert_array_equal(layer(state)['asked'], [7, 4, 1])   # a window of two steps
  assert float(layer(state)['router_bias_max']) == 0.75


def test_biases_rest_without_tokens_and_when_frozen():
  fillers = SCORES | {'weight': jnp.zeros(8)}
  np.testing.assert_array_equal(bias(choose(choosing_state((1., 2., 3.)), fillers)), [1, 2, 3])
  frozen = dataclasses.replace(SGD, freeze='router')
  state = choose(choosing_state((1., 0., -9.)), config=frozen)
  np.testing.assert_array_equal(bias(state), [1, 0, -9])
  others = dataclasses.replace(SGD, freeze='experts')
  assert (bias(choose(choosing_state(), config=others)) == [-0.25, 0, 0.25]).all()


@pytest.mark.parametrize('way', ['pmap', 'mesh'])
def test_biases_are_the_same_on_four_devices(way):
  """Two examples a device: from its own load each would move otherwise."""
  where = parallel.make(way, MeshConfig(), jax.devices()[:4])
  put = lambda x: jax.device_put(x, where.replicated())
  state = jax.tree.map(put, choosing_state())
  make = lambda reduce: make_train_step(CHOOSING, StepSettings(SGD, half), reduce)
  window = jax.eval_shape(make(lambda x: x), state, SCORES)[0].window
  state = dataclasses.replace(
      state, window=jax.tree.map(lambda s: put(jnp.zeros(s.shape, s.dtype)), window))
  batch = where.put(jax.tree.map(np.asarray, SCORES))
  train_step = where.jit_step(make(where.reduce), state)
  for expected in ([-0.25, 0, 0.25], [-0.5, 0, 0.5]):
    state, _ = train_step(state, batch)
    np.testing.assert_array_equal(bias(state), expected)
