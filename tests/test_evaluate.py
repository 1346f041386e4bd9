"""Sums over a split, whatever its batches, with a model whose logits stand in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import evaluate

LN2 = np.log(2)
# Five examples: log probabilities of two classes, and labels.
PROBS = np.array([[1/2, 1/2], [1/4, 3/4], [3/4, 1/4], [1/4, 3/4], [1/2, 1/2]], np.float32)
LABEL = np.array([0, 0, 1, 1, 1], np.int32)
# Loss: ln 2, ln 4, ln 4, ln 4/3, ln 2; right is the first (a tie goes to class 0) and the fourth.
LOSS = LN2 + 2 * LN2 + 2 * LN2 + np.log(4 / 3) + LN2


def apply(params, batch, *, train, key=None):
  assert not train and key is None
  real = batch['weight'] > 0
  load = jnp.stack([(real & (batch['label'] == e)).sum() for e in (0, 1)]).astype(jnp.float32)
  aux = {'encoder/layers/01': {'tokens': 3.0 * real.sum(), 'load': load},
         'encoder/layers/03': {'tokens': 3.0 * real.sum(), 'load': load[::-1]}}
  return params['scale'] * batch['logits'], aux


def batches(size):
  """The examples in batches of one size; the last is filled up with examples of weight 0."""
  for start in range(0, 5, size):
    rows = np.arange(start, start + size)
    at = np.minimum(rows, 4)
    yield {'logits': np.log(PROBS[at]), 'label': LABEL[at],
           'weight': (rows < 5).astype(np.float32)}


@pytest.mark.parametrize('size', [1, 2, 5])
def test_total_is_the_whole_split_whatever_the_batches(size):
  step = jax.jit(evaluate.make_eval_step(apply))
  sums = evaluate.total(step, {'scale': jnp.float32(1)}, batches(size))
  assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {np.dtype(np.float64)}
  assert sums['loss'] == pytest.approx(LOSS, rel=1e-6)
  assert (sums['correct'], sums['weight']) == (2, 5)
  layers = sums['layers']['encoder']['layers']
  assert set(layers) == {'01', '03'}
  assert layers['01']['tokens'] == 15 and layers['03']['tokens'] == 15
  np.testing.assert_array_equal(layers['01']['load'], [2, 3])   # two labels 0, three labels 1
  np.testing.assert_array_equal(layers['03']['load'], [3, 2])


def test_params_reach_the_model():
  step = jax.jit(evaluate.make_eval_step(apply))
  sums = evaluate.total(step, {'scale': jnp.float32(0)}, batches(5))
  assert sums['loss'] == pytest.approx(5 * LN2, rel=1e-6)       # all logits 0


def test_reduce_is_given_everything():
  step = jax.jit(evaluate.make_eval_step(apply, lambda tree: jax.tree.map(lambda x: 2 * x, tree)))
  sums = evaluate.total(step, {'scale': jnp.float32(1)}, batches(5))
  assert sums['loss'] == pytest.approx(2 * LOSS, rel=1e-6) and sums['weight'] == 10
  assert sums['layers']['encoder']['layers']['01']['tokens'] == 30


def test_sums_are_added_in_float64():
  """2^24 + 1 is no float32."""
  seen = evaluate.total(lambda params, x: {'loss': np.float32(x)}, {}, [2.0**24, 1, 1, 1])
  assert seen['loss'] == 2**24 + 3


def test_an_empty_split_is_an_error():
  with pytest.raises(ValueError, match='the split is empty'):
    evaluate.total(evaluate.make_eval_step(apply), {}, [])
