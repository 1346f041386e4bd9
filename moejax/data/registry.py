"""The sources of examples, by the name that data.source gives them.

To add one, write datasets/MODULE.py with `load(config: DataConfig) -> Source` and enter it in
SOURCES. A source's module is imported when it is read, since data/config.py needs the names alone.
"""

import importlib
from typing import Any, NamedTuple

from moejax.config import check_choice
from moejax.data.source import Source

TFDS = 'tfds:'   # before the name of a TFDS dataset, which needs no entry


class Entry(NamedTuple):
  """A source: its file in datasets/, and how answers to its pairs are scored.

  metric: a key of evaluation.text_scores.METRICS; '' where outputs are not scored.
  """
  module: str
  metric: str = ''


SOURCES = {
    'glyphs': Entry('glyphs'),
    'digits': Entry('digits'),
    'stdlib_text': Entry('stdlib'),
    'stdlib_tasks': Entry('stdlib_tasks', 'exact_match'),
    'cmudict': Entry('cmudict', 'pronunciation'),
    'super_glue': Entry('superglue', 'exact_match'),
}


def check_name(name: str) -> None:
  """Raises ConfigError unless `name` is in SOURCES or is TFDS and the name of a dataset."""
  if name == TFDS or not name.startswith(TFDS):
    check_choice('data.source', name, (*SOURCES, f'{TFDS}NAME'))


def load(config: Any) -> Source:
  """Reads the source that a DataConfig names. Raises ConfigError: see its module."""
  entry = SOURCES.get(config.source, Entry('tfds'))
  return importlib.import_module(f'moejax.data.datasets.{entry.module}').load(config)
