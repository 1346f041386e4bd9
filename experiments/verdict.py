"""Verdicts on a suite's claims, by a rule that was written before its runs.

**What is tested.** A claim speaks of two arms a and b and a metric. In each (dense parent, seed)
pair p that has both, d_p = metric of a - metric of b; if it speaks of a gap that is larger than
another, less the same of two other arms. The d_p are taken as independent draws from a normal
distribution; reported are their mean, their standard deviation and the 95 % interval mean +-
t(0.975, n - 1) sd / sqrt(n), which is not adjusted.

**p-values.** Relations '<' and '>': the two-sided t-test of mean(d) = 0. Relation '~' with a margin
m: if |mean(d)| <= m, the two one-sided t-tests (TOST, Schuirmann 1987) of mean(d) = -m and
mean(d) = m, of whose p-values the larger counts; otherwise the two-sided t-test of mean(d) = the
nearer of -m and m, which is below 0.05 where the 95 % interval lies entirely outside [-m, m]. If
all d_p are 0, to the last digit, p = 0: the two arms are one, and there is nothing to sample. (This
sentence came after the first runs and before the first verdict; see LOG.md.)

**Family.** All claims of one suite at one scale. Their p-values are adjusted together by Holm's
method (1979). A claim that cannot be tested counts with p = 1, so that a run that fails never makes
the others easier.

**Verdict.** Decided if the adjusted p is below 0.05: 'reproduced' if mean(d) has the claimed sign
(lies within the margin), 'not reproduced' otherwise. Undecided at this scale in all other cases,
and whatever the numbers say if there are fewer than 2 pairs, if the d_p are otherwise all the same
(no spread to test against), or if a metric is not finite in any pair: a diverged run is never left
out. Nothing is decided either before a claim has all pairs of the suite, or it could be trained for
as long as it takes to be right.

**By chance.** Holm keeps the chance that a suite has any wrong verdict at 5 %, however many claims
it makes. If no arm differed from any other, a suite would so have a false 'reproduced' among its
'<' and '>' claims in at most 2.5 % of cases: expect at most 1 in 40 suites with one. A '~' claim
whose true difference lies outside the margin is called reproduced in at most 5 %.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from scipy import special

from experiments.results import Record, Results, metric, metric_paths
from experiments.suite import Claim
from moejax.config import check_choice

LEVEL = 0.05
REPRODUCED, NOT_REPRODUCED, UNDECIDED = OUTCOMES = ('reproduced', 'not reproduced', 'undecided')
ROUNDING = 1e-12   # relative; differences that vary by less than this do not vary


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Mean of n values, their standard deviation, half the width of the mean's 95 % t-interval.

  `sd` and `half` are NaN for a single value; all are NaN without a value.
  """
  n: int
  mean: float
  sd: float
  half: float

  @property
  def interval(self) -> tuple[float, float]:
    return self.mean - self.half, self.mean + self.half


