"""Step n's batch as a pure function of (config, seed, n), by Grain.

Grain composes, in this order: the numbers of a split's examples; their shuffle by the seed, anew
in each epoch, without end; a few random numbers per example; batches of one host's size; every
hosts-th of these, from this host's own on; the heavy work, on a whole batch. So the hosts' batches
at step n are the parts of one global batch, which does not depend on the number of hosts. The
position is the step; nothing else is stored.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from moejax.config import check, check_choice
from moejax.data import registry
from moejax.data.config import DataConfig
from moejax.data.image import ImageProcessor
from moejax.data.source import Source
from moejax.data.text import TextProcessor
from moejax.data.text_pairs import PairProcessor, references

EVAL_SEED = 20221209   # of evaluation: its examples, windows and distortions ignore a run's seed
# Settings that leave the contents of a split as they are.
NOT_SHAPING = ('batch_size', 'eval_batch_size', 'cache_dir', 'data_dir', 'threads')
CORRUPTING = ('window', 'noise_density', 'mean_span_length')   # settings of text that pairs ignore

Batch = dict[str, np.ndarray]
Processor = ImageProcessor | TextProcessor | PairProcessor


class Dataset:
  """One host's part of the batches of all splits.

  A batch is a dict. Of 'classification': image (B, S, S, C) float32, label (B,) int32, weight (B,)
  float32. Of 'seq2seq': encoder_input (B, Le), decoder_input, target (B, Ld) int32, weight (B, Ld)
  float32; of pairs also task (B,) int32 and example (B,) int32, the example's number in its split.
  Of both: index (B,) int32, the position in the GLOBAL batch. The last batch of an evaluation is
  filled up with filler examples, zero in all but index.

  Attributes:
    kind: 'classification' or 'seq2seq'.
    tasks: names that a batch's task indexes; () for a single task.
    metric: how decoded outputs are scored, see text_scores.py; '' where there are no pairs.
    num_classes, image_shape / vocab_size, encoder_length, decoder_length: 0 or () where they do not
      apply.
    vocabulary: of text (encode, decode), else None.
    examples: {split: number of examples that are evaluated, or trained on per epoch}.
    fingerprint: SHA-256 hex of the data and of the settings that shape it; seed, batch sizes and
      folders are not among them.
  """

  def __init__(self, config: DataConfig, seed: int, host: int = 0, hosts: int = 1):
    check(0 <= seed < 2**32, 'seed', seed, '0 to 2**32 - 1', 'Choose a smaller one.')
    check(hosts >= 1 and 0 <= host < hosts, 'host', host, f'0 to {hosts - 1}',
          'Pass jax.process_index() and jax.process_count().')
    for key in ('batch_size', 'eval_batch_size'):
      given = getattr(config, key)
      check(given % hosts == 0, f'data.{key}', given, f'a multiple of the {hosts} hosts',
            f'Use {max(given // hosts, 1) * hosts}.')
    self._config, self._host, self._hosts = config, host, hosts
    source = registry.load(config)
    self._processor = make_processor(config, source)
    self.kind, self.metric = source.kind, config.metric
    self.tasks, self._pairs = source.tasks, source.pairs
    self.num_classes = source.num_classes
    image = isinstance(self._processor, ImageProcessor)
    self.image_shape = self._processor.image_shape if image else ()
    self.vocabulary = None if image else self._processor.vocabulary
    self.vocab_size = 0 if image else self.vocabulary.size
    self.encoder_length = 0 if image else config.text.encoder_length
    self.decoder_length = 0 if image else config.text.decoder_length
    self._splits = source.splits
    for split, examples in source.splits.items():
      check(len(examples) > 0, 'data.source', config.source, f'at least one example in {split!r}',
            'Shorten data.text.window, or choose other splits.')
    self.examples = {split: len(examples) if split == 'train' else self._evaluated(split)
                     for split, examples in source.splits.items()}
    self.fingerprint = _fingerprint(config, source)
    self._train = self._train_pipeline(seed)

  def train_batch(self, step: int) -> Batch:
    """This host's part of the global batch of `step`."""
    return self._train[step]

  def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
    """train_batch(start), ..., train_batch(stop - 1), made ahead by threads."""
    return self._prefetch(self._train[start:stop])

  def eval_batches(self, split: str = 'validation') -> Iterator[Batch]:
    """The batches of one pass over a split, in an order and with draws that only the config sets.

    All batches have one shape; filler examples follow the last one. In 'train' images are not
    flipped or cropped. Raises ConfigError on an unknown split.
    """
    check_choice('split', split, self._splits)
    return self._prefetch(self._eval_pipeline(split))

  def references(self, split: str, batch: Batch) -> list[tuple[str, ...]]:
    """The right answers of each example in a batch of a split of pairs; () for a filler example.

    The first answer is the target. Answers are the source's texts, not what the vocabulary can
    express of them: compare them with `vocabulary.decode` of a model's output.
    """
    examples, real = self._pairs_of(split), batch['weight'].any(axis=1)
    return [references(examples[int(n)]) if r else () for n, r in zip(batch['example'], real)]

  def answers(self, split: str) -> tuple[list[tuple[str, ...]], list[int]]:
    """(right answers, task) of every example of a split.

    text_scores.baseline needs them to score always giving the commonest answer.
    """
    examples = self._pairs_of(split)
    read = [examples[i] for i in range(len(examples))]
    return [references(e) for e in read], [int(e['task']) for e in read]

  def _pairs_of(self, split: str) -> Sequence:
    check(self._pairs, 'data.source', self._config.source, 'a source of pairs',
          'Only those have answers to compare: stdlib_tasks, cmudict, data.tfds.input and target.')
    check_choice('split', split, self._splits)
    return self._splits[split]

  def _train_pipeline(self, seed: int) -> grain.MapDataset:
    size = self._config.batch_size // self._hosts
    ds = self._numbers('train').seed(seed).shuffle().random_map(self._reader('train', train=True))
    ds = ds.repeat().batch(size, batch_fn=_stack)[self._host::self._hosts]
    index = self._global_index(size)
    return ds.map(lambda batch: {**self._processor.finish(batch), 'index': index.copy()})

  def _eval_pipeline(self, split: str) -> grain.MapDataset:
    batch_size, repeats = self._config.eval_batch_size, self._config.eval_repeats
    n = self._evaluated(split) * repeats
    size = batch_size // self._hosts
    padded = -(-n // batch_size) * batch_size
    index = self._global_index(size)

    def finish(step, batch):
      batch = self._processor.finish(batch)
      filler = step * batch_size + index >= n                      # (size,)
      for value in batch.values():
        value[filler] = 0
      return {**batch, 'index': index.copy()}

    order = self._numbers(split).shuffle(EVAL_SEED)
    ds = grain.MapDataset.range(n).map(lambda i: order[i % (n // repeats)])
    ds = ds.random_map(self._reader(split, train=False), seed=EVAL_SEED).repeat()[:padded]
    return ds.batch(size, batch_fn=_stack)[self._host::self._hosts].map_with_index(finish)

  def _numbers(self, split: str) -> grain.MapDataset:
    """The numbers of a split's examples.

    Not the examples by MapDataset.source, which records metrics on each of many small reads.
    """
    return grain.MapDataset.range(len(self._splits[split]))

  def _reader(self, split: str, train: bool) -> Callable:
    """A function (number of an example, random generator) -> the example's arrays."""
    examples, draw = self._splits[split], self._processor.draw
    if self._pairs:
      return lambda number, rng: {**draw(examples[number], rng, train), 'example': np.int32(number)}
    return lambda number, rng: draw(examples[number], rng, train)

  def _evaluated(self, split: str) -> int:
    """How many examples of `split`, which may be 'train', an evaluation covers."""
    return min(len(self._splits[split]), self._config.eval_examples or len(self._splits[split]))

  def _global_index(self, size: int) -> np.ndarray:
    """(size,) positions of this host's examples in the global batch."""
    return np.arange(self._host * size, (self._host + 1) * size, dtype=np.int32)

  def _prefetch(self, ds: grain.MapDataset) -> Iterator[Batch]:
    threads = self._config.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    batches = iter(ds.to_iter_dataset(options))
    try:
      yield from batches
    finally:
      batches.close()   # an abandoned iterator stops making batches


def _stack(examples: list[Batch]) -> Batch:
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}


def make_processor(config: DataConfig, source: Source) -> Processor:
  """What turns the source's examples into batches.

  Raises:
    ConfigError: text lengths do not fit a window, or targets do not fit decoder_length.
  """
  if source.kind == 'classification':
    return ImageProcessor(config.image, source.channels, source.same_shape)
  if not source.pairs:
    return TextProcessor(config.text)
  processor = PairProcessor(config.text)
  # The longest in bytes first, so that the length in the error is (for bytes) enough for all.
  targets = set().union(*(examples.targets for examples in source.splits.values()))
  for target in sorted(targets, key=lambda t: (-len(t), t)):
    processor.check_target(target)
  return processor


def _fingerprint(config: DataConfig, source: Source) -> str:
  """See Dataset.fingerprint.

  Later settings at their default are left out, so that earlier results keep their fingerprints.
  """
  shaping = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SHAPING}
  shaping.pop('text' if source.kind == 'classification' else 'image')
  if source.pairs:
    shaping['text'] = {k: v for k, v in shaping['text'].items() if k not in CORRUPTING}
  else:
    del shaping['tfds']['input'], shaping['tfds']['target']
  if source.kind == 'classification' and not config.image.skip_classes:
    del shaping['image']['skip_classes']
  if config.eval_repeats == 1:
    del shaping['eval_repeats']
  counts = {split: len(examples) for split, examples in source.splits.items()}
  record = json.dumps([shaping, counts, source.digest], sort_keys=True)
  return hashlib.sha256(record.encode()).hexdigest()


def build(config: DataConfig, *, seed: int, host: int = 0, hosts: int = 1) -> Dataset:
  """The dataset that a config names, for host `host` of `hosts`.

  Raises:
    ConfigError: batch sizes that hosts do not divide, text lengths that a window does not fit, too
      many classes, a source that is missing or cannot be read.
  """
  return Dataset(config, seed, host, hosts)
