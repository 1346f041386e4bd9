"""Text: vocabularies and T5's span corruption (Raffel et al. 2020, sections 2.2 and 3.1.4).

B batch, W window, Le encoder length, Ld decoder length.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.config import ConfigError, check
from moejax.config import path as path_of
from moejax.data.config import TextConfig

PAD, EOS = 0, 1


class ByteVocabulary:
  """ByT5's ids (Xue et al. 2022): pad 0, eos 1, unk 2, bytes at 3..258, then 125 sentinels.

  The first masked span gets the highest id, 383, as its sentinel, and the others descend, as in the
  t5 library. (The published ByT5 checkpoints reuse the last byte ids as sentinels instead.)
  """
  size = 384
  sentinels = 125
  first_sentinel = 383
  bytes_per_token = 1

  def encode(self, text: bytes) -> np.ndarray:
    """UTF-8 bytes -> (n,) int32 ids, without eos."""
    return np.frombuffer(text, np.uint8).astype(np.int32) + 3

  def decode(self, ids: np.ndarray) -> str:
    """Ids -> text up to the first eos, without the ids that are not bytes."""
    ids = _until_eos(ids)
    return bytes(int(i) - 3 for i in ids if 3 <= i < 259).decode('utf-8', errors='replace')


class SentencePieceVocabulary:
  """A SentencePiece model with T5's 100 sentinels above its pieces, the first one highest.

  `size` is rounded up to a multiple of 128 as T5's embedding is (32,000 + 100 -> 32,128).

  Raises:
    ConfigError: no such file, the package is missing, or the model's pad and eos ids are not T5's.
  """
  sentinels = 100
  bytes_per_token = 8   # generous, so that the text cut for a window nearly always fills it

  def __init__(self, path: str):
    key = 'data.text.vocabulary'
    path = str(path_of(key, path))
    check(os.path.isfile(path), key, path, "'bytes' or an existing SentencePiece model",
          'Give the path of a .model file.')
    try:
      import sentencepiece
    except ImportError as error:
      raise ConfigError(f'{key}: got {path!r}, which needs a package that is missing: '
                        'pip install sentencepiece') from error
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
      raise ConfigError(f'{key}: got {path!r}, not a SentencePiece model ({error}). '
                        "Give a .model file, or 'bytes'.") from error
    ids = (self._model.pad_id(), self._model.eos_id())
    check(ids == (PAD, EOS), key, f'{path} with (pad, eos) ids {ids}', 'pad 0 and eos 1, as in T5',
          'Train the model with --pad_id=0 --eos_id=1 --unk_id=2.')
    total = self._model.vocab_size() + self.sentinels
    self.first_sentinel = total - 1
    self.size = -(-total // 128) * 128

  def encode(self, text: bytes) -> np.ndarray:
    """UTF-8 bytes -> (n,) int32 ids; parts of a character at either end are left out."""
    return np.asarray(self._model.encode(text.decode('utf-8', errors='ignore')), np.int32)

  def decode(self, ids: np.ndarray) -> str:
    """Ids -> text up to the first eos, without sentinels."""
    pieces = self._model.vocab_size()
    return self._model.decode([int(i) for i in _until_eos(ids) if 1 < i < pieces])


def _until_eos(ids: np.ndarray) -> np.ndarray:
  """ids before the first eos, without padding."""
  ids = np.asarray(ids)
  end = np.flatnonzero(ids == EOS)
  ids = ids[:end[0]] if len(end) else ids
  return ids[ids != PAD]


def vocabulary(name: str) -> ByteVocabulary | SentencePieceVocabulary:
  """The vocabulary that data.text.vocabulary names. Raises ConfigError: see the classes."""
  return ByteVocabulary() if name == 'bytes' else SentencePieceVocabulary(name)


def noise_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """(masked tokens, masked spans) of a text of `length` tokens, as the t5 library rounds them.

  At least one token is masked and one kept, and a span needs one of each.
  """
  tokens = min(max(round(length * density), 1), length - 1)
  spans = max(round(tokens / mean_span), 1)
  return tokens, min(spans, tokens, length - tokens)


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
  """(encoder, decoder) tokens of a corrupted window, with a sentinel per span and an eos each."""
  tokens, spans = noise_counts(length, density, mean_span)
  return length - tokens + spans + 1, tokens + spans + 1


def longest_window(encoder_length: int, density: float, mean_span: float) -> int:
  """The longest window whose corrupted input fits encoder_length (t5's random_spans_helper)."""
  window = 2
  while corrupted_lengths(window + 1, density, mean_span)[0] <= encoder_length:
    window += 1
  return window


def _random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
  """(parts,) positive lengths that sum to total, drawn uniformly from all such partitions."""
  bounds = np.zeros(parts + 1, np.int64)
  bounds[1:-1] = np.sort(rng.permutation(total - 1)[:parts - 1]) + 1
  bounds[-1] = total
  return bounds[1:] - bounds[:-1]


def noise_mask(length: int, density: float, mean_span: float,
               rng: np.random.Generator) -> np.ndarray:
  """(length,) bool, True at masked tokens: t5's random_spans_noise_mask.

  Kept and masked spans alternate, a kept one first and a masked one last. Their number follows from
  the length; the lengths of each kind are a uniformly random partition.
  """
  tokens, spans = noise_counts(length, density, mean_span)
  kept = _random_partition(length - tokens, spans, rng)
  masked = _random_partition(tokens, spans, rng)
  lengths = np.stack([kept, masked], axis=1).reshape(-1)           # (2 * spans,)
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def span_corrupt(tokens: np.ndarray, mask: np.ndarray, length: np.ndarray, encoder_length: int,
                 decoder_length: int, first_sentinel: int) -> dict[str, np.ndarray]:
  """Replaces each masked span by a sentinel; the target lists each sentinel and its span.

  Args:
    tokens: (B, W) int32 ids.
    mask: (B, W) bool, True at masked tokens.
    length: (B,) tokens before padding.
    encoder_length, decoder_length: Le, Ld.
    first_sentinel: id of the first span's sentinel; the others descend.

  Returns:
    encoder_input (B, Le), target (B, Ld) int32, both closed by eos; decoder_input and weight of
    `decoder_side`.
  """
  B, W = tokens.shape
  row = np.arange(B)[:, None].repeat(W, 1)
  real = np.arange(W) < length[:, None]                            # (B, W)
  mask = mask & real
  first = mask.copy()                                              # first token of each span
  first[:, 1:] &= ~mask[:, :-1]
  span = np.cumsum(first, axis=1)                                  # 1, 2, ... from each span on
  sentinel = (first_sentinel + 1 - span).astype(np.int32)

  keep = real & (~mask | first)
  to = np.cumsum(keep, axis=1) - 1
  encoder_input = np.zeros((B, encoder_length), np.int32)
  encoder_input[row[keep], to[keep]] = np.where(first, sentinel, tokens)[keep]
  encoder_input[np.arange(B), keep.sum(1)] = EOS

  to = np.cumsum(mask, axis=1) + span - 1                          # room for the sentinels
  target = np.zeros((B, decoder_length), np.int32)
  target[row[mask], to[mask]] = tokens[mask]
  target[row[first], to[first] - 1] = sentinel[first]
  target[np.arange(B), mask.sum(1) + span[:, -1]] = EOS
  return {'encoder_input': encoder_input, **decoder_side(target)}


def decoder_side(target: np.ndarray) -> dict[str, np.ndarray]:
  """The decoder's arrays for target (B, Ld) int32.

  Returns:
    target; decoder_input (B, Ld) int32, target shifted right after a pad; weight (B, Ld) float32, 1
    where target is a token, 0 at padding.
  """
  decoder_input = np.zeros_like(target)
  decoder_input[:, 1:] = target[:, :-1]
  return {'target': target, 'decoder_input': decoder_input,
          'weight': (target != PAD).astype(np.float32)}


class TextProcessor:
  """Turns examples {'text': bytes} into span-corruption batches.

  Raises:
    ConfigError: the corrupted window does not fit encoder_length or decoder_length, or has more
      spans than the vocabulary has sentinels.
  """

  def __init__(self, config: TextConfig):
    self.config = config
    self.vocabulary = vocabulary(config.vocabulary)
    noise = (config.noise_density, config.mean_span_length)
    self.window = config.window or longest_window(config.encoder_length, *noise)
    encoder, decoder = corrupted_lengths(self.window, *noise)
    check(encoder <= config.encoder_length, 'data.text.encoder_length', config.encoder_length,
          f'at least {encoder} for a window of {self.window} tokens',
          f'Raise it, or set data.text.window=0 for the longest that fits '
          f'({longest_window(config.encoder_length, *noise)}).')
    check(decoder <= config.decoder_length, 'data.text.decoder_length', config.decoder_length,
          f'at least {decoder} for a window of {self.window} tokens',
          'Raise it, or lower data.text.noise_density.')
    spans = noise_counts(self.window, *noise)[1]
    check(spans <= self.vocabulary.sentinels, 'data.text.mean_span_length',
          config.mean_span_length, f'at most {self.vocabulary.sentinels} spans per window '
          f'(this makes {spans})', 'Raise it, or shorten the window.')

  @property
  def window_bytes(self) -> int:
    """Bytes of text that are cut for one window."""
    return self.window * self.vocabulary.bytes_per_token

  def draw(self, example: Mapping[str, Any], rng: np.random.Generator,
           train: bool = True) -> dict[str, np.ndarray]:
    """A random window and its random mask: tokens (W,), mask (W,), length ().

    Text too short for a window is corrupted whole; below two tokens it is an empty example.
    """
    del train   # evaluation is corrupted too
    text, W = example['text'], self.window
    start = int(rng.integers(0, max(len(text) - self.window_bytes, 0) + 1))
    ids = self.vocabulary.encode(text[start:start + self.window_bytes])[:W]
    n = len(ids) if len(ids) >= 2 else 0
    tokens, mask = np.zeros(W, np.int32), np.zeros(W, bool)
    if n:
      tokens[:n] = ids
      mask[:n] = noise_mask(n, self.config.noise_density, self.config.mean_span_length, rng)
    return {'tokens': tokens, 'mask': mask, 'length': np.int32(n)}

  def finish(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked draws -> the batch of span_corrupt; empty examples become filler, all zero."""
    out = span_corrupt(batch['tokens'], batch['mask'], batch['length'], self.config.encoder_length,
                       self.config.decoder_length, self.vocabulary.first_sentinel)
    for value in out.values():
      value[batch['length'] == 0] = 0
    return out
