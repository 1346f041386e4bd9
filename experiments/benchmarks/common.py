"""Shared by the benchmarks: timing in turns, measured lines and their page, tables, flags.

A busy machine slows down all works of one round alike. So a ratio compares two times of one round.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from scipy import stats
from tqdm import tqdm

from experiments import results
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import loop, malloc, metrics
from moejax.train.plan import Plan
from moejax.train.validate import validate

Key = TypeVar('Key', bound=Hashable)
Line = dict[str, Any]       # a measurement, as JSON
RESULTS = pathlib.Path(__file__).parent.parent / 'results'
REST = 0.01                 # seconds between two works: the threads of one library go to sleep
CONFIDENCE = 0.95


def in_turns(works: Mapping[Key, Callable[[], Any]], rounds: int | Mapping[Key, int],
             tick: Callable[[Key], Any] = lambda key: None) -> dict[Key, list[float]]:
  """Seconds of each work in each round; the order rotates, after a round to warm up.

  Args:
    works: what to time; a call returns when the work is done.
    rounds: how many rounds each takes part in: the first so many.
    tick: called after every work.

  Returns:
    {key: seconds, a number per round it took part in}.
  """
  if isinstance(rounds, int):
    rounds = dict.fromkeys(works, rounds)
  for key, work in works.items():
    work()
    tick(key)
  took: dict[Key, list[float]] = {key: [] for key in works}
  for i in range(max(rounds.values())):
    present = [key for key in works if i < rounds[key]]
    start = i % len(present)
    for key in present[start:] + present[:start]:
      time.sleep(REST)
      took[key].append(seconds(works[key]))
      tick(key)
  return took


def seconds(work: Callable[[], Any]) -> float:
  """Seconds that one call takes."""
  started = time.perf_counter()
  work()
  return time.perf_counter() - started


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
  """Time over that of the base in each round that both took part in."""
  return [a / b for a, b in zip(times, base)]


def quartiles(values: Sequence[float]) -> list[float]:
  """[lower quartile, median, upper quartile] of at least two values."""
  return statistics.quantiles(values, n=4, method='inclusive')


def upper_bound(values: Sequence[float]) -> float | None:
  """Upper 95 % confidence bound of the median of the distribution that the values come from.

  The j-th smallest of n values is above the median unless fewer than j of them are below it, which
  has the probability of so few heads in n tosses of a coin; j is the least for which that is 95 %
  sure. Nothing is assumed of the distribution (Conover 1999, section 3.2), which matters here: the
  slow rounds of a machine that does other work are far out. At n = 30, j = 20.

  Returns:
    None for fewer than 5 values, of which none is a bound with that confidence.
  """
  below = int(stats.binom.ppf(CONFIDENCE, len(values), 0.5))
  return sorted(values)[below] if below < len(values) else None


def trainer(config: run_config.RunConfig) -> tuple[loop.Trainer, Any]:
  """The trainer of a run, compiled, and the run's first state from fresh weights."""
  made = loop.Trainer(validate(config, Plan.make(config, 0)))
  made.compile()
  return made, made.programs.first_state()[0]


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
  """A progress bar, on a terminal only."""
  return tqdm(iterable, dynamic_ncols=True, disable=not sys.stderr.isatty(), **options)


def use_cores(number: int) -> None:
  """Puts this process on `number` cores, as a suite's worker; 0: all. Call it before JAX."""
  malloc.keep_freed()
  if number and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def device_name() -> str:
  """'gpu: NVIDIA H200' of the first local device."""
  device = jax.local_devices()[0]
  return f'{device.platform}: {device.device_kind}'


@dataclasses.dataclass(frozen=True)
class Measurements:
  """Measured lines in a file, and the page that shows them.

  Attributes:
    file: of JSON lines.
    identity: names of the values by which a new line replaces older ones.
    page: lines -> Markdown.
    page_file: of the page.
  """
  file: pathlib.Path
  identity: tuple[str, ...]
  page: Callable[[list[Line]], str]
  page_file: pathlib.Path

  def lines(self) -> list[Line]:
    """All lines measured so far."""
    return metrics.read_lines(self.file)

  def keys(self) -> set[str]:
    """The 'key' of all lines measured so far."""
    return {line['key'] for line in self.lines()}

  def add(self, new: Sequence[Line]) -> None:
    """Writes lines in place of those of equal identity."""
    identity = lambda line: [line[name] for name in self.identity]
    replaced = [identity(line) for line in new]
    kept = [line for line in self.lines() if identity(line) not in replaced]
    results.write_lines(self.file, [*kept, *new])

  def measure(self, cases: Iterable[Any], measure: Callable[[Any], Line], unit: str) -> int:
    """Adds measure(case) for each case, at once; returns how many raised ConfigError.

    cases: each with a `name`.
    """
    failed = 0
    with progress(cases, unit=unit) as bar:
      for case in bar:
        bar.set_postfix_str(case.name)
        try:
          line = measure(case)
        except ConfigError as error:
          tqdm.write(f'{case.name}: {error}', file=sys.stderr)
          failed += 1
        else:
          self.add([line])
    return failed

  def finish(self, work: Callable[[], int], show: bool) -> int:
    """Does the work unless `show`, and prints the page of all lines; the exit code.

    work: adds lines; returns how many could not be measured.
    """
    try:
      failed = 0 if show else work()
    except KeyboardInterrupt:
      print('stopped; finished measurements are kept, and the same command goes on',
            file=sys.stderr)
      return 130
    if lines := self.lines():
      text = self.page(lines)
      print(text, end='')
      if not show:
        results.write_text(self.page_file, text)
    return 1 if failed else 0


def add_measurement_flags(parser: argparse.ArgumentParser, folder: pathlib.Path,
                          smoke: pathlib.Path | None = None) -> None:
  """Adds --show and --results; `smoke`, if there is such a scale, is its default: see folder_of."""
  tiny = f'; of --scale=smoke {smoke}' if smoke else ''
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  parser.add_argument('--results', metavar='DIR', type=pathlib.Path,
                      help=f'folder of the measurements (default: {folder}{tiny})')


def folder_of(args: argparse.Namespace, folder: pathlib.Path, smoke: pathlib.Path
              ) -> pathlib.Path:
  """The folder of the measurements. By default, a tiny scale writes to a folder of its own."""
  return args.results or (smoke if args.scale == 'smoke' else folder)


def table(headers: Sequence[str], rows: Iterable[Iterable[Any]], left: Collection[int] = (0,)
          ) -> list[str]:
  """Lines of a Markdown table; columns other than `left` flush right."""
  rule = ''.join('---|' if i in left else '---:|' for i in range(len(headers)))
  return ['| ' + ' | '.join(headers) + ' |', '|' + rule,
          *('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)]


def made_by(lines: Iterable[Line]) -> str:
  """'JAX 0.10.2; `command`.' of measured lines."""
  lines = list(lines)
  return (f'JAX {", ".join(sorted({line["versions"]["jax"] for line in lines}))}; '
          + ', '.join(f'`{command}`' for command in sorted({line['command'] for line in lines}))
          + '.')


def number(value: float | None, form: str = ',.2f', unknown: str = '–') -> str:
  """A number as a cell of a table; `unknown` for None."""
  return unknown if value is None else format(value, form)
