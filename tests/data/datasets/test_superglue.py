"""SuperGLUE worded as in t5: each task by hand, and all eight really prepared, in one mixture."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moejax import data
from moejax.config import ConfigError
from moejax.data.datasets import superglue
from tests.data.datasets.prepare import prepare

LABELS = {'cb': ('entailment', 'contradiction', 'neutral'), 'copa': ('choice1', 'choice2'),
          'rte': ('entailment', 'not_entailment')}
BOOLEAN = ('False', 'True')

# Task -> (an example as TFDS gives it, input, right answers).
BY_HAND = {
    'boolq': ({'question': 'is ice cold', 'passage': 'Ice is frozen water.', 'label': 1, 'idx': 0},
              'boolq passage: Ice is frozen water. question: is ice cold', ['True']),
    'cb': ({'premise': 'B: I think it rained.', 'hypothesis': 'it rained', 'label': 2, 'idx': 0},
           'cb hypothesis: it rained premise: B: I think it rained.', ['neutral']),
    'copa': ({'premise': 'It rained.', 'choice1': 'We got wet.', 'choice2': 'We got rich.',
              'question': 'effect', 'label': 0, 'idx': 0},
             'copa choice1: We got wet. choice2: We got rich. premise: It rained. '
             'question: effect', ['choice1']),
    'multirc': ({'paragraph': '<b>Sent 1: </b>A cat sat.<br><b>Sent 2: </b>It left.<br>',
                 'question': 'Who <b>sat</b>?', 'answer': 'a dog', 'label': 0,
                 'idx': {'paragraph': 0, 'question': 0, 'answer': 0}},
                'multirc question: Who sat? answer: a dog paragraph: Sent 1: A cat sat. '
                'Sent 2: It left. ', ['False']),
    'record': ({'passage': 'Rain fell in Bonn.\n@highlight\nRoads flooded\n@highlight\nBonn waits',
                'query': '@placeholder is wet', 'entities': ['Bonn', 'Köln'],
                'answers': ['Bonn', 'Köln'], 'idx': {'passage': 0, 'query': 0}},
               'record query: @placeholder is wet entities: Bonn, Köln passage: '
               'Rain fell in Bonn. Roads flooded. Bonn waits', ['Bonn', 'Köln']),
    'rte': ({'premise': 'Bonn is on the Rhine.', 'hypothesis': 'The Rhine passes Bonn.',
             'label': 0, 'idx': 0},
            'rte hypothesis: The Rhine passes Bonn. premise: Bonn is on the Rhine.',
            ['entailment']),
    'wic': ({'word': 'bank', 'sentence1': 'A river bank.', 'sentence2': 'A savings bank.',
             'start1': 8, 'end1': 12, 'start2': 10, 'end2': 14, 'label': 0, 'idx': 0},
            'wic sentence1: A river bank. sentence2: A savings bank. word: bank', ['False']),
    'wsc': ({'text': 'The dog bit Tom because he ran.', 'span1_text': 'The dog', 'span1_index': 0,
             'span2_text': 'he', 'span2_index': 5, 'label': 0, 'idx': 0},
            'wsc text: * The dog * bit Tom because # he # ran.', ['False']),
}


def as_bytes(example):
  """Strings as bytes, as TFDS has them."""
  convert = lambda v: v.encode() if isinstance(v, str) else v
  return {k: [convert(x) for x in v] if isinstance(v, list) else convert(v)
          for k, v in example.items()}


@pytest.mark.parametrize('task', superglue.TASKS)
def test_by_hand(task):
  example, text, answers = BY_HAND[task]
  example = as_bytes(example)
  assert superglue.as_input(task, example) == text
  right = superglue.right_answers(example, LABELS.get(task, BOOLEAN))
  assert [a.decode() for a in right] == answers


@pytest.mark.parametrize('text, first, second, marked', [
    # The example of t5's docstring: the pronoun is first, so its mark moves nothing.
    ('This is a test sentence .', (3, 'test'), (0, 'This'), '# This # is a * test * sentence .'),
    ('Ann (Bob) saw her .', (1, '(Bob)'), (3, 'her'), 'Ann * (Bob) * saw # her # .'),
    ('Bo told Bo that Bo won.', (2, 'Bo'), (4, 'Bo'), 'Bo told * Bo * that # Bo # won.'),
    ('No such span here.', (1, 'span'), (2, 'span'), 'No such span here.'),   # one word off
])
def test_marks_of_wsc(text, first, second, marked):
  example = {'text': text, 'span1_index': first[0], 'span1_text': first[1],
             'span2_index': second[0], 'span2_text': second[1]}
  assert superglue.as_input('wsc', example) == f'wsc text: {marked}'


def features_of(task):
  """As in TFDS's own builder, which needs TensorFlow to describe them."""
  example, text = BY_HAND[task][0], tfds.features.Text()
  kinds = {str: text, list: tfds.features.Sequence(text), int: np.int32}
  features = {k: {n: np.int32 for n in v} if k == 'idx' and isinstance(v, dict)
              else kinds[type(v)] for k, v in example.items()}
  if 'label' in example:
    features['label'] = tfds.features.ClassLabel(names=LABELS.get(task, BOOLEAN))
  return features


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  """Twenty training examples of each task, as in BY_HAND, three to validate, two without labels."""
  folder = tmp_path_factory.mktemp('tfds')
  for task, (configuration, _) in superglue.TASKS.items():
    example = BY_HAND[task][0]
    unlabelled = example | ({'label': -1} if 'label' in example else {'answers': []})
    prepare(folder, 'super_glue', features_of(task),
            {'train': [example] * 20, 'validation': [example] * 3, 'test': [unlabelled] * 2},
            configuration)
  return folder


