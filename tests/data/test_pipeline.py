"""Step n's batch is a pure function of (config, seed, n), on any number of hosts."""

import dataclasses
import importlib
import threading
import time

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data import image, pipeline, registry
from moejax.data.source import Source
from moejax.evaluation.text_scores import METRICS

DIGITS = data.DataConfig(source='digits', batch_size=16, eval_batch_size=64)
TEXT = data.DataConfig(source='stdlib_text', batch_size=8, eval_batch_size=32, eval_examples=70)


class Numbered:
  """n examples whose label is their number; remembers which were read."""

  def __init__(self, n):
    self.n, self.read = n, []

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    self.read.append(int(i))
    return {'image': np.full((4, 4, 1), i, np.uint8), 'label': i}


@pytest.fixture
def numbered(monkeypatch):
  """A 'digits' of 40 / 13 / 7 numbered examples."""
  splits = {'train': Numbered(40), 'validation': Numbered(13), 'test': Numbered(7)}
  source = Source('classification', splits, 'digest', 40, 1, True)
  monkeypatch.setattr(registry, 'load', lambda config: source)
  return splits


def numbered_config(**kwargs):
  return data.DataConfig(source='digits', image=data.ImageConfig(size=4, augment='none'),
                         **{'batch_size': 8, 'eval_batch_size': 4, **kwargs})


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    assert a[key].dtype == b[key].dtype
    np.testing.assert_array_equal(a[key], b[key])


def joined(batches):
  batches = list(batches)
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


@pytest.mark.parametrize('config', [DIGITS, TEXT], ids=['digits', 'text'])
def test_hosts_share_one_global_batch(config):
  whole = data.build(config, seed=3)
  parts = [data.build(config, seed=3, host=h, hosts=4) for h in range(4)]
  for step in (0, 1, 250):   # 250 is past the first epoch of digits
    batch = joined([p.train_batch(step) for p in parts])
    assert_same(batch, whole.train_batch(step))
    assert batch['index'].tolist() == list(range(config.batch_size))
  for batch, *own in zip(whole.eval_batches('test'), *(p.eval_batches('test') for p in parts),
                         strict=True):
    assert_same(joined(own), batch)


@pytest.mark.parametrize('config', [DIGITS, TEXT], ids=['digits', 'text'])
def test_prefetched_batches_equal_single_ones(config):
  dataset = data.build(config, seed=0)
  batches = list(dataset.train_batches(5, 25))
  assert len(batches) == 20
  again = data.build(config, seed=0)
  for step, batch in enumerate(batches, start=5):
    assert_same(batch, again.train_batch(step))
  assert_same(next(dataset.train_batches(24, 10**9)), batches[-1])


def test_starting_late_reads_nothing_earlier(numbered):
  dataset = data.build(numbered_config(), seed=0)
  expected = [label for step in (3, 4) for label in dataset.train_batch(step)['label']]
  numbered['train'].read.clear()
  got = [label for batch in dataset.train_batches(3, 5) for label in batch['label']]
  assert got == expected and sorted(numbered['train'].read) == sorted(expected)


def test_every_epoch_of_every_seed_is_a_permutation_of_its_own(numbered):
  labels = np.concatenate([joined(data.build(numbered_config(batch_size=24), seed=seed)
                                  .train_batches(0, 5))['label'] for seed in (0, 1)])
  epochs = labels.reshape(6, 40)   # batches run across epochs
  np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(40), (6, 1)))
  assert len({*map(tuple, epochs.tolist()), tuple(range(40))}) == 7


def test_distortions_are_drawn_anew_each_epoch():
  dataset = data.build(dataclasses.replace(DIGITS, batch_size=1297), seed=0)
  a, b = dataset.train_batch(0), dataset.train_batch(1)
  same_order = [np.lexsort((x['label'], x['image'].sum((1, 2, 3)))) for x in (a, b)]
  assert np.bincount(a['label']).tolist() == np.bincount(b['label']).tolist()
  assert (a['image'][same_order[0]] != b['image'][same_order[1]]).any(axis=(1, 2, 3)).mean() > 0.99


