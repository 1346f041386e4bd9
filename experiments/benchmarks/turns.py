"""Ways of doing the same work, timed in turns, and what their ratios say.

Whatever slows the machine down slows neighbours in time alike, so a ratio is taken of two times of
one round; absolute times are not reported.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from scipy import stats

Key = TypeVar('Key', bound=Hashable)
Run = Callable[[], Any]   # does the work once, and returns when it is done

REST = 0.01        # seconds between two runs: the threads of one library go to sleep
CONFIDENCE = 0.95


def in_turns(runs: Mapping[Key, Run], rounds: Mapping[Key, int],
             tick: Callable[[Key], Any] = lambda key: None) -> dict[Key, list[float]]:
  """Times rounds of one run of each, in an order that rotates, after a round to warm up.

  Args:
    runs: what to time.
    rounds: how many rounds each takes part in: the first so many.
    tick: called after every run.

  Returns:
    Seconds of each run, a number per round it took part in.
  """
  for key, run in runs.items():
    run()
    tick(key)
  took: dict[Key, list[float]] = {key: [] for key in runs}
  for i in range(max(rounds.values())):
    present = [key for key in runs if i < rounds[key]]
    start = i % len(present)
    for key in present[start:] + present[:start]:
      time.sleep(REST)
      started = time.perf_counter()
      runs[key]()
      took[key].append(time.perf_counter() - started)
      tick(key)
  return took


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
  """Time over that of the base in the same round, for the rounds both took part in."""
  return [a / b for a, b in zip(times, base)]


def upper_bound(values: Sequence[float]) -> float | None:
  """Upper 95 % confidence bound of the median of what the values are drawn from.

  The j-th smallest of n values is above the median unless fewer than j of them are below it, which
  has the probability of so few heads in n throws of a coin; j is the least for which that is 95 %
  sure. Nothing is assumed of the distribution (Conover 1999, section 3.2), which matters here: the
  slow rounds of a machine that does other things are far out. At n = 30, j = 20.

  Returns:
    None for fewer than 5 values, which say nothing with that confidence.
  """
  below = int(stats.binom.ppf(CONFIDENCE, len(values), 0.5))
  return sorted(values)[below] if below < len(values) else None
