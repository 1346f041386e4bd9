"""Scores of texts that a model said against the answers that are right; all are fractions or rates.

Texts are compared as they are, without any normalisation.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence

from moejax.config import check_choice

References = Sequence[tuple[str, ...]]   # per prediction: every right answer, at least one


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
  """Levenshtein distance: fewest insertions, deletions and substitutions that turn a into b."""
  row = list(range(len(b) + 1))
  for i, x in enumerate(a, start=1):
    diagonal, row[0] = row[0], i
    for j, y in enumerate(b, start=1):
      diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
  return row[-1]


def phoneme_error_rate(predictions: Sequence[str], references: References) -> float:
  """Edits over reference length, both summed over all words; symbols are separated by spaces.

  Of several references the one at the smallest distance counts, of those the first. May exceed 1.
  """
  edits = length = 0
  for said, right in zip(predictions, references, strict=True):
    symbols = [r.split() for r in right]
    distance = [edit_distance(said.split(), s) for s in symbols]
    edits += min(distance)
    length += len(symbols[distance.index(min(distance))])
  return edits / length


def exact_match(predictions: Sequence[str], references: References) -> float:
  """Fraction of predictions that are one of their references."""
  right = [said in answers for said, answers in zip(predictions, references, strict=True)]
  return sum(right) / len(right)


def word_error_rate(predictions: Sequence[str], references: References) -> float:
  """Fraction of words whose pronunciation is none of the references."""
  wrong = [said not in answers for said, answers in zip(predictions, references, strict=True)]
  return sum(wrong) / len(wrong)


# Metric -> its scores by name; the first is the one that is averaged over tasks.
METRICS: dict[str, dict[str, Callable[[Sequence[str], References], float]]] = {
    'exact_match': {'exact_match': exact_match},
    'pronunciation': {'phoneme_error_rate': phoneme_error_rate,
                      'word_error_rate': word_error_rate},
}


def score(metric: str, predictions: Sequence[str], references: References, tasks: Sequence[int],
          names: Sequence[str] = ()) -> dict[str, float]:
  """Scores over all predictions and per task.

  Args:
    metric: a key of METRICS; a Dataset's `metric`.
    predictions: what was said.
    references: the right answers to each.
    tasks: of each, an index of names; not read where there are no names.
    names: of tasks; () where there is one.

  Returns:
    For each score 'SCORE' over all predictions; with names also 'NAME/SCORE', and
    'mean_over_tasks', the unweighted mean of the first score, as SuperGLUE averages. A task
    without predictions scores nan, and so does the mean: a part never passes for the whole.

  Raises:
    ValueError: unknown metric, nothing to score, lengths that differ, a prediction without
      reference, or a task that has no name.
  """
  check_choice('metric', metric, METRICS)
  if not len(predictions) == len(references) == len(tasks):
    raise ValueError(f'{len(predictions)} predictions, {len(references)} references and '
                     f'{len(tasks)} tasks: there must be as many of each')
  if not predictions:
    raise ValueError('no prediction to score')
  if not all(references):
    raise ValueError(f'prediction {[bool(r) for r in references].index(False)} has no reference; '
                     'leave out filler rows')
  results = {name: f(predictions, references) for name, f in METRICS[metric].items()}
  if not names:
    return results
  rows = _by_task(tasks, len(names))
  for n, task in enumerate(names):
    said, right = [predictions[i] for i in rows[n]], [references[i] for i in rows[n]]
    for name, f in METRICS[metric].items():
      results[f'{task}/{name}'] = f(said, right) if said else float('nan')
  first = next(iter(METRICS[metric]))
  results['mean_over_tasks'] = sum(results[f'{task}/{first}'] for task in names) / len(names)
  return results


def majority(references: References, tasks: Sequence[int]) -> dict[int, str]:
  """Task -> the commonest target (first reference); of equally common ones the first in order."""
  return {task: min(Counter(references[i][0] for i in rows).items(), key=lambda x: (-x[1], x[0]))[0]
          for task, rows in _by_task(tasks).items()}


def baseline(metric: str, train: tuple[References, Sequence[int]],
             evaluated: tuple[References, Sequence[int]],
             names: Sequence[str] = ()) -> dict[str, float]:
  """`score` of always giving each task's commonest answer in training: what is to be beaten.

  Args:
    metric, names: as of `score`.
    train, evaluated: (references, tasks), as Dataset.answers returns them.
  """
  answer = majority(*train)
  references, tasks = evaluated
  # A task that training lacks has no commonest answer: nothing is said.
  return score(metric, [answer.get(t, '') for t in tasks], references, tasks, names)


def _by_task(tasks: Sequence[int], number: int = 0) -> dict[int, list[int]]:
  """Task -> its rows; ValueError if a task is not below `number` (0: any)."""
  rows: dict[int, list[int]] = defaultdict(list)
  for i, task in enumerate(tasks):
    if number and not 0 <= task < number:
      raise ValueError(f'task {task} of prediction {i} has no name: {number} names were given')
    rows[int(task)].append(i)
  return rows