def test_evaluation_covers_a_split_once_and_fills_up_with_zeros(numbered):
  dataset = data.build(numbered_config(), seed=0)
  batches = list(dataset.eval_batches('validation'))
  assert [b['image'].shape for b in batches] == [(4, 4, 4, 1)] * 4
  assert dataset.examples == {'train': 40, 'validation': 13, 'test': 7}
  whole = joined(batches)
  assert sorted(whole['label'][:13].tolist()) == list(range(13))
  assert whole['weight'].tolist() == [1.0] * 13 + [0.0] * 3
  assert not whole['image'][13:].any() and not whole['label'][13:].any()
  assert whole['index'].tolist() == [0, 1, 2, 3] * 4
  assert whole['label'][:13].tolist() != list(range(13))   # the first n are not the first classes
  assert len(list(dataset.eval_batches('train'))) == 10


def test_a_host_may_hold_filler_alone(numbered):
  parts = [data.build(numbered_config(eval_batch_size=16), seed=0, host=h, hosts=4)
           for h in range(4)]
  batches = [next(p.eval_batches('test')) for p in parts]
  assert [int(b['weight'].sum()) for b in batches] == [4, 3, 0, 0]
  assert not batches[3]['image'].any() and batches[3]['index'].tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize('config', [DIGITS, TEXT], ids=['digits', 'text'])
def test_evaluation_does_not_depend_on_seed_or_batch_size(config):
  dataset = data.build(config, seed=0)
  n = dataset.examples['validation']
  a = joined(dataset.eval_batches())
  b = joined(data.build(dataclasses.replace(config, eval_batch_size=8), seed=9).eval_batches())
  a.pop('index'), b.pop('index')
  assert_same({k: v[:n] for k, v in a.items()}, {k: v[:n] for k, v in b.items()})
  weight = a['weight'].reshape(len(a['weight']), -1).any(1)
  assert weight[:n].all() and not weight[n:].any()


def test_eval_examples_takes_the_first_of_the_order(numbered):
  whole = joined(data.build(numbered_config(), seed=0).eval_batches())
  few = data.build(numbered_config(eval_examples=6), seed=0)
  assert few.examples == {'train': 40, 'validation': 6, 'test': 6}
  few = joined(few.eval_batches())
  assert few['weight'].sum() == 6
  np.testing.assert_array_equal(few['label'][:6], whole['label'][:6])


def test_repeats_show_the_same_examples_with_other_distortions():
  def evaluated(repeats):
    config = dataclasses.replace(DIGITS, eval_examples=24, eval_repeats=repeats, eval_batch_size=16)
    return joined(data.build(config, seed=0).eval_batches())
  once, thrice = evaluated(1), evaluated(3)
  assert once['weight'].sum() == 24 and thrice['weight'].sum() == 72
  labels, images = thrice['label'][:72].reshape(3, 24), thrice['image'][:72].reshape(3, 24, -1)
  np.testing.assert_array_equal(labels, np.broadcast_to(once['label'][:24], (3, 24)))
  np.testing.assert_array_equal(images[0], once['image'][:24].reshape(24, -1))
  assert (np.abs(images[1] - images[0]).max(axis=1) > 0.1).all()
  assert (np.abs(images[2] - images[1]).max(axis=1) > 0.1).all()


def test_an_abandoned_iterator_stops_its_threads():
  batches = data.build(DIGITS, seed=0).train_batches(0, 10**9)
  before = set(threading.enumerate())
  next(batches)
  made = set(threading.enumerate()) - before
  assert made
  batches.close()
  for thread in made:
    thread.join(timeout=10)
  assert not any(thread.is_alive() for thread in made)


