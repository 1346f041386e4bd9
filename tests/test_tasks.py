"""Loss and accuracy as sums, by hand: logits are logs of halves and quarters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import tasks

loss_sums = jax.jit(tasks.loss_sums)
LN2 = np.log(2)
# Probabilities of the targets of three tokens: 1/2 (and the most probable), 1/4 (not), 1/4 (not).
PROBS = np.array([[[1/2, 1/4, 1/4], [1/4, 1/4, 1/2], [1/2, 1/4, 1/4]]], np.float32)
TARGET = np.array([[0, 0, 2]])


def sums(weight, shift=0.0, **batch):
  logits = np.log(PROBS) + np.float32(shift)
  return loss_sums(logits, {'target': TARGET, 'weight': np.array(weight), **batch})


@pytest.mark.parametrize('weight, loss, correct, total', [
    ([[1, 1, 1]], 5 * LN2, 1, 3),            # ln 2 + ln 4 + ln 4
    ([[1., 1., 0.]], 3 * LN2, 1, 2),         # the last is padding
    ([[0, 1, 1]], 4 * LN2, 0, 2),
    ([[0.5, 1., 0.]], 2.5 * LN2, 0.5, 1.5),
    ([[0, 0, 0]], 0, 0, 0)])
def test_seq2seq_by_hand(weight, loss, correct, total):
  found = sums(weight)
  assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(
      ('loss', 'correct', 'weight'), jnp.float32)
  assert float(found['loss']) == pytest.approx(loss, rel=1e-6, abs=1e-6)
  assert (float(found['correct']), float(found['weight'])) == (correct, total)


def test_perplexity():
  """exp(mean nats): probabilities 1/2 and 1/4 have geometric mean 2^-1.5."""
  found = sums([[1, 1, 0]])
  assert np.exp(found['loss'] / found['weight']) == pytest.approx(2**1.5, rel=1e-6)


def test_unnormalised_logits_are_normalised():
  assert float(sums([[1, 1, 1]], shift=7.0)['loss']) == pytest.approx(5 * LN2, rel=1e-5)


def test_classification_reads_label():
  logits = np.log([[1/2, 1/4, 1/4], [1/4, 1/2, 1/4], [1/4, 1/4, 1/2]])
  batch = {'label': np.array([1, 1, 2]), 'weight': np.array([1., 1., 0.])}   # the last is filler
  assert tasks.labels(batch) is batch['label']
  found = loss_sums(logits, batch)
  assert float(found['loss']) == pytest.approx(3 * LN2, rel=1e-6)              # ln 4 + ln 2
  assert (float(found['correct']), float(found['weight'])) == (1, 2)


def test_seq2seq_reads_target_even_beside_a_label():
  assert tasks.labels({'target': 1, 'label': 2}) == 1
  assert float(sums([[1, 1, 1]], label=np.array([0]))['loss']) == pytest.approx(5 * LN2, rel=1e-6)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
  """512 tokens of ln 2 summed in bfloat16 (8 bits) would stop far short of 512 ln 2."""
  logits = jnp.zeros((1, 512, 2), jnp.bfloat16)
  batch = {'target': jnp.zeros((1, 512), int), 'weight': jnp.ones((1, 512), jnp.bfloat16)}
  found = loss_sums(logits, batch)
  assert found['loss'].dtype == jnp.float32
  assert float(found['loss']) == pytest.approx(512 * LN2, rel=1e-6)


def test_gradient_is_probability_minus_one_hot_and_zero_at_padding():
  batch = {'target': TARGET, 'weight': np.array([[1, 0, 1]])}
  gradient = jax.jit(jax.grad(lambda x: loss_sums(x, batch)['loss']))(np.log(PROBS))
  np.testing.assert_allclose(
      gradient, [[[-1/2, 1/4, 1/4], [0, 0, 0], [1/2, 1/4, -3/4]]], atol=1e-6)
