"""Sums over a split, with a model whose logits are in the batch; decoding on many devices."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.evaluation import evaluate
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import parallel
from tests.models.helpers import made

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
    numbers = np.arange(start, start + size)
    at = np.minimum(numbers, 4)
    yield {'logits': np.log(PROBS[at]), 'label': LABEL[at],
           'weight': (numbers < 5).astype(np.float32)}


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


def test_params_reach_the_model_and_all_sums_reach_reduce():
  step = jax.jit(evaluate.make_eval_step(apply, lambda tree: jax.tree.map(lambda x: 2 * x, tree)))
  sums = evaluate.total(step, {'scale': jnp.float32(0)}, batches(5))   # all logits 0
  assert sums['loss'] == pytest.approx(2 * 5 * LN2, rel=1e-6) and sums['weight'] == 10
  assert sums['layers']['encoder']['layers']['01']['tokens'] == 30


def test_sums_are_added_in_float64():
  """2^24 + 1 is no float32."""
  step = lambda params, x: {'loss': np.float32(x)}
  assert evaluate.total(step, {}, [2.0**24, 1, 1, 1])['loss'] == 2**24 + 3
  with pytest.raises(ValueError, match='the split is empty'):
    evaluate.total(step, {}, [])


class Letters:
  """Ids from 3 on are letters."""

  def decode(self, ids):
    return ''.join(chr(ord('a') + i - 3) for i in ids if i >= 3)


def test_predictions_leave_fillers_out_and_stop_in_time():
  ids = np.array([[3, 1, 0], [9, 9, 9], [4, 5, 1]], np.int32)
  seen = []

  def step(params, batch):
    seen.append(batch)
    return {'ids': params + ids, 'real': np.array([True, False, batch == 0])}
  run = functools.partial(evaluate.predictions, step, 0, range(3), Letters())
  assert run() == ['a', 'bc', 'a', 'a'] and seen == [0, 1, 2]
  seen.clear()
  assert run(examples=2) == ['a', 'bc'] and seen == [0]
  assert run(examples=3) == ['a', 'bc', 'a']
  assert evaluate.predictions(step, 0, [], Letters()) == []


SEQ2SEQ = t5.config('tiny', encoder_layers=1, decoder_layers=1,
                    encoder_moe=MoEConfig(layers='0', num_experts=4, group_size=2 * 5),
                    decoder_moe=MoEConfig(layers='0', num_experts=4, router='top_k'))


def sources(B=16):
  """Sources of all lengths; a filler on some devices and not on others."""
  rng = np.random.default_rng(0)
  source = rng.integers(1, 64, (B, 5)) * (np.arange(5) < rng.integers(1, 6, (B, 1)))
  weight = np.ones((B, 4), np.float32)
  weight[:, 2:] = 0
  weight[[3, 14, 15]] = source[[3, 14, 15]] = 0
  return {'encoder_input': source.astype(np.int32), 'weight': weight,
          'target': np.zeros((B, 4), np.int32)}


@functools.cache
def decoded(way, beams):
  name, mesh, n = {
      'one': ('mesh', MeshConfig(), 1), 'pmap': ('pmap', MeshConfig(), 8),
      'mesh': ('mesh', MeshConfig(data=1, fsdp=2, expert=2, model=2), 8)}[way]
  where = parallel.make(name, mesh, jax.devices()[:n])
  gather = lambda x: x
  if name == 'pmap':
    gather = lambda x: jax.lax.all_gather(x, parallel.PMAP_AXIS, tiled=True)
  model, params, _ = made(SEQ2SEQ)
  step = evaluate.make_decode_step(model, evaluate.DecodeConfig(beams=beams), gather)
  params = jax.device_put(params, where.shardings(params))
  return jax.device_get(where.jit(step)(params, where.put(sources())))


@pytest.mark.parametrize('way', ['pmap', 'mesh'])
@pytest.mark.parametrize('beams', [1, 3])
def test_many_devices_decode_as_one(way, beams):
  one, many = decoded('one', beams), decoded(way, beams)
  assert one['ids'].shape == (16, 4) and len({tuple(ids) for ids in one['ids'].tolist()}) > 6
  np.testing.assert_array_equal(one['real'], sources()['weight'].any(1))
  np.testing.assert_array_equal(many['real'], one['real'])
  np.testing.assert_array_equal(many['ids'], one['ids'])


@pytest.mark.parametrize('config, length', [
    (evaluate.DecodeConfig(), 4), (evaluate.DecodeConfig(max_length=7), 7),
    (evaluate.DecodeConfig(beams=2, max_length=2), 2)])
def test_decode_config_reaches_the_search(config, length, monkeypatch):
  """length: of the targets, or as set."""
  calls = []

  def search(*args):
    calls.append(args[3:])
    return jnp.zeros((16, args[3]), jnp.int32)
  monkeypatch.setattr(evaluate.decoding, 'greedy', search)
  monkeypatch.setattr(evaluate.decoding, 'beam_search', search)
  model = types.SimpleNamespace(decode_step=print, config=SEQ2SEQ)
  ids = evaluate.make_decode_step(model, config)({}, sources())['ids']
  assert ids.shape == (16, length)
  assert calls == [(length,) if config.beams == 1 else (length, config.beams, config.alpha)]


def test_what_cannot_decode_is_refused():
  with pytest.raises(ConfigError, match="model.family: got 'vit', allowed: t5"):
    evaluate.make_decode_step(models.build(vit.config('tiny')), evaluate.DecodeConfig())
  for key, value in (('beams', 0), ('alpha', -0.1), ('max_length', -1), ('examples', -1)):
    with pytest.raises(ConfigError, match=f'decode.{key}: got {value}'):
      evaluate.DecodeConfig(**{key: value})