def test_an_error_in_a_thread_reaches_the_caller(numbered, monkeypatch):
  dataset = data.build(numbered_config(), seed=0)
  monkeypatch.setattr(Numbered, '__getitem__', lambda self, i: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    next(dataset.train_batches(0, 5))


def test_fingerprint_follows_the_data_and_what_shapes_it(monkeypatch):
  def fingerprint(seed=0, **changes):
    return data.build(dataclasses.replace(DIGITS, **changes), seed=seed).fingerprint
  base = fingerprint()
  assert len(base) == 64
  for same in ({'batch_size': 32}, {'eval_batch_size': 8}, {'threads': 1}, {'eval_repeats': 1},
               {'text': data.TextConfig(decoder_length=99)}):
    assert fingerprint(seed=5, **same) == base
  others = [fingerprint(**changes) for changes in (
      {'eval_examples': 9}, {'eval_repeats': 3}, {'image': data.ImageConfig(size=8)},
      {'image': data.ImageConfig(classes=5)}, {'image': data.ImageConfig(augment='none')})]
  source = registry.load(DIGITS)
  source.splits['train'].images[7, 3, 3] ^= 1   # a single pixel
  changed = image.grey_source(source.splits, source.num_classes)
  monkeypatch.setattr(registry, 'load', lambda config: changed)
  others.append(fingerprint())
  assert len({base, *others}) == 1 + len(others)


def test_batch_format():
  images = data.build(DIGITS, seed=0)
  assert images.kind == 'classification' and images.image_shape == (24, 24, 1)
  assert images.num_classes == 10
  assert (images.vocab_size, images.encoder_length, images.decoder_length) == (0, 0, 0)
  got = {k: (v.shape, v.dtype.name) for k, v in images.train_batch(0).items()}
  assert got == {'image': ((16, 24, 24, 1), 'float32'), 'label': ((16,), 'int32'),
                 'weight': ((16,), 'float32'), 'index': ((16,), 'int32')}
  text = data.build(TEXT, seed=0)
  assert (text.kind, text.vocab_size, text.encoder_length) == ('seq2seq', 384, 113)
  assert (text.decoder_length, text.num_classes, text.image_shape) == (22, 0, ())
  got = {k: (v.shape, v.dtype.name) for k, v in text.train_batch(0).items()}
  assert got == {'encoder_input': ((8, 113), 'int32'), 'decoder_input': ((8, 22), 'int32'),
                 'target': ((8, 22), 'int32'), 'weight': ((8, 22), 'float32'),
                 'index': ((8,), 'int32')}


@pytest.mark.parametrize('config', [
    dataclasses.replace(DIGITS, batch_size=64), dataclasses.replace(TEXT, batch_size=16)],
    ids=['images', 'text'])
def test_a_batch_costs_far_less_than_a_train_step(config):
  # 5 and 2 ms of one core where a step takes 20 or more; the bound leaves room for slow machines.
  dataset, costs = data.build(config, seed=0), []
  for step in range(30):
    start = time.thread_time()
    dataset.train_batch(step)
    costs.append(time.thread_time() - start)
  assert np.median(costs) < 0.020


@pytest.mark.parametrize('make, words', [
    (lambda: data.DataConfig(source='glyph'), ('data.source', "'glyph'", "Did you mean 'glyphs'?")),
    (lambda: data.DataConfig(source='tfds:'), ('data.source', 'tfds:NAME')),
    (lambda: data.DataConfig(batch_size=0), ('data.batch_size', '0', 'at least 1')),
    (lambda: data.DataConfig(eval_examples=-1), ('data.eval_examples', '-1')),
    (lambda: data.ImageConfig(augment='mid'), ('data.image.augment', "Did you mean 'mild'?")),
    (lambda: data.ImageConfig(channels=2), ('data.image.channels', '2')),
    (lambda: data.ImageConfig(std=0.0), ('data.image.std', '0.0')),
    (lambda: data.TextConfig(noise_density=1.0), ('data.text.noise_density', '1.0')),
    (lambda: data.TextConfig(mean_span_length=0.5), ('data.text.mean_span_length', '0.5')),
    (lambda: data.TfdsConfig(train='train'), ('data.tfds', 'all three')),
    (lambda: data.build(DIGITS, seed=0, host=0, hosts=3),
     ('data.batch_size', '16', 'multiple of the 3 hosts', 'Use 15')),
    (lambda: data.build(dataclasses.replace(DIGITS, batch_size=24, eval_batch_size=64), seed=0,
                        hosts=3), ('data.eval_batch_size', '64', 'Use 63')),
    (lambda: data.build(DIGITS, seed=0, host=2, hosts=2), ('host', '2', '0 to 1')),
    (lambda: data.build(DIGITS, seed=-1), ('seed', '-1')),
    (lambda: list(data.build(DIGITS, seed=0).eval_batches('valid')),
     ('split', "Did you mean 'validation'?")),
])
def test_errors_name_the_key_and_the_fix(make, words):
  with pytest.raises(ConfigError) as error:
    make()
  assert all(word in str(error.value) for word in words), error.value


def test_lists_of_settings_name_real_ones():
  for settings, names in ((data.DataConfig, pipeline.NOT_SHAPING),
                          (data.TextConfig, pipeline.CORRUPTING)):
    assert set(names) < {f.name for f in dataclasses.fields(settings)}


@pytest.mark.parametrize('name', registry.SOURCES)
def test_every_entry_of_the_registry_has_its_file_and_its_metric(name):
  module, metric = registry.SOURCES[name]
  assert callable(importlib.import_module(f'moejax.data.datasets.{module}').load)
  assert data.DataConfig(source=name).metric == metric and (not metric or metric in METRICS)