def estimate(values: Sequence[float]) -> Estimate:
  """Estimate of the mean of values that are independent draws; NaN if any is not finite."""
  n = len(values)
  if not n or not all(map(math.isfinite, values)):
    return Estimate(n, math.nan, math.nan, math.nan)
  mean = math.fsum(values) / n
  if n == 1:
    return Estimate(n, mean, math.nan, math.nan)
  sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
  return Estimate(n, mean, sd, float(special.stdtrit(n - 1, 1 - LEVEL / 2)) * sd / math.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
  """Holm's adjusted p-values, in the given order: the k-th smallest of m times m - k + 1, at most 1
  and never below that of a smaller p."""
  adjusted, worst = [0.0] * len(p_values), 0.0
  for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
    worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
    adjusted[i] = worst
  return adjusted


def p_value(differences: Estimate, margin: float | None = None) -> float:
  """p of a claim without a margin ('<', '>') or with one ('~'); see the top of this file.

  Args:
    differences: estimate of at least 2 that are not all equal.
    margin: of the claim.
  """
  n, mean, sd = differences.n, differences.mean, differences.sd
  # One-sided t-tests whose alternative is: the mean is below (above) `value`.
  below = lambda value: float(special.stdtr(n - 1, (mean - value) * math.sqrt(n) / sd))
  above = lambda value: float(special.stdtr(n - 1, (value - mean) * math.sqrt(n) / sd))
  two_sided = lambda value: 2 * min(below(value), above(value))
  if margin is None:
    return two_sided(0.0)
  if abs(mean) <= margin:
    return max(above(-margin), below(margin))
  return two_sided(math.copysign(margin, mean))


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The outcome of the rule for a claim.

  Attributes:
    claim: the claim.
    estimate: of the paired differences, a - b.
    p: of its own test; None if it cannot be tested.
    adjusted: p by Holm within the suite.
    outcome: one of OUTCOMES.
    notes: why it cannot be tested, and pairs that lack some of its arms.
    held_out: the estimate for `test`, if the claim is about `test_seen` and `test` was measured
      too; the verdict does not depend on it.
  """
  claim: Claim
  estimate: Estimate
  p: float | None
  adjusted: float
  outcome: str
  notes: tuple[str, ...] = ()
  held_out: Estimate | None = None


def decide(claims: Sequence[Claim], records: Sequence[Record], planned: int = 0) -> list[Verdict]:
  """The verdict on each claim of a suite.

  Args:
    claims: all of the suite's, since they are one family.
    records: all of its arms.
    planned: pairs that the suite has when all are trained.

  Raises:
    ConfigError: an arm of a claim has no such metric.
  """
  tested = [_test(claim, records) for claim in claims]
  adjusted = holm([1.0 if p is None else p for _, p, _ in tested])
  return [Verdict(claim, differences, p, q,
                  _outcome(claim, differences, planned, p, q), notes, _held_out(claim, records))
          for claim, (differences, p, notes), q in zip(claims, tested, adjusted)]


def decide_all(results: Results) -> list[Verdict]:
  """The verdict on each claim of a suite's results."""
  return decide(results.claims, results.records, results.suite.get('pairs', 0))


def _outcome(claim: Claim, differences: Estimate, planned: int, p: float | None,
             adjusted: float) -> str:
  mean = differences.mean
  if p is None or adjusted >= LEVEL or differences.n < planned:
    return UNDECIDED
  if claim.relation == '~':
    return REPRODUCED if abs(mean) <= claim.margin else NOT_REPRODUCED
  return REPRODUCED if (mean < 0) == (claim.relation == '<') else NOT_REPRODUCED


def _test(claim: Claim, records: Sequence[Record]
          ) -> tuple[Estimate, float | None, tuple[str, ...]]:
  """Estimate, p (None with the reason among the notes) and notes."""
  arms = {name: _values(claim, name, records) for name in claim.terms}
  pairs = sorted(set.intersection(*map(set, arms.values())))
  differences = _differences(claim, arms, pairs)
  notes = [f'pair {pair} has no {name}' for pair in sorted(set().union(*arms.values()))
           for name, values in arms.items() if pair not in values]
  obstacles = [f'{claim.metric} of {name} is {values[pair]} in pair {pair}'
               for name, values in arms.items() for pair in pairs
               if not math.isfinite(values[pair])]
  if not obstacles and len(pairs) < 2:
    obstacles = ['one pair' if pairs else 'no pair has all arms']
  scale = max((abs(values[pair]) for values in arms.values() for pair in pairs), default=0.0)
  if not obstacles and claim.relation == '~' and not any(differences):
    return estimate(differences), 0.0, tuple(notes)
  if not obstacles and max(differences) - min(differences) <= ROUNDING * scale:
    obstacles = [f'the {len(pairs)} differences are all {differences[0]:+.4g}, without spread']
  summary = estimate(differences)
  return summary, None if obstacles else p_value(summary, claim.margin), (*obstacles, *notes)


def _held_out(claim: Claim, records: Sequence[Record]) -> Estimate | None:
  """The estimate for `test` of a claim about `test_seen`; None if an arm did not measure it."""
  split, _, name = claim.metric.partition('/')
  if split != 'test_seen' or any(
      metric(record, f'test/{name}') is None for record in records
      if record['domain'] == claim.domain and record['arm'] in claim.terms):
    return None
  claim = dataclasses.replace(claim, metric=f'test/{name}')
  arms = {name: _values(claim, name, records) for name in claim.terms}
  return estimate(_differences(claim, arms, sorted(set.intersection(*map(set, arms.values())))))


def _differences(claim: Claim, arms: Mapping[str, Mapping[int, float]], pairs: Sequence[int]
                 ) -> list[float]:
  """The claim's difference in each of the pairs. arms: {name: {pair: metric}}."""
  return [sum(sign * arms[name][pair] for name, sign in claim.terms.items()) for pair in pairs]


def _values(claim: Claim, name: str, records: Sequence[Record]) -> dict[int, float]:
  """{pair: metric} of an arm. Raises ConfigError if it was not measured."""
  values = {}
  for record in records:
    if (record['domain'], record['arm']) == (claim.domain, name):
      check_choice(f'claim.metric ({name})', claim.metric, metric_paths(record))
      values[record['pair']] = metric(record, claim.metric)
  return values