def config_of(folder, **kwargs):
  return data.DataConfig(source='super_glue', data_dir=str(folder), batch_size=20,
                         eval_batch_size=12, tfds=data.TfdsConfig(**kwargs),
                         text=data.TextConfig(encoder_length=160, decoder_length=16))


def test_eight_prepared_tasks_are_one_mixture(tfds_dir):
  dataset = data.build(config_of(tfds_dir), seed=0)
  assert (dataset.kind, dataset.metric) == ('seq2seq', 'exact_match')
  assert dataset.tasks == ('boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic', 'wsc')
  # 19 and 1 of 20, three validation examples; record has two answers, so twice 19 to train on.
  assert dataset.examples == {'train': 7 * 19 + 2 * 19, 'validation': 8, 'test': 24}
  seen = {}
  for batch in dataset.train_batches(0, 9):
    for i in range(20):
      task = dataset.tasks[batch['task'][i]]
      target = dataset.vocabulary.decode(batch['target'][i])
      assert dataset.vocabulary.decode(batch['encoder_input'][i]) == BY_HAND[task][1]
      assert target in BY_HAND[task][2]
      seen[task, target] = seen.get((task, target), 0) + 1
  assert sum(seen.values()) == 180 and len(seen) == 9   # an epoch of 171, and nine more
  assert min(seen.values()) >= 19 and max(seen.values()) <= 28
  assert 'tensorflow' not in sys.modules


def test_references_of_each_task(tfds_dir):
  dataset = data.build(config_of(tfds_dir), seed=0)
  count = dict.fromkeys(dataset.tasks, 0)
  for batch in dataset.eval_batches('test'):
    for i, answers in enumerate(dataset.references('test', batch)):
      task = dataset.tasks[batch['task'][i]]
      assert list(answers) == BY_HAND[task][2]
      assert dataset.vocabulary.decode(batch['target'][i]) == answers[0]
      count[task] += 1
  assert set(count.values()) == {3}


def test_splits_may_be_named_but_must_have_labels(tfds_dir):
  named = {'train': 'train[:50%]', 'validation': 'train[50%:75%]', 'test': 'train[75%:]'}
  dataset = data.build(config_of(tfds_dir, **named), seed=0)
  assert dataset.examples == {'train': 90, 'validation': 40, 'test': 40}
  with pytest.raises(ConfigError, match="data.tfds.test: 'test' of super_glue/boolq has no labels"):
    data.build(config_of(tfds_dir, **(named | {'test': 'test'})), seed=0)


def test_a_task_that_is_missing_is_named(tmp_path):
  with pytest.raises(ConfigError, match="no prepared copy of 'super_glue/boolq'.*tfds build"):
    data.build(config_of(tmp_path), seed=0)
