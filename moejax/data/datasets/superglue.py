"""SuperGLUE (Wang et al. 2019) as one text-to-text mixture, from TFDS, worded as T5 words it.

Inputs and targets are those of the t5 library's preprocessors (`glue`, `record` and `wsc` of
t5/data/preprocessors.py), checked against its code; Raffel et al. 2020 print examples in appendix
D. An input is the task's name and its features, each after its own name; a target is the label's
name, or for record one of the answers.

The mixture is examples-proportional without a cap on any task, as t5's super_glue_v102_proportional
is: every epoch has each training example once, in shuffled order. record has one example for each
right answer, as in t5, and makes up three quarters of the mixture.

What differs from t5: the target of wsc is whether two marked spans are the same (t5's `wsc`:
'True', 'False'), and all 554 examples are trained on. In t5's own mixture the target is the noun
(`wsc_simple`), from the 259 true examples and 1,322 of Definite Pronoun Resolution.

Scores are exact match (text_scores.py). For boolq, copa, rte, wic and wsc that is the benchmark's
own accuracy. The others differ from it, so the mean over tasks is not a SuperGLUE score: cb has
accuracy alone, where the benchmark averages it with macro F1; multirc the accuracy of single
answers, not F1 over answers and exact match of questions; record whether one of the right answers
is given literally, where the benchmark takes the best F1 and exact match after normalising case,
articles and punctuation.
"""

import re
from typing import Any

from tqdm import tqdm

from moejax.config import ConfigError
from moejax.data.config import DataConfig
from moejax.data.datasets import tfds
from moejax.data.source import Source
from moejax.data.text_pairs import Pair, pair_source

# Task -> (its configuration of TFDS's super_glue, features in the order in which they are read).
TASKS = {
    'boolq': ('boolq', ('passage', 'question')),
    'cb': ('cb', ('hypothesis', 'premise')),
    'copa': ('copa', ('choice1', 'choice2', 'premise', 'question')),
    'multirc': ('multirc', ('question', 'answer', 'paragraph')),
    'record': ('record', ('query', 'entities', 'passage')),
    'rte': ('rte', ('hypothesis', 'premise')),
    'wic': ('wic', ('sentence1', 'sentence2', 'word')),
    'wsc': ('wsc.fixed', ('text',)),
}
# TFDS's test splits have no labels: the official validation set is for reporting, the end of the
# training set for choosing.
SPLITS = {'train': 'train[:95%]', 'validation': 'train[95%:]', 'test': 'validation'}


def load(config: DataConfig) -> Source:
  """All eight tasks of SuperGLUE (TASKS), read into memory: some 0.3 GB, in half a minute.

  'test' is the official validation set, 'validation' the last 5 % of each training set, unless
  config.tfds names others. In multirc and record 'validation' shares passages with the training
  examples: it is for choosing, not for reporting. In evaluation a query of record is one example,
  with every right answer as a reference.

  Raises:
    ConfigError: a task is not prepared (see tfds.load), or a split has no labels.
  """
  splits: dict[str, list[Pair]] = {name: [] for name in SPLITS}
  for number, (task, (configuration, _)) in enumerate(TASKS.items()):
    name = f'super_glue/{configuration}'
    builder = tfds.open_builder(name, config.data_dir)
    features = builder.info.features
    labels = features['label'].names if 'label' in features else ()
    for ours, theirs in (config.tfds.splits or SPLITS).items():
      examples = tfds.open_split(builder, name, theirs)
      for example in tqdm(examples, desc=f'{task} {ours}', leave=False, disable=None):
        answers = right_answers(example, labels)
        if not answers:
          raise ConfigError(f'data.tfds.{ours}: {theirs!r} of {name} has no labels. '
                            "Leave the splits of data.tfds empty, or take train and validation.")
        text = as_input(task, example).encode()
        splits[ours] += _pairs(text, answers, number, ours == 'train')
  return pair_source(splits, config.metric, tuple(TASKS))


def _pairs(text: bytes, answers: list[bytes], task: int, train: bool) -> list[Pair]:
  """In training a pair for each answer; else one pair, with all answers as references."""
  if train:
    return [Pair(text, answer, task) for answer in answers]
  return [Pair(text, answers[0], task, tuple(answers) if len(answers) > 1 else ())]


def right_answers(example: dict[str, Any], labels: tuple[str, ...]) -> list[bytes]:
  """The right answers of a TFDS example; [] where TFDS withholds them."""
  if 'answers' in example:
    return [tfds.as_bytes(answer) for answer in example['answers']]
  return [labels[example['label']].encode()] if example['label'] >= 0 else []


def as_input(task: str, example: dict[str, Any]) -> str:
  """The input of a TFDS example: 'wic sentence1: ... sentence2: ... word: ...'."""
  if task == 'record':
    return _record(example)
  features = {key: _text(example[key]) for key in TASKS[task][1]}
  if task == 'wsc':
    features['text'] = _marked(features['text'], example)
  text = ' '.join([task, *(f'{key}: {value}' for key, value in features.items())])
  if task == 'multirc':   # its paragraphs contain HTML
    text = re.sub('</?b>', '', text.replace('<br>', ' '))
  return text


def _record(example: dict[str, Any]) -> str:
  """record's input: the summary's lines become sentences; entities are listed with commas."""
  passage = re.sub(r'([.?!"\'])\n@highlight\n', r'\1 ', _text(example['passage']))
  passage = passage.replace('\n@highlight\n', '. ')
  entities = ', '.join(map(_text, example['entities']))
  return f'record query: {_text(example["query"])} entities: {entities} passage: {passage}'


def _marked(text: str, example: dict[str, Any]) -> str:
  """wsc's text with the noun between * and the pronoun between #: '# It # is a * test * .'."""
  first, second = int(example['span1_index']), int(example['span2_index'])
  text = _mark(text, _text(example['span1_text']), first, '*')
  # The two marks of a first span count as words.
  return _mark(text, _text(example['span2_text']), second + 2 * (first < second), '#')


def _mark(text: str, span: str, index: int, mark: str) -> str:
  """text with a mark before and after span, if span starts at word `index`; else text.

  t5 takes the span for a regular expression; here it is literal.
  """
  pattern = rf'^((?:\S+\s){{{index}}})({re.escape(span)})'
  return re.sub(pattern, lambda m: f'{m[1]}{mark} {m[2]} {mark}', text)


def _text(value: Any) -> str:
  return tfds.as_bytes(value).decode('utf-8', errors='replace')
