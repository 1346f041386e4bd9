"""The receipt of a surgery: the fate of every leaf, and measurements at step 0; JSON and text."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

from moejax.trees.rules import FATES, Entry


@dataclasses.dataclass(frozen=True)
class Receipt:
  """The fate of every leaf, and measurements of the caller.

  Attributes:
    entries: one for each leaf of either side.
    about: the origin, as JSON: parent, step, settings.
    measured: numbers at step 0, as JSON: loss of parent and child, drop rate, ...
  """
  entries: tuple[Entry, ...]
  about: dict[str, Any] = dataclasses.field(default_factory=dict)
  measured: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def of(cls, entries: Iterable[Entry], **about: Any) -> 'Receipt':
    """The receipt of the entries that rules.apply returns."""
    return cls(tuple(entries), about)

  def with_measured(self, **measured: Any) -> 'Receipt':
    """This receipt with more measurements."""
    return dataclasses.replace(self, measured=self.measured | measured)

  @property
  def counts(self) -> dict[str, dict[str, int]]:
    """{fate: {'leaves': number, 'scalars': number}} of the fates that occur.

    Scalars are those of the new tree, or of the old one for dropped leaves.
    """
    counts = {}
    for fate in FATES:
      sizes = [math.prod(e.shape) for e in self.entries if e.fate == fate]
      if sizes:
        counts[fate] = {'leaves': len(sizes), 'scalars': sum(sizes)}
    return counts

  def to_json(self) -> str:
    """JSON text, from which `from_json` makes an equal receipt."""
    return json.dumps({'about': self.about, 'measured': self.measured, 'counts': self.counts,
                       'entries': [dataclasses.asdict(e) for e in self.entries]}, indent=1)

  @classmethod
  def from_json(cls, text: str) -> 'Receipt':
    """The inverse of to_json."""
    data = json.loads(text)
    entries = tuple(Entry(**e | {'sources': tuple(e['sources']), 'shape': tuple(e['shape'])})
                    for e in data['entries'])
    return cls(entries, data['about'], data['measured'])

  def to_text(self) -> str:
    """Text for people: origin, measurements, a summary by fate, then a line per leaf."""
    lines = [f'{k}: {v}' for k, v in self.about.items()]
    lines += _align([(k, f'{v:.6g}' if isinstance(v, float) else str(v))
                     for k, v in self.measured.items()])
    lines += [''] if lines else []
    lines += _align([('fate', 'leaves', 'scalars'),
                     *((fate, f'{c["leaves"]:,}', f'{c["scalars"]:,}')
                       for fate, c in self.counts.items())])
    leaves = [('fate', 'target', 'shape', 'dtype', 'source')]
    for e in self.entries:
      shape = 'x'.join(map(str, e.shape)) or 'scalar'
      dtype = f'{e.source_dtype} -> {e.dtype}' if e.source_dtype else e.dtype
      leaves.append((e.fate, e.target or '-', shape, dtype, ', '.join(e.sources) or '-'))
    return '\n'.join([*lines, '', *_align(leaves)]) + '\n'


def _align(table: list[tuple[str, ...]]) -> list[str]:
  """A table of cells as lines with aligned columns."""
  widths = [max(map(len, column)) for column in zip(*table)]
  return ['  '.join(cell.ljust(w) for cell, w in zip(cells, widths)).rstrip() for cells in table]
