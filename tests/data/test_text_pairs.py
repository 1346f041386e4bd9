"""Pairs of texts: their batches by hand, on any hosts, with references; pairs from TFDS."""

import dataclasses
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moejax import data
from moejax.config import ConfigError
from moejax.data import registry, text_pairs
from moejax.data.text_pairs import Pair

TEXT = data.TextConfig(encoder_length=5, decoder_length=4)
CONFIG = data.DataConfig(source='stdlib_tasks', batch_size=8, eval_batch_size=8, text=TEXT)


def lettered(n, **kwargs):
  """n pairs: letters 'b', 'c', ... to read and their predecessors to say."""
  return [Pair(bytes([98 + i]) * (i % 3 + 1), bytes([97 + i]), i % 2, **kwargs) for i in range(n)]


@pytest.fixture
def source(monkeypatch):
  """A 'stdlib_tasks' of 22 / 11 / 3 pairs."""
  splits = {'train': lettered(22), 'validation': lettered(11), 'test': lettered(3)}
  source = text_pairs.pair_source(splits, 'exact_match', ('even', 'odd'))
  monkeypatch.setitem(registry.REGISTRY, 'stdlib_tasks', lambda config, window_bytes: source)
  return source


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


def test_targets_are_never_cut():
  processor = text_pairs.PairProcessor(TEXT)
  with pytest.raises(ConfigError, match=r"data.text.decoder_length: got 4.*at least 5.*b'abcd'"):
    finish(processor, Pair(b'', b'abcd'))


def test_the_longest_target_is_checked_at_build(source, monkeypatch):
  splits = {'train': lettered(3), 'validation': [*lettered(9), Pair(b'x', b'long' * 2)],
            'test': [Pair(b'y', b'longer' * 2), Pair(b'z', b'long')]}
  long = text_pairs.pair_source(splits, 'exact_match')
  monkeypatch.setitem(registry.REGISTRY, 'stdlib_tasks', lambda config, window_bytes: long)
  with pytest.raises(ConfigError, match='at least 13'):
    data.build(CONFIG, seed=0)
  data.build(dataclasses.replace(CONFIG, text=data.TextConfig(decoder_length=13)), seed=0)


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_share_one_global_batch(source, hosts):
  whole = data.build(CONFIG, seed=3)
  parts = [data.build(CONFIG, seed=3, host=h, hosts=hosts) for h in range(hosts)]
  rows = [(whole.train_batch(n), [p.train_batch(n) for p in parts]) for n in (0, 1, 50)]
  rows += list(zip(whole.eval_batches('validation'),
                   zip(*(p.eval_batches('validation') for p in parts)), strict=True))
  assert len(rows) == 5
  for batch, slices in rows:
    assert set(batch) == {'encoder_input', 'decoder_input', 'target', 'weight', 'task', 'example',
                          'index'}
    for key, value in batch.items():
      np.testing.assert_array_equal(np.concatenate([s[key] for s in slices]), value)
      assert value.dtype == slices[0][key].dtype


def test_batches_hold_what_the_source_holds(source):
  dataset = data.build(CONFIG, seed=0)
  assert (dataset.kind, dataset.tasks, dataset.metric) == ('seq2seq', ('even', 'odd'),
                                                           'exact_match')
  assert (dataset.vocab_size, dataset.encoder_length, dataset.decoder_length) == (384, 5, 4)
  decode, seen = dataset.vocabulary.decode, []
  for batch in dataset.train_batches(0, 11):
    for row in range(8):
      example = source.splits['train'][batch['example'][row]]
      assert decode(batch['encoder_input'][row]).encode() == example['input']
      assert decode(batch['target'][row]).encode() == example['target']
      assert batch['task'][row] == example['task']
      seen.append(int(batch['example'][row]))
  assert np.bincount(seen).tolist() == [4] * 22   # 88 rows: four epochs


def test_filler_rows_are_zero_and_have_no_answer(source):
  dataset = data.build(CONFIG, seed=0)
  (first, last) = dataset.eval_batches('validation')
  for key, value in last.items():
    assert key == 'index' or not value[3:].any()
  assert last['index'].tolist() == list(range(8)) and last['weight'][:3].any(1).all()
  answers = dataset.references('validation', first) + dataset.references('validation', last)
  assert answers[11:] == [()] * 5
  assert sorted(answers[:11]) == [(chr(97 + i),) for i in range(11)]


def test_references_name_every_right_answer(source, monkeypatch):
  several = lettered(4, references=('é'.encode(), b'y'))
  made = text_pairs.pair_source({'train': lettered(4), 'validation': several, 'test': several}, 'm')
  monkeypatch.setitem(registry.REGISTRY, 'stdlib_tasks', lambda config, window_bytes: made)
  dataset = data.build(CONFIG, seed=0)
  (batch,) = dataset.eval_batches()
  assert dataset.references('validation', batch) == [('é', 'y')] * 4 + [()] * 4


def test_answers_are_those_of_the_examples_evaluated(source):
  dataset = data.build(dataclasses.replace(CONFIG, eval_examples=5), seed=0)
  (batch,) = dataset.eval_batches('validation')
  right, task = dataset.answers('validation')
  assert right == dataset.references('validation', batch)[:5]
  assert task == batch['task'][:5].tolist()
  right, task = dataset.answers('train')
  assert right == [(chr(97 + i),) for i in range(22)] and task == [i % 2 for i in range(22)]


