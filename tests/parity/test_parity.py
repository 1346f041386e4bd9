"""moejax equals Hugging Face transformers, by golden arrays that torch made (make_golden.py)."""

import dataclasses

import numpy as np
import pytest

from moejax import nn
from moejax.models import attention
from tests.parity import compare, names


@pytest.mark.parametrize('name', compare.CASES)
def test_logits_and_gradients_equal_hugging_face(name):
  errors = compare.errors(name, compare.load(name))
  assert len(errors) > 12
  assert {k: v for k, v in errors.items() if not v < compare.TOLERANCE} == {}


def test_the_t5_case_covers_padding_distances_and_widths():
  """Padding on both sides, distances past the last bucket, head widths that do not add up to D."""
  c, inputs = compare.T5_CONFIG, compare.group(compare.load('t5'), 'input')
  assert (inputs['encoder_input'] == 0).any() and (inputs['weight'] == 0).any()
  assert inputs['encoder_input'].shape[1] > 2 * c.relative_max_distance
  assert inputs['decoder_input'].shape[1] > c.relative_max_distance
  assert c.num_heads * c.d_kv != c.d_model


def test_wrong_gelu_is_seen_in_vit():
  wrong = dataclasses.replace(compare.VIT_CONFIG, activation='gelu_tanh')
  assert compare.errors('vit', compare.load('vit'), wrong, gradients=False)['logits'] > 1e-5


def test_wrong_gelu_is_seen_in_t5(monkeypatch):
  monkeypatch.setitem(nn.ACTIVATIONS, 'gelu_tanh', nn.ACTIVATIONS['gelu_erf'])
  assert compare.errors('t5', compare.load('t5'), gradients=False)['logits'] > 1e-5


@pytest.mark.parametrize('change', [{'norm_eps': 1e-6}, {'num_heads': 4}], ids=str)
def test_other_vit_differs(change):
  wrong = dataclasses.replace(compare.VIT_CONFIG, **change)
  errors = compare.errors('vit', compare.load('vit'), wrong, gradients=False)
  assert errors['logits'] > 10 * compare.TOLERANCE


def test_other_relative_distance_differs():
  wrong = dataclasses.replace(compare.T5_CONFIG, relative_max_distance=20)
  errors = compare.errors('t5', compare.load('t5'), wrong, gradients=False)
  assert errors['logits'] > 10 * compare.TOLERANCE


def test_relative_buckets_equal_hugging_face():
  golden = compare.load('buckets')
  distance = golden.pop('distance')
  assert len(golden) == 6
  for key, expected in golden.items():
    n, far, stack = key.split('/')
    actual = attention.relative_buckets(distance, int(n), int(far), stack == 'encoder')
    np.testing.assert_array_equal(actual, expected, err_msg=key)


def test_unknown_hugging_face_name_is_an_error():
  with pytest.raises(ValueError, match='encoder.block.0.novelty: matched by 0 rows'):
    names.to_moejax(names.T5, {'encoder.block.0.novelty': np.zeros(1)})
