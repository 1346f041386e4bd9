"""moejax equals Hugging Face transformers, by golden arrays that torch made (make_golden.py)."""

import dataclasses

import numpy as np
import pytest

from moejax import nn
from moejax.models import attention
from tests.parity import compare


@pytest.mark.parametrize('name', compare.CASES)
def test_logits_and_gradients_equal_hugging_face(name):
  errors = compare.errors(name, compare.load(name))
  assert len(errors) > 12
  assert {k: v for k, v in errors.items() if not v < compare.TOLERANCE} == {}


@pytest.mark.parametrize('name, changes', [
    ('vit', {'activation': 'gelu_tanh'}), ('vit', {'norm_eps': 1e-6}), ('vit', {'num_heads': 4}),
    ('t5', {'relative_max_distance': 20}), ('t5', {})], ids=str)
def test_another_model_is_seen(name, changes, monkeypatch):
  """Weights are scaled so that a wrong GELU shows; distances reach past the last bucket."""
  if not changes:   # T5's GELU is no setting
    monkeypatch.setitem(nn.ACTIVATIONS, 'gelu_tanh', nn.ACTIVATIONS['gelu_erf'])
  wrong = dataclasses.replace(compare.CASES[name][0], **changes)
  errors = compare.errors(name, compare.load(name), wrong, gradients=False)
  gelu = not changes or 'activation' in changes
  assert errors['logits'] > (1e-5 if gelu else 10 * compare.TOLERANCE)


def test_relative_buckets_equal_hugging_face():
  golden = compare.load('buckets')
  distance = golden.pop('distance')
  assert len(golden) == 6
  for key, expected in golden.items():
    n, far, stack = key.split('/')
    actual = attention.relative_buckets(distance, int(n), int(far), stack == 'encoder')
    np.testing.assert_array_equal(actual, expected, err_msg=key)