def test_fingerprint_follows_every_pair_and_what_shapes_it(source, monkeypatch):
  def fingerprint(made=source, **text):
    monkeypatch.setitem(registry.REGISTRY, 'stdlib_tasks', lambda config, window_bytes: made)
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, **text))
    return data.build(config, seed=0).fingerprint
  base = fingerprint()
  # Span corruption's settings do not touch pairs.
  assert fingerprint(noise_density=0.5, mean_span_length=1.0, window=2) == base
  others = [fingerprint(encoder_length=6), fingerprint(decoder_length=5)]
  train = lettered(22)
  splits = {'validation': lettered(11), 'test': lettered(3)}
  for changed in (train[0]._replace(input=b'z'), train[0]._replace(target=b'z'),
                  train[0]._replace(task=1), train[0]._replace(references=(b'z',))):
    others.append(fingerprint(text_pairs.pair_source({'train': [changed, *train[1:]], **splits},
                                                'exact_match', ('even', 'odd'))))
  others.append(fingerprint(text_pairs.pair_source({'train': train[::-1], **splits}, 'exact_match',
                                              ('even', 'odd'))))
  others.append(fingerprint(text_pairs.pair_source({'train': train, **splits}, 'pronunciation',
                                              ('even', 'odd'))))
  assert len({base, *others}) == 1 + len(others)


def test_only_pairs_have_answers():
  dataset = data.build(data.DataConfig(source='digits'), seed=0)
  assert (dataset.tasks, dataset.metric) == ((), '')
  for ask in (lambda: dataset.references('test', dataset.train_batch(0)),
              lambda: dataset.answers('test')):
    with pytest.raises(ConfigError, match="data.source: got 'digits'.*a source of pairs"):
      ask()


def test_unknown_split_of_answers(source):
  with pytest.raises(ConfigError, match="Did you mean 'validation'"):
    data.build(CONFIG, seed=0).answers('valid')


class MoejaxTinyPairs(tfds.core.GeneratorBasedBuilder):
  """Words and the same words backwards; one answer in training is longer than the others."""
  VERSION = tfds.core.Version('1.0.0')
  code_path = None   # TFDS would look for checksums of downloads beside this file

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'word': tfds.features.Text(), 'reversed': tfds.features.Text(),
        'tags': tfds.features.Sequence(tfds.features.Text()),
        'label': tfds.features.ClassLabel(num_classes=2)}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(60), 'test': self._generate_examples(6)}

  def _generate_examples(self, n):
    for i in range(n):
      word = f'é{i:04d}' + 'x' * 20 * (i == 33)
      yield i, {'word': word, 'reversed': word[::-1], 'tags': [word], 'label': 0}


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  MoejaxTinyPairs(data_dir=str(folder), file_format='array_record').download_and_prepare()
  return folder


def tfds_config(folder, decoder_length=32, **kwargs):
  return data.DataConfig(source='tfds:moejax_tiny_pairs', data_dir=str(folder), batch_size=60,
                         eval_batch_size=8, tfds=data.TfdsConfig(**kwargs),
                         text=data.TextConfig(encoder_length=40, decoder_length=decoder_length))


def test_two_texts_from_tfds(tfds_dir):
  config = tfds_config(tfds_dir, input='word', target='reversed')
  dataset = data.build(config, seed=0)
  assert (dataset.metric, dataset.tasks) == ('exact_match', ()) and config.scored
  assert dataset.examples == {'train': 57, 'validation': 3, 'test': 6}
  (batch,) = dataset.eval_batches('test')
  answers = dataset.references('test', batch)
  for row in range(6):
    word = dataset.vocabulary.decode(batch['encoder_input'][row])
    assert answers[row] == (word[::-1],) and word[0] == 'é'
    assert dataset.vocabulary.decode(batch['target'][row]) == word[::-1]
  assert answers[6:] == [(), ()] and not batch['target'][6:].any()
  assert sorted(a[0] for a in dataset.answers('test')[0]) == [f'{i:04d}'[::-1] + 'é'
                                                             for i in range(6)]
  other = data.build(tfds_config(tfds_dir, input='reversed', target='word'), seed=0)
  assert other.fingerprint != dataset.fingerprint
  assert 'tensorflow' not in sys.modules


def test_a_long_target_in_tfds_is_an_error_when_it_is_read(tfds_dir):
  # 6 bytes and eos fit 8 tokens; the one of 26 bytes is not among the examples tried at build.
  dataset = data.build(tfds_config(tfds_dir, 8, input='word', target='reversed'), seed=0)
  with pytest.raises(ConfigError, match='data.text.decoder_length: got 8.*at least 27'):
    list(dataset.train_batches(0, 2))
  with pytest.raises(ConfigError, match='data.text.decoder_length: got 6.*at least 7'):
    data.build(tfds_config(tfds_dir, 6, input='word', target='reversed'), seed=0)


@pytest.mark.parametrize('kwargs, words', [
    ({'input': 'word', 'target': 'reverse'},
     ('data.tfds.target', "'reverse'", "Did you mean 'reversed'?")),
    ({'input': 'label', 'target': 'word'}, ('data.tfds.input', "'label'", 'word')),
    ({'input': 'tags', 'target': 'word'}, ('data.tfds.input', "'tags'")),
    ({}, ('moejax_tiny_pairs', 'data.tfds.input', 'label, reversed, tags, word')),
])
def test_features_that_are_no_texts(tfds_dir, kwargs, words):
  with pytest.raises(ConfigError) as error:
    data.build(tfds_config(tfds_dir, **kwargs), seed=0)
  assert all(word in str(error.value) for word in words), error.value


def test_input_and_target_go_together():
  with pytest.raises(ConfigError, match='data.tfds.input and target.*both or none'):
    data.TfdsConfig(input='word')
