"""Pairs of texts: an input and the target to predict, as T5 is fine-tuned (Raffel et al. 2020).

B batch, Le encoder length, Ld decoder length.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moejax.config import check
from moejax.data.config import TextConfig
from moejax.data.source import Source
from moejax.data.text import EOS, PAD, decoder_side, vocabulary


class Pair(NamedTuple):
  """One example; `references` are all right answers, () where `target` is the only one."""
  input: bytes
  target: bytes
  task: int = 0
  references: tuple[bytes, ...] = ()


class PairTable:
  """A split of pairs in memory; item i is a dict with Pair's fields."""

  def __init__(self, pairs: Sequence[Pair]):
    self._pairs = list(pairs)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._pairs[i]._asdict()

  @property
  def targets(self) -> set[bytes]:
    """All targets."""
    return {pair.target for pair in self._pairs}


def pair_source(splits: Mapping[str, Sequence[Pair]], metric: str,
                tasks: tuple[str, ...] = ()) -> Source:
  """The Source of pairs in memory; its digest covers every byte, the metric and the tasks."""
  sha = hashlib.sha256(repr((metric, tasks)).encode())
  for name, pairs in sorted(splits.items()):
    sha.update(name.encode())
    for pair in pairs:
      sha.update(repr(tuple(pair)).encode())
  return Source(kind='seq2seq', splits={name: PairTable(pairs) for name, pairs in splits.items()},
                digest=sha.hexdigest(), pairs=True, tasks=tasks)


def references(example: Mapping[str, Any]) -> tuple[str, ...]:
  """The right answers of a pair; its target comes first."""
  answers = example.get('references') or (example['target'],)
  return tuple(a.decode('utf-8', errors='replace') for a in answers)


class PairProcessor:
  """Turns examples {'input', 'target', 'task'} into batches as of span corruption, and task.

  An input too long for encoder_length loses its end: sources put first what the answer needs. A
  target that does not fit decoder_length is an error (`check_target`) and never cut, since the
  model would be trained and scored on half an answer.
  """

  def __init__(self, config: TextConfig):
    self.config = config
    self.vocabulary = vocabulary(config.vocabulary)

  def check_target(self, target: bytes) -> np.ndarray:
    """The target's ids. Raises ConfigError if they and an eos do not fit decoder_length."""
    ids = self.vocabulary.encode(target)
    check(len(ids) < self.config.decoder_length, 'data.text.decoder_length',
          self.config.decoder_length, f'at least {len(ids) + 1} for the target {target[:80]!r}',
          'Raise it: targets are never cut.')
    return ids

  def draw(self, example: Mapping[str, Any], rng: np.random.Generator,
           train: bool = True) -> dict[str, np.ndarray]:
    """A pair's encoder_input (Le,), target (Ld,) and task (), int32; nothing is random."""
    del rng, train
    L = self.config.encoder_length
    encoder_input = np.full(L, PAD, np.int32)
    ids = self.vocabulary.encode(example['input'])[:L - 1]
    encoder_input[:len(ids)], encoder_input[len(ids)] = ids, EOS
    target = np.full(self.config.decoder_length, PAD, np.int32)
    ids = self.check_target(example['target'])
    target[:len(ids)], target[len(ids)] = ids, EOS
    return {'encoder_input': encoder_input, 'target': target, 'task': np.int32(example['task'])}

  def finish(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked draws, with decoder_input and weight of text.decoder_side."""
    return {**batch, **decoder_side(batch['target'])}
