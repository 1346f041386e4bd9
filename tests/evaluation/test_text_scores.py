"""Scores against values worked by hand."""

import math

import pytest

from moejax.evaluation import text_scores


@pytest.mark.parametrize('a, b, edits', [
    ('A B C', '', 3), ('A B C', 'A B C', 0),
    ('K I T T E N', 'S I T T I N G', 3),      # K/S, E/I, +G
    ('A B', 'B A', 2),                        # a transposition is two edits
    ('A B C D E F', 'B C D E F G', 2),        # -A, +G; position by position all six differ
    ('HH AH', 'HH AA AH', 1)])                # symbols, not characters
def test_edits_are_insertions_deletions_and_substitutions(a, b, edits):
  for prediction, reference in ((a, b), (b, a)):
    if reference:
      rate = text_scores.phoneme_error_rate([prediction], [(reference,)])
      assert rate == edits / len(reference.split())


def test_phoneme_error_rate_is_edits_over_length_of_the_corpus():
  # 1 edit of 2 symbols and 0 of 6: 1 / 8, where the mean of the words' rates would be 1 / 4.
  predictions = ['K AE', 'B AH N AE N AH']
  right = [('K AA',), ('B AH N AE N AH',)]
  assert text_scores.phoneme_error_rate(predictions, right) == 1 / 8
  # 'TH' for 'T' is one edit, and an empty prediction is all of them.
  assert text_scores.phoneme_error_rate(['TH', ''], [('T',), ('AH B',)]) == (1 + 2) / 3
  assert text_scores.phoneme_error_rate(['A B C'], [('D',)]) == 3.0


def test_the_nearest_reference_counts():
  # Against (A B C D) 2 edits, against (A X) 1: one edit over the nearest one's two symbols.
  assert text_scores.phoneme_error_rate(['A B'], [('A B C D', 'A X')]) == 1 / 2
  assert text_scores.phoneme_error_rate(['A B'], [('A X', 'A B C D')]) == 1 / 2
  # Equally near: the first, three symbols and then one.
  assert text_scores.phoneme_error_rate(['A B'], [('A B C', 'B')]) == 1 / 3
  assert text_scores.phoneme_error_rate(['A B'], [('B', 'A B C')]) == 1


def test_word_error_rate_and_exact_match_accept_any_reference():
  predictions, right = ['a', 'b', 'c', 'd '], [('a',), ('x', 'b'), ('x', 'y'), ('d',)]
  assert text_scores.exact_match(predictions, right) == 2 / 4
  assert text_scores.word_error_rate(predictions, right) == 2 / 4
  assert text_scores.word_error_rate(['a'] * 3, [('a',), ('b',), ('c',)]) == 2 / 3


def test_scores_per_task_and_their_mean():
  # Task 0: 1 of 1; task 1: 1 of 4. All: 2 / 5; the mean of the tasks (1 + 1/4) / 2 = 5 / 8.
  predictions = ['a', 'b', 'x', 'x', 'x']
  right = [('a',), ('b',), ('b',), ('b',), ('b',)]
  got = text_scores.score('exact_match', predictions, right, [0, 1, 1, 1, 1], ('name', 'swap'))
  assert got == {'exact_match': 2 / 5, 'name/exact_match': 1.0, 'swap/exact_match': 1 / 4,
                 'mean_over_tasks': 5 / 8}
  assert text_scores.score('exact_match', predictions, right, [0] * 5) == {'exact_match': 2 / 5}


def test_pronunciation_scores():
  got = text_scores.score('pronunciation', ['A B', 'C'], [('A B',), ('C D',)], [0, 1], ('p', 'q'))
  assert got == {'phoneme_error_rate': 1 / 4, 'word_error_rate': 1 / 2,
                 'p/phoneme_error_rate': 0.0, 'p/word_error_rate': 0.0,
                 'q/phoneme_error_rate': 1 / 2, 'q/word_error_rate': 1.0,
                 'mean_over_tasks': (0 + 1 / 2) / 2}


def test_a_task_without_predictions_does_not_vanish_from_the_mean():
  got = text_scores.score('exact_match', ['a'], [('a',)], [1], ('name', 'swap'))
  assert got['swap/exact_match'] == got['exact_match'] == 1.0
  assert math.isnan(got['name/exact_match']) and math.isnan(got['mean_over_tasks'])


@pytest.mark.parametrize('predictions, references', [
    ([], []), (['a', 'b'], [('a',), ()]), (['a', 'b'], [('a',)])])
def test_what_cannot_be_scored(predictions, references):
  with pytest.raises(ValueError):
    text_scores.score('exact_match', predictions, references, [0] * len(predictions))


def test_majority_answers_score_what_they_should():
  # 'y' for task 0; 'p' and 'q' tie in task 1: the first in order.
  train = [('x',), ('y',), ('y', 'x'), ('q',), ('p',)], [0, 0, 0, 1, 1]
  evaluated = [('y',), ('x',), ('z', 'y'), ('p',)], [0, 0, 0, 1]
  got = text_scores.baseline('exact_match', train, evaluated, ('a', 'b'))
  assert got == {'exact_match': 3 / 4, 'a/exact_match': 2 / 3, 'b/exact_match': 1.0,
                 'mean_over_tasks': (2 / 3 + 1) / 2}
  # A task that was not trained on: its prediction is empty, and wrong.
  got = text_scores.baseline('exact_match', ([('y',)], [0]), evaluated, ('a', 'b'))
  assert got['b/exact_match'] == 0.0
