"""Scores decoded texts against the right answers; all scores are fractions or rates.

Texts are compared without normalisation.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from rapidfuzz.distance import Levenshtein

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
    ValueError: no predictions, lengths that differ, or a prediction without a reference.
  """
  if not predictions or not all(references):
    raise ValueError('no prediction to score, or one without a reference: leave out filler')
  results = {name: f(predictions, references) for name, f in METRICS[metric].items()}
  if not names:
    return results
  by_task = defaultdict(lambda: ([], []))
  for prediction, answers, task in zip(predictions, references, tasks, strict=True):
    by_task[names[task]][0].append(prediction)
    by_task[names[task]][1].append(answers)
  for task in names:
    own, right = by_task[task]
    for name, f in METRICS[metric].items():
      results[f'{task}/{name}'] = f(own, right) if own else float('nan')
  first = next(iter(METRICS[metric]))
  results['mean_over_tasks'] = sum(results[f'{task}/{first}'] for task in names) / len(names)
  return results


def baseline(metric: str, train: tuple[References, Sequence[int]],
             evaluated: tuple[References, Sequence[int]],
             names: Sequence[str] = ()) -> dict[str, float]:
  """`score` of always giving each task's commonest answer in training, which a model should beat.

  That is its commonest target (first reference), of equally common ones the first in order; '' for
  a task that training lacks.

  Args:
    metric, names: as of `score`.
    train, evaluated: (references, tasks), as Dataset.answers returns them.
  """
  counts = defaultdict(Counter)
  for answers, task in zip(*train, strict=True):
    counts[task][answers[0]] += 1
  commonest = {task: min(count, key=lambda answer: (-count[answer], answer))
               for task, count in counts.items()}
  references, tasks = evaluated
  return score(metric, [commonest.get(t, '') for t in tasks], references, tasks, names)
