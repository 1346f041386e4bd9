"""Vocabularies and span corruption against hand-worked tables and the t5 library's rules."""

import collections

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.data import TextConfig, text


def test_span_corruption_by_hand():
  # Tokens 10..19 with 12-13 and 17-19 masked; the first sentinel is 99. Second row: 4 real tokens,
  # the third masked.
  tokens = np.array([np.arange(10, 20), [20, 21, 22, 23, 0, 0, 0, 0, 0, 0]], np.int32)
  mask = np.zeros((2, 10), bool)
  mask[0, [2, 3, 7, 8, 9]] = mask[1, 2] = True
  out = text.span_corrupt(tokens, mask, np.array([10, 4]), 9, 9, 99)
  assert out['encoder_input'].tolist() == [[10, 11, 99, 14, 15, 16, 98, 1, 0],
                                           [20, 21, 99, 23, 1, 0, 0, 0, 0]]
  assert out['target'].tolist() == [[99, 12, 13, 98, 17, 18, 19, 1, 0],
                                    [99, 22, 1, 0, 0, 0, 0, 0, 0]]
  assert out['decoder_input'].tolist() == [[0, 99, 12, 13, 98, 17, 18, 19, 1],
                                           [0, 99, 22, 1, 0, 0, 0, 0, 0]]
  assert out['weight'].tolist() == [[1] * 8 + [0], [1, 1, 1] + [0] * 6]
  assert {v.dtype.str for v in out.values()} == {'<i4', '<f4'}


@pytest.mark.parametrize('length, density, span', [(127, 0.14, 6.0), (568, 0.15, 3.0),
                                                   (2, 0.5, 1.0), (10, 0.9, 1.0), (5, 0.01, 3.0)])
def test_noise_mask_has_exact_counts_and_alternates(length, density, span):
  rng = np.random.default_rng(0)
  tokens, spans = text.noise_counts(length, density, span)
  for _ in range(50):
    mask = text.noise_mask(length, density, span, rng)
    starts = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
    assert (mask.shape, mask.sum(), len(starts)) == ((length,), tokens, spans)
    assert not mask[0] and mask[-1]   # T5's order: kept, masked, ..., kept, masked


def test_partitions_are_uniform():
  # 5 into 3 positive parts: C(4, 2) = 6 ways; 6,000 draws give 1,000 of each, give or take 29.
  rng = np.random.default_rng(0)
  seen = collections.Counter(tuple(text._random_partition(5, 3, rng).tolist())
                             for _ in range(6000))
  assert len(seen) == 6 and all(sum(parts) == 5 and min(parts) >= 1 for parts in seen)
  assert all(abs(count - 1000) < 5 * 29 for count in seen.values())


def test_lengths_follow_the_t5_library():
  # Hand-worked: 512 inputs at 15 % and spans of 3 come from 568 tokens and make 114 targets, the
  # published T5 setting; 127 bytes at 14 % and spans of 6: round(17.78) = 18 masked in 3 spans.
  assert text.longest_window(512, 0.15, 3.0) == 568
  assert text.corrupted_lengths(568, 0.15, 3.0) == (512, 114)
  assert text.longest_window(113, 0.14, 6.0) == 127
  assert text.corrupted_lengths(127, 0.14, 6.0) == (127 - 18 + 3 + 1, 18 + 3 + 1)


def test_byte_vocabulary():
  vocabulary = text.ByteVocabulary()
  ids = vocabulary.encode('aé'.encode())
  assert ids.tolist() == [97 + 3, 0xC3 + 3, 0xA9 + 3]
  assert vocabulary.decode(np.array([*ids, 383, 1, 100])) == 'aé'
  assert vocabulary.size == 3 + 256 + vocabulary.sentinels == vocabulary.first_sentinel + 1
  assert vocabulary.encode(bytes(range(256))).max() < vocabulary.size - vocabulary.sentinels


def test_text_too_short_to_corrupt_becomes_filler():
  processor = text.TextProcessor(TextConfig())
  rng = np.random.default_rng(0)
  draws = [processor.draw({'text': t}, rng) for t in (b'', b'a', b'ab')]
  batch = processor.finish({k: np.stack([d[k] for d in draws]) for k in draws[0]})
  for value in batch.values():
    assert not value[:2].any()
  # 'ab' -> round(0.28) = 0, so one token of the two is masked: 'a' <s> eos, <s> 'b' eos.
  assert batch['encoder_input'][2, :4].tolist() == [100, 383, 1, 0]
  assert batch['target'][2, :4].tolist() == [383, 101, 1, 0]


@pytest.mark.parametrize('settings, words', [
    ({'window': 128}, ('data.text.encoder_length', '113', '114', 'window=0', '127')),
    ({'decoder_length': 21}, ('data.text.decoder_length', '21', '22')),
    ({'encoder_length': 2000, 'decoder_length': 2000, 'mean_span_length': 1.0},
     ('data.text.mean_span_length', '125 spans')),
    ({'vocabulary': 'no/such.model'}, ('data.text.vocabulary', 'no/such.model')),
])
def test_lengths_that_do_not_fit(settings, words):
  with pytest.raises(ConfigError) as error:
    text.TextProcessor(TextConfig(**settings))
  assert all(word in str(error.value) for word in words)


@pytest.fixture(scope='module')
def sentencepiece_model(tmp_path_factory):
  """Trains tiny models on this file: one with T5's special ids, one with the library's own."""
  import sentencepiece
  folder = tmp_path_factory.mktemp('sentencepiece')
  common = {'input': __file__, 'vocab_size': 200, 'minloglevel': 2, 'num_threads': 1}
  sentencepiece.SentencePieceTrainer.train(
      model_prefix=str(folder / 't5'), pad_id=0, eos_id=1, unk_id=2, bos_id=-1, **common)
  sentencepiece.SentencePieceTrainer.train(model_prefix=str(folder / 'other'), **common)
  return folder


def test_sentencepiece_vocabulary(sentencepiece_model):
  path = str(sentencepiece_model / 't5.model')
  vocabulary = text.vocabulary(path)
  assert vocabulary.first_sentinel == 200 + 100 - 1 and vocabulary.size == 384
  ids = vocabulary.encode(b'import numpy as np')
  assert ids.max() < 200 and vocabulary.decode(np.array([*ids, 299, 1, 5])) == 'import numpy as np'
  processor = text.TextProcessor(TextConfig(vocabulary=path))
  draw = processor.draw({'text': b'import numpy as np\n' * 100}, np.random.default_rng(0))
  batch = processor.finish({k: v[None] for k, v in draw.items()})
  assert draw['length'] == processor.window
  assert batch['encoder_input'].max() == 299


def test_sentencepiece_errors(sentencepiece_model, monkeypatch):
  with pytest.raises(ConfigError, match='pad 0 and eos 1'):
    text.vocabulary(str(sentencepiece_model / 'other.model'))
  with pytest.raises(ConfigError, match='not a SentencePiece model'):
    text.vocabulary(__file__)
  monkeypatch.setitem(__import__('sys').modules, 'sentencepiece', None)
  with pytest.raises(ConfigError, match='pip install sentencepiece'):
    text.vocabulary(str(sentencepiece_model / 't5.model'))
