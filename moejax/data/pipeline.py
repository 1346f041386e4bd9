"""Grain: step n's batch as a pure function of (config, seed, n).

global examples -> shuffle(seed), anew each epoch, without end -> a few random numbers per example
-> batches of one host's size -> every hosts-th batch, from this host's -> the heavy work, on a
whole batch. Batching to the host's size and slicing last gives each host contiguous rows of one
global batch, the same batch for 1, 2 or 4 hosts. Position is the step; nothing else is stored.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from moejax.config import check, check_choice
from moejax.data import registry
from moejax.data.config import DataConfig
from moejax.data.image import ImageProcessor
from moejax.data.text_pairs import references

EVAL_SEED = 20221209   # the same examples, windows and distortions whatever the run's seed
# Settings that change how fast or where from, not what a split contains.
NOT_SHAPING = ('batch_size', 'eval_batch_size', 'cache_dir', 'data_dir', 'threads')
CORRUPTING = ('window', 'noise_density', 'mean_span_length')   # of text, where pairs are not

Batch = dict[str, np.ndarray]


class Dataset:
  """One host's view of a source's splits.

  kind: 'classification' (image (B, S, S, C) float32, label (B,) int32, weight (B,) float32) or
    'seq2seq' (encoder_input (B, Le), decoder_input, target (B, Ld) int32, weight (B, Ld) float32).
    Every batch also has index (B,) int32, the row in the GLOBAL batch. Filler rows of a last
    evaluation batch are all zero but for index. Batches of pairs have task (B,) and example (B,)
    int32 too, the example's number in its split.
  tasks: names of what is learnt from pairs, which a batch's task indexes; () if it is one thing.
  metric: how answers to pairs are scored, see text_scores.py; '' where there are no pairs.
  num_classes, image_shape / vocab_size, encoder_length, decoder_length: 0 or () where they do not
    apply.
  vocabulary: of text (encode, decode), else None.
  examples: split -> number of examples evaluated, or drawn from per epoch.
  fingerprint: SHA-256 hex of the data and of the settings that shape it; not of the seed, batch
    sizes or folders.
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
    source, self._processor = registry.build(config)
    self.kind = source.kind
    self.tasks, self.metric, self._pairs = source.tasks, source.metric, source.pairs
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
    limit = config.eval_examples
    self.examples = {split: len(e) if split == 'train' or not limit else min(len(e), limit)
                     for split, e in source.splits.items()}
    self.fingerprint = _fingerprint(config, source)
    self._train = self._train_pipeline(seed)

  def train_batch(self, step: int) -> Batch:
    """This host's rows of step's global batch."""
    return self._train[step]

  def train_batches(self, start: int, stop: int) -> Iterator[Batch]:
    """train_batch(start), ..., train_batch(stop - 1), made ahead of time in threads."""
    return self._prefetch(self._train[start:stop])

  def eval_batches(self, split: str = 'validation') -> Iterator[Batch]:
    """A split once, in an order and with distortions that depend on nothing but the config.

    Every batch has the same shape; rows beyond the last example are filler. On 'train' it evaluates
    training examples, undistorted by flips and crops.
    """
    check_choice('split', split, self._splits)
    return self._prefetch(self._eval_pipeline(split))

  def references(self, split: str, batch: Batch) -> list[tuple[str, ...]]:
    """The right answers of each row of one of a split's batches of pairs; () for a filler row.

    The first of a row is its target. Answers are whole texts, whatever the vocabulary made of them:
    compare them with `vocabulary.decode` of what a model said.
    """
    examples, real = self._pairs_of(split), batch['weight'].any(axis=1)
    return [references(examples[int(n)]) if r else () for n, r in zip(batch['example'], real)]

  def answers(self, split: str) -> tuple[list[tuple[str, ...]], list[int]]:
    """(right answers, task) of every example that `examples[split]` counts.

    For the score of always giving the commonest answer (text_scores.baseline). It reads the
    split once.
    """
    examples, n = self._pairs_of(split), self.examples[split]
    numbers = range(n)   # of a whole split the order does not matter, and Grain's is slow to list
    if n < len(examples):
      numbers = self._numbers(split).shuffle(EVAL_SEED)[:n]
    found = [examples[int(number)] for number in numbers]
    return [references(e) for e in found], [int(e['task']) for e in found]

  def _pairs_of(self, split: str) -> Sequence:
    check(self._pairs, 'data.source', self._config.source, 'a source of pairs',
          'Only those have answers to compare: stdlib_tasks, cmudict, data.tfds.input and target.')
    check_choice('split', split, self._splits)
    return self._splits[split]

  def _train_pipeline(self, seed: int) -> grain.MapDataset:
    rows = self._config.batch_size // self._hosts
    ds = self._numbers('train').seed(seed).shuffle().random_map(self._reader('train'))
    ds = ds.repeat().batch(rows, batch_fn=_stack)[self._host::self._hosts]
    index = self._global_rows(rows)
    return ds.map(lambda batch: {**self._processor.finish(batch), 'index': index.copy()})

  def _eval_pipeline(self, split: str) -> grain.MapDataset:
    batch_size, repeats = self._config.eval_batch_size, self._config.eval_repeats
    n = self._evaluated(split) * repeats
    rows = batch_size // self._hosts
    whole = -(-n // batch_size) * batch_size
    index = self._global_rows(rows)

    def finish(step, batch):
      batch = self._processor.finish(batch)
      filler = step * batch_size + index >= n                      # (rows,)
      for value in batch.values():
        value[filler] = 0
      return {**batch, 'index': index.copy()}

    order = self._numbers(split).shuffle(EVAL_SEED)
    ds = grain.MapDataset.range(n).map(lambda i: order[i % (n // repeats)])
    ds = ds.random_map(self._reader(split, fixed=True), seed=EVAL_SEED).repeat()[:whole]
    return ds.batch(rows, batch_fn=_stack)[self._host::self._hosts].map_with_index(finish)

  def _numbers(self, split: str) -> grain.MapDataset:
    # Numbers, not MapDataset.source, which pays for metrics on each of 64 small reads per batch.
    return grain.MapDataset.range(len(self._splits[split]))

  def _reader(self, split: str, fixed: bool = False) -> Callable:
    examples = self._splits[split]
    draw = self._processor.draw_fixed if fixed else self._processor.draw
    if self._pairs:
      return lambda number, rng: {**draw(examples[number], rng), 'example': np.int32(number)}
    return lambda number, rng: draw(examples[number], rng)

  def _evaluated(self, split: str) -> int:
    """Examples of `split` that an evaluation covers, 'train' included."""
    return min(len(self._splits[split]), self._config.eval_examples or len(self._splits[split]))

  def _global_rows(self, rows: int) -> np.ndarray:
    return np.arange(self._host * rows, (self._host + 1) * rows, dtype=np.int32)

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


def _fingerprint(config: DataConfig, source: registry.Source) -> str:
  shaping = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_SHAPING}
  shaping.pop('text' if source.kind == 'classification' else 'image')
  if source.pairs:
    shaping['text'] = {k: v for k, v in shaping['text'].items() if k not in CORRUPTING}
  else:   # and results from before there were pairs keep their fingerprints
    del shaping['tfds']['input'], shaping['tfds']['target']
  if source.kind == 'classification' and not config.image.skip_classes:   # likewise
    del shaping['image']['skip_classes']
  if config.eval_repeats == 1:   # likewise
    del shaping['eval_repeats']
  counts = {split: len(examples) for split, examples in source.splits.items()}
  record = json.dumps([shaping, counts, source.digest], sort_keys=True)
  return hashlib.sha256(record.encode()).hexdigest()


def build(config: DataConfig, *, seed: int, host: int = 0, hosts: int = 1) -> Dataset:
  """The dataset a config names, as host `host` of `hosts` sees it.

  Raises:
    ConfigError: whatever cannot work, before anything is trained: see settings.py for ranges;
      batch sizes that hosts do not divide; text lengths a window does not fit; a TFDS folder that
      is missing or not array_record.
  """
  return Dataset(config, seed, host, hosts)


def throughput(dataset: Dataset, steps: int, *, threads: bool = False) -> float:
  """Batches per second of `steps` training batches, made in this thread or, as in training, ahead.

  Compare with the train step's own rate: the loader must be the faster of the two.
  """
  dataset.train_batch(0)   # imports and first touches are not throughput
  start = time.perf_counter()
  if threads:
    for _ in dataset.train_batches(1, steps + 1):
      pass
  else:
    for step in range(1, steps + 1):
      dataset.train_batch(step)
  return steps / (time.perf_counter() - start)
