"""Lines of a table: the arms of one name over all pairs, and what is computed from their rows.

A row is a line of kind 'arm' in results.jsonl. Everything that is reported goes through here.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

from experiments.suite import Claim
from moejax.config import ConfigError

Row = dict[str, Any]
CLAIMED = 4.0   # see `span`


def metric(row: Row, path: str) -> float | None:
  """'split/name' of the run's last evaluation, 'step0/name' of its first; None if not measured."""
  split, _, name = path.partition('/')
  values = row['step0'] if split == 'step0' else row['final'].get(split)
  return (values or {}).get(name)


def metrics(row: Row) -> list[str]:
  """Every path that `metric` knows of a row."""
  splits = {**row['final'], 'step0': row['step0'] or {}}
  return [f'{split}/{name}' for split, values in splits.items() for name in values]


def extra_steps(row: Row) -> int:
  """Steps after the trunk, or all of them if the arm began from nothing."""
  return row['end_step'] - row['start_step']


def extra_flops(row: Row, steps: int | None = None) -> float:
  """FLOPs of the extra steps (or of that many), in % of the dense pretraining."""
  steps = extra_steps(row) if steps is None else steps
  return 100 * steps * row['flops_per_step'] / row['base_flops']


def extra_time(row: Row) -> float | None:
  """Time of the extra steps in % of the dense pretraining's, from interleaved timings if any."""
  if row['time_ratio'] is None:
    return None
  return 100 * extra_steps(row) * row['time_ratio'] / row['base_steps']


@dataclasses.dataclass(frozen=True)
class Line:
  """The arms of one name in a domain.

  Attributes:
    domain, name: what it says.
    rows: {pair: row}, in the order of the pairs.
    delta: {metric: {pair: metric - metric of the reference}}, over the pairs both have; empty for
      the reference itself and in a domain without one.
  """
  domain: str
  name: str
  rows: dict[int, Row]
  delta: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

  @property
  def first(self) -> Row:
    """A row, for what all pairs have in common."""
    return next(iter(self.rows.values()))

  def values(self, path: str) -> dict[int, float]:
    """{pair: metric}, over the pairs that measured it."""
    found = {pair: metric(row, path) for pair, row in self.rows.items()}
    return {pair: value for pair, value in found.items() if value is not None}


def by_domain(rows: list[Row], paths: list[str]) -> dict[str, list[Line]]:
  """The lines of each domain, in the order of the rows.

  Args:
    rows: of one suite.
    paths: metrics that are given relative to the reference too.

  Raises:
    ConfigError: the rows of a domain were measured on different data.
  """
  domains: dict[str, dict[str, dict[int, Row]]] = {}
  for row in rows:
    domains.setdefault(row['domain'], {}).setdefault(row['arm'], {})[row['pair']] = row
  return {domain: _lines(domain, arms, paths) for domain, arms in domains.items()}


def _lines(domain: str, arms: dict[str, dict[int, Row]], paths: list[str]) -> list[Line]:
  found = {row['fingerprint'] for pairs in arms.values() for row in pairs.values()}
  if len(found) > 1:
    raise ConfigError(f'{domain}: results of different data cannot stand in one table '
                      f'(fingerprints {", ".join(sorted(f[:12] for f in found))}). Was Python or '
                      'matplotlib changed in between? Train again with --runs=NEWDIR.')
  lines = [Line(domain, name, dict(sorted(pairs.items()))) for name, pairs in arms.items()]
  reference = next((line for line in lines if line.first['reference']), None)
  if reference is None:
    return lines
  return [line if line is reference else
          dataclasses.replace(line, delta={path: differences(line, reference, path)
                                           for path in paths})
          for line in lines]


def differences(a: Line, b: Line, path: str) -> dict[int, float]:
  """{pair: metric of a - metric of b}, over the pairs that both have."""
  left, right = a.values(path), b.values(path)
  return {pair: left[pair] - right[pair] for pair in left if pair in right}


def offsets(group: list[Line], path: str) -> dict[int, float]:
  """{pair: the reference's metric there - its mean over pairs}, for drawings.

  With these taken off, a pair's values keep their differences, all pairs have the reference in one
  place, and what other arms still spread is what Δ spreads. Without a reference that is finite in
  every pair nothing is to be taken off: {pair: 0.0}.
  """
  pairs = {pair for line in group for pair in line.rows}
  reference = next((line for line in group if line.first['reference']), None)
  values = reference.values(path) if reference else {}
  if values.keys() != pairs or not all(map(math.isfinite, values.values())):
    return dict.fromkeys(pairs, 0.0)
  mean = math.fsum(values.values()) / len(values)
  return {pair: value - mean for pair, value in values.items()}


def shown(group: list[Line], paths: list[str], claims: Iterable[Claim] = ()) -> list[str]:
  """Those of the metrics that any line of the domain measured; the first is what plots show.

  What the suite claims something about in this domain comes before what it does not.
  """
  claimed = [claim.metric for claim in claims if claim.domain == group[0].domain]
  return [path for path in dict.fromkeys([*claimed, *paths])
          if path in paths and any(line.values(path) for line in group)]


def span(group: list[Line], drawn: dict[str, list[float]], ends: dict[str, list[float]],
         claimed: Collection[str] = ()) -> tuple[float, float]:
  """Limits of an axis that shows every value of the lines that branch from a trunk or are swept.

  Of any other line it shows the end, if that is no further from those values than they spread, or
  CLAIMED times that if a claim is about it; a line that is left out (started from nothing, mostly)
  would flatten all others, and is told in words instead.

  Args:
    group: the lines of a domain.
    drawn: {line's name: what is drawn of it}.
    ends: {line's name: its last value and the interval around it, if any}; the value stands last.
    claimed: names of lines that claims are about.
  """
  finite = lambda values: [v for v in values if math.isfinite(v)]
  branches = [v for line in group if line.first['start_step'] > 0 or line.first['x'] is not None
              for v in finite(drawn[line.name] + ends[line.name])]
  branches = branches or [v for values in ends.values() for v in finite(values)] or [0.0]
  low, high = min(branches), max(branches)
  near = []
  for name, values in ends.items():
    reach = (high - low) * (CLAIMED if name in claimed else 1)
    near += finite(values) if low - reach <= values[-1] <= high + reach else []
  low, high = min([low, *near]), max([high, *near])
  margin = 0.06 * (high - low) or 0.1
  return low - margin, high + margin
