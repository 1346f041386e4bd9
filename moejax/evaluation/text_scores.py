"""Scores decoded texts against the right answers; all scores are fractions or rates.

Texts are compared without normalisation.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

from moejax.config import check_choice

References = Sequence[tuple[str, ...]]   # per prediction: every right answer, at least one


def phoneme_error_rate(predictions: Sequence[str], references: References) -> float:
  """Edits over reference length, both summed over all words; may exceed 1.

  Symbols are separated by spaces. Edits (insertions, deletions, substitutions) are counted against
  the nearest reference, the first of equally near ones.
  """
  edits = length = 0
  for prediction, answers in zip(predictions, references, strict=True):
    symbols = [answer.split() for answer in answers]
    distances = [Levenshtein.distance(prediction.split(), s) for s in symbols]
    edits += min(distances)
    length += len(symbols[distances.index(min(distances))])
  return edits / length


def exact_match(predictions: Sequence[str], references: References) -> float:
  """Fraction of predictions that are one of their references."""
  right = [prediction in answers
           for prediction, answers in zip(predictions, references, strict=True)]
  return sum(right) / len(right)


def word_error_rate(predictions: Sequence[str], references: References) -> float:
  """Fraction of words whose pronunciation is none of the references."""
  wrong = [prediction not in answers
           for prediction, answers in zip(predictions, references, strict=True)]
  return sum(wrong) / len(wrong)


# {metric: {name: score}}; the first score of a metric is the one averaged over tasks.
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
    predictions: decoded texts.
    references: the right answers to each.
    tasks: index in `names` of each prediction's task; ignored without names.
    names: of tasks; () for a single task.

  Returns:
    {SCORE: over all predictions} for each score of the metric. With names also 'NAME/SCORE', and
    'mean_over_tasks', the unweighted mean of the first score, as SuperGLUE averages. The score of a
    task without predictions is nan, and so is then the mean, which would leave that task out.

  Raises:
    ValueError: unknown metric, no predictions, lengths that differ, a prediction without a
      reference, or a task without a name.
  """
  check_choice('metric', metric, METRICS)
  if not len(predictions) == len(references) == len(tasks):
    raise ValueError(f'{len(predictions)} predictions, {len(references)} references and '
                     f'{len(tasks)} tasks: there must be as many of each')
  if not predictions:
    raise ValueError('no prediction to score')
  if not all(references):
    raise ValueError(f'prediction {[bool(r) for r in references].index(False)} has no reference; '
                     'leave out filler examples')
  results = {name: f(predictions, references) for name, f in METRICS[metric].items()}
  if not names:
    return results
  by_task = _by_task(tasks, len(names))
  for n, task in enumerate(names):
    own, right = [predictions[i] for i in by_task[n]], [references[i] for i in by_task[n]]
    for name, f in METRICS[metric].items():
      results[f'{task}/{name}'] = f(own, right) if own else float('nan')
  first = next(iter(METRICS[metric]))
  results['mean_over_tasks'] = sum(results[f'{task}/{first}'] for task in names) / len(names)
  return results


def majority(references: References, tasks: Sequence[int]) -> dict[int, str]:
  """{task: its commonest target (first reference), the first in order of equally common ones}."""
  return {task: min(Counter(references[i][0] for i in of_task).items(),
                    key=lambda item: (-item[1], item[0]))[0]
          for task, of_task in _by_task(tasks).items()}


def baseline(metric: str, train: tuple[References, Sequence[int]],
             evaluated: tuple[References, Sequence[int]],
             names: Sequence[str] = ()) -> dict[str, float]:
  """`score` of always giving each task's commonest answer in training, which a model should beat.

  Args:
    metric, names: as of `score`.
    train, evaluated: (references, tasks), as Dataset.answers returns them.
  """
  answer = majority(*train)
  references, tasks = evaluated
  # A task that training lacks has no commonest answer: its prediction is ''.
  return score(metric, [answer.get(t, '') for t in tasks], references, tasks, names)


def _by_task(tasks: Sequence[int], number: int = 0) -> dict[int, list[int]]:
  """{task: indices of its predictions}; ValueError if a task is not below `number` (0: any is)."""
  by_task: dict[int, list[int]] = defaultdict(list)
  for i, task in enumerate(tasks):
    if number and not 0 <= task < number:
      raise ValueError(f'task {task} of prediction {i} has no name: {number} names were given')
    by_task[int(task)].append(i)
  return by_task
