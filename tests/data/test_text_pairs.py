"""Pairs of texts: their batches by hand, on any number of hosts, with references."""

import dataclasses

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import registry, text_pairs
from moejax.data.text_pairs import Pair

TEXT = data.TextConfig(encoder_length=5, decoder_length=4)
CONFIG = data.DataConfig(source='stdlib_tasks', batch_size=8, eval_batch_size=8, text=TEXT)


def lettered(n, **kwargs):
  """n pairs: letters 'b', 'c', ... as inputs and their predecessors as targets."""
  return [Pair(bytes([98 + i]) * (i % 3 + 1), bytes([97 + i]), i % 2, **kwargs) for i in range(n)]


@pytest.fixture
def use(monkeypatch):
  """use(splits, ...): makes them the source that every config reads, and returns it."""
  def use(splits, metric='exact_match', tasks=('even', 'odd')):
    source = text_pairs.pair_source(splits, metric, tasks)
    monkeypatch.setattr(registry, 'load', lambda config: source)
    return source
  return use


@pytest.fixture
def source(use):
  """22 / 11 / 3 pairs."""
  return use({'train': lettered(22), 'validation': lettered(11), 'test': lettered(3)})


def finish(processor, *examples):
  draws = [processor.draw(e._asdict(), None) for e in examples]
  return processor.finish({k: np.stack([d[k] for d in draws]) for k in draws[0]})


def test_batches_by_hand():
  # Byte ids are bytes + 3: a is 100. Four bytes and eos fill the input; a fifth is cut at its end.
  batch = finish(text_pairs.PairProcessor(TEXT), Pair(b'abcde', b'ab', 1), Pair(b'abcd', b'abc'),
                 Pair(b'', b''))
  assert batch['encoder_input'].tolist() == [[100, 101, 102, 103, 1], [100, 101, 102, 103, 1],
                                             [1, 0, 0, 0, 0]]
  assert batch['target'].tolist() == [[100, 101, 1, 0], [100, 101, 102, 1], [1, 0, 0, 0]]
  assert batch['decoder_input'].tolist() == [[0, 100, 101, 1], [0, 100, 101, 102], [0, 1, 0, 0]]
  assert batch['weight'].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
  assert batch['task'].tolist() == [1, 0, 0]
  assert {k: v.dtype.name for k, v in batch.items()} == {
      'encoder_input': 'int32', 'target': 'int32', 'decoder_input': 'int32', 'weight': 'float32',
      'task': 'int32'}


def test_targets_are_never_cut(use):
  """The longest one is checked at build."""
  use({'train': lettered(3), 'validation': [*lettered(9), Pair(b'x', b'long' * 2)],
       'test': [Pair(b'y', b'longer' * 2), Pair(b'z', b'long')]})
  with pytest.raises(ConfigError, match=r"data.text.decoder_length: got 4.*at least 13.*b'longer"):
    data.build(CONFIG, seed=0)
  data.build(dataclasses.replace(CONFIG, text=data.TextConfig(decoder_length=13)), seed=0)


def test_batches_hold_what_the_source_holds(source):
  dataset = data.build(CONFIG, seed=0)
  assert (dataset.kind, dataset.tasks, dataset.metric) == ('seq2seq', ('even', 'odd'),
                                                           'exact_match')
  assert (dataset.vocab_size, dataset.encoder_length, dataset.decoder_length) == (384, 5, 4)
  decode, seen = dataset.vocabulary.decode, []
  hosts = [data.build(CONFIG, seed=0, host=h, hosts=4) for h in range(4)]
  for step, batch in enumerate(dataset.train_batches(0, 11)):
    np.testing.assert_array_equal(
        batch['example'], np.concatenate([h.train_batch(step)['example'] for h in hosts]))
    assert set(batch) == {'encoder_input', 'decoder_input', 'target', 'weight', 'task', 'example',
                          'index'}
    for i in range(8):
      example = source.splits['train'][batch['example'][i]]
      assert decode(batch['encoder_input'][i]).encode() == example['input']
      assert decode(batch['target'][i]).encode() == example['target']
      assert batch['task'][i] == example['task']
      seen.append(int(batch['example'][i]))
  assert np.bincount(seen).tolist() == [4] * 22   # 88 examples: four epochs


def test_filler_examples_are_zero_and_have_no_answer(source):
  dataset = data.build(CONFIG, seed=0)
  (first, last) = dataset.eval_batches('validation')
  for key, value in last.items():
    assert key == 'index' or not value[3:].any()
  assert last['index'].tolist() == list(range(8)) and last['weight'][:3].any(1).all()
  answers = dataset.references('validation', first) + dataset.references('validation', last)
  assert answers[11:] == [()] * 5
  assert sorted(answers[:11]) == [(chr(97 + i),) for i in range(11)]


def test_references_name_every_right_answer(use):
  several = lettered(4, references=('é'.encode(), b'y'))
  use({'train': lettered(4), 'validation': several, 'test': several})
  dataset = data.build(CONFIG, seed=0)
  (batch,) = dataset.eval_batches()
  assert dataset.references('validation', batch) == [('é', 'y')] * 4 + [()] * 4


def test_answers_are_those_of_the_split(source):
  with pytest.raises(ConfigError, match="Did you mean 'validation'"):
    data.build(CONFIG, seed=0).answers('valid')
  right, task = data.build(dataclasses.replace(CONFIG, eval_examples=5), seed=0).answers('train')
  assert right == [(chr(97 + i),) for i in range(22)] and task == [i % 2 for i in range(22)]


def test_fingerprint_follows_every_pair_and_what_shapes_it(use):
  train = lettered(22)

  def fingerprint(train=train, metric='exact_match', **text):
    use({'train': train, 'validation': lettered(11), 'test': lettered(3)}, metric)
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **text))
    return data.build(config, seed=0).fingerprint
  base = fingerprint()
  # Span corruption's settings do not touch pairs.
  assert fingerprint(noise_density=0.5, mean_span_length=1.0, window=2) == base
  others = [fingerprint(encoder_length=6), fingerprint(decoder_length=5), fingerprint(train[::-1]),
            fingerprint(metric='pronunciation')]
  for change in ({'input': b'z'}, {'target': b'z'}, {'task': 1}, {'references': (b'z',)}):
    others.append(fingerprint([train[0]._replace(**change), *train[1:]]))
  assert len({base, *others}) == 1 + len(others)


def test_only_pairs_have_answers():
  dataset = data.build(data.DataConfig(source='digits'), seed=0)
  assert (dataset.tasks, dataset.metric) == ((), '')
  for call in (lambda: dataset.references('test', dataset.train_batch(0)),
               lambda: dataset.answers('test')):
    with pytest.raises(ConfigError, match="data.source: got 'digits'.*a source of pairs"):
      call()

