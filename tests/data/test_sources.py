"""Embedded sources, and TFDS read without TensorFlow: mock data and datasets really prepared."""

import collections
import io
import json
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from moejax.data import pipeline, registry
from moejax.data.config import EMBEDDED
from moejax.data.datasets import embedded

GLYPHS = data.DataConfig(source='glyphs')


@pytest.fixture(scope='module')
def glyph_table(cache):
  return embedded._glyph_table(GLYPHS)


def test_glyph_table_has_the_size_the_regime_was_found_at(glyph_table):
  points = np.unique(glyph_table['code_point'])
  assert 4300 < len(points) < 4450 and 41_000 < len(glyph_table['image']) < 44_000
  assert glyph_table['image'].shape[1:] == (32, 32) and glyph_table['image'].dtype == np.uint8
  pairs = np.unique(np.stack([glyph_table['code_point'], glyph_table['family']]), axis=1)
  assert np.bincount(pairs[0])[points].min() == 2   # of the four families
  rendered = set(points.tolist())
  assert {ord(c) for c in 'Aamgж'} <= rendered
  assert not rendered & {0x391, 0x410, 0x1D400}     # Alpha, Cyrillic A, mathematical bold A


def test_glyphs_are_drawn_upright_on_one_baseline(glyph_table):
  def ink(char, axis):
    at = (glyph_table['code_point'] == ord(char)) & (glyph_table['font'] == 3)   # DejaVu Sans
    return np.flatnonzero((glyph_table['image'][at][0] > 64).any(axis))
  for char in 'HExm':
    assert abs(ink(char, 1)[-1] - (embedded.BASELINE - 1)) <= 1
  assert ink('H', 1)[0] < ink('x', 1)[0] and ink('g', 1)[-1] > ink('x', 1)[-1] + 3
  assert all(abs(ink(c, 0)[[0, -1]].mean() - 15.5) <= 1 for c in 'HxmW')
  bar = embedded.CELL // 2
  at = (glyph_table['code_point'] == ord('L')) & (glyph_table['font'] == 3)
  picture = glyph_table['image'][at][0].astype(int)
  assert picture[:, :bar].sum() > picture[:, bar:].sum()   # the stem of L is on the left
  assert picture[bar:].sum() > picture[:bar].sum()         # and its foot below


def test_glyphs_are_cached_whole_and_not_rendered_again(glyph_table, cache, monkeypatch):
  assert [f.suffix for f in cache.iterdir()] == ['.npz']
  monkeypatch.setattr(embedded, '_render_all', lambda families: 1 / 0)
  np.testing.assert_array_equal(embedded._glyph_table(GLYPHS)['image'], glyph_table['image'])
  monkeypatch.setattr(embedded, 'RENDERING', -1)   # another renderer, another file
  with pytest.raises(ZeroDivisionError):
    embedded._glyph_table(GLYPHS)


def test_a_failed_save_leaves_nothing(tmp_path):
  class Unwritable:
    def __array__(self, *args, **kwargs):
      raise RuntimeError('disk full')
  with pytest.raises(RuntimeError):
    embedded.save_atomically(tmp_path / 'x.npz', a=np.zeros(3), b=Unwritable())
  assert not list(tmp_path.iterdir())


def test_glyph_splits_hold_out_a_family_and_share_nothing(glyph_table):
  source = embedded.glyphs(GLYPHS, 0)
  size = {name: len(split) for name, split in source.splits.items()}
  stix = (glyph_table['family'] == embedded.FAMILIES.index('STIXGeneral')).sum()
  assert size['test'] == stix and sum(size.values()) == len(glyph_table['image'])
  assert 0.06 < size['validation'] / (size['train'] + size['validation']) < 0.1
  train = np.bincount(source.splits['train'].labels, minlength=source.num_classes)
  held = np.bincount(source.splits['validation'].labels, minlength=source.num_classes)
  assert train.min() >= 1 and train[held > 0].min() >= 2
  assert source.num_classes == len(np.unique(glyph_table['code_point']))


def test_fewer_classes_are_among_more_classes():
  def build(classes):
    config = data.DataConfig(source='glyphs', image=data.ImageConfig(classes=classes))
    return embedded.glyphs(config, 0)
  few, more = build(64), build(128)
  assert (few.num_classes, more.num_classes) == (64, 128)
  for label in (0, 63):
    a, b = (s.splits['train'].images[s.splits['train'].labels == label] for s in (few, more))
    np.testing.assert_array_equal(a, b)
  assert few.digest != more.digest
  assert sorted(set(more.splits['train'].labels.tolist())) == list(range(128))


def test_classes_that_a_run_never_saw():
  """The rest of the permutation of which a parent took the first 4,096."""
  def build(**image):
    return embedded.glyphs(data.DataConfig(source='glyphs', image=data.ImageConfig(**image)), 0)

  def looks(source, split):
    return collections.Counter(image.tobytes() for image in source.splits[split].images)

  whole, parent, rest = build(), build(classes=4096), build(skip_classes=4096)
  n = rest.num_classes
  assert parent.num_classes + n == whole.num_classes and 250 < n < 350
  for split in ('train', 'validation', 'test_seen', 'test'):   # every glyph is in one of the two
    assert looks(parent, split) + looks(rest, split) == looks(whole, split)
  assert sorted(set(rest.splits['train'].labels.tolist())) == list(range(n))
  sizes = {name: len(split) for name, split in rest.splits.items()}
  assert sizes['train'] > 2000 and sizes['test'] > 300
  assert min(sizes['validation'], sizes['test_seen']) > 150
  # The first of the rest: classes that follow the skipped ones, whatever their number.
  few, more = build(skip_classes=100, classes=64), build(classes=164)
  for label in (0, 63):
    a, b = (s.splits['train'].images[s.splits['train'].labels == at]
            for s, at in ((few, label), (more, 100 + label)))
    np.testing.assert_array_equal(a, b)
  assert few.num_classes == 64


@pytest.mark.parametrize('image, words', [
    ({'skip_classes': -1}, ('data.image.skip_classes: got -1', '0 or more')),
    ({'skip_classes': 9}, ('data.image.skip_classes: got 9', 'at most 8 of the 10 classes')),
    ({'skip_classes': 10}, ('data.image.skip_classes: got 10',)),
    ({'skip_classes': 4, 'classes': 7},
     ('data.image.classes: got 7', 'at most 6 for digits without the first 4')),
    ({'classes': 11}, ('data.image.classes: got 11', 'at most 10 for digits. ')),
])
def test_classes_that_there_are_not(image, words):
  with pytest.raises(ConfigError) as error:
    embedded.digits(data.DataConfig(source='digits', image=data.ImageConfig(**image)), 0)
  assert all(word in str(error.value) for word in words), error.value


def test_classes_to_skip_are_in_the_fingerprint_only_when_there_are_some():
  """A result from before the setting existed keeps its fingerprint."""
  def shaped(**image):
    config = data.DataConfig(source='digits', image=data.ImageConfig(**image))
    return pipeline._fingerprint(config, embedded.digits(data.DataConfig(source='digits'), 0))
  # As the code before the setting made it, from scikit-learn's digits at the default settings.
  assert shaped() == 'f61e28d1e0f6302d93f958e9d8202726e56e8b3deebf56dcf56167cc53568bd8'
  assert len({shaped(), shaped(skip_classes=2), shaped(skip_classes=3)}) == 3


def test_unwritable_cache_dir(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='data.cache_dir.*MOEJAX_CACHE'):
    data.build(data.DataConfig(cache_dir=str(tmp_path / 'file' / 'sub')), seed=0)


def test_digits_are_split_once_and_for_all():
  source = embedded.digits(data.DataConfig(source='digits'), 0)
  assert [len(source.splits[s]) for s in ('train', 'validation', 'test')] == [1297, 250, 250]
  rows = np.concatenate([s.images.reshape(len(s), -1) for s in source.splits.values()])
  from sklearn.datasets import load_digits
  want = np.round(load_digits().data * 255 / 16).astype(np.uint8)
  np.testing.assert_array_equal(np.unique(rows, axis=0), np.unique(want, axis=0))


@pytest.mark.parametrize('source', EMBEDDED)
def test_the_config_knows_which_are_scored(source):
  config = data.DataConfig(source=source, text=data.TextConfig(decoder_length=99))
  assert config.scored == bool(registry.build(config)[0].metric)


def test_text_chunks_give_every_window_a_home():
  # A file of 10 bytes at stride 4: chunks 0..6 and 4..9; one of 3 bytes is left out.
  chunks = embedded.TextChunks([b'0123456789', b'abc', b'ABCD'], 4)
  assert [chunks[i]['text'] for i in range(len(chunks))] == [b'0123456', b'456789', b'ABCD']


def test_stdlib_files_leave_out_tests_and_builds(tmp_path):
  for name in ('a.py', 'b/c.py', 'b/test/d.py', 'tests/e.py', 'idlelib/idle_test/f.py', 'g.txt',
               'site-packages/h.py', '__pycache__/i.py', '_sysconfigdata__linux.py',
               'config-3.11-x/j.py'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  assert [f.as_posix() for f in embedded.stdlib_files(tmp_path)] == ['a.py', 'b/c.py']


def test_stdlib_splits_are_by_file():
  source = embedded.stdlib_text(data.DataConfig(source='stdlib_text'), 127)
  sizes = {name: len(chunks) for name, chunks in source.splits.items()}
  assert sizes['train'] > 50_000 and min(sizes['validation'], sizes['test']) > 1000
  # A line of one file only; its windows are all in one split.
  line = b'class ThreadPoolExecutor(_base.Executor):'
  homes = {name for name, chunks in source.splits.items() if line in chunks._text}
  assert len(homes) == 1
  example = source.splits['train'][123]['text']
  assert 127 <= len(example) <= 253


# TFDS


class MoejaxTinyImages(tfds.core.GeneratorBasedBuilder):
  """Images of one colour; the label says which."""
  VERSION = tfds.core.Version('1.0.0')
  code_path = None   # TFDS would look for checksums of downloads beside this file

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(shape=(None, None, 3)),
        'label': tfds.features.ClassLabel(num_classes=3), 'id': tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(40), 'test': self._generate_examples(7)}

  def _generate_examples(self, n):
    for i in range(n):
      pixels = np.zeros((10 + i, 14, 3), np.uint8)
      pixels[..., i % 3] = 100 + i
      file = io.BytesIO()   # encoded here: TFDS would encode an array with TensorFlow
      Image.fromarray(pixels).save(file, 'PNG')
      file.seek(0)
      yield i, {'image': file, 'label': i % 3, 'id': str(i)}


class MoejaxTinyText(tfds.core.GeneratorBasedBuilder):
  """Documents of one letter, and validation documents as well."""
  VERSION = tfds.core.Version('1.0.0')
  code_path = None   # TFDS would look for checksums of downloads beside this file

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'text': tfds.features.Text(), 'url': tfds.features.Text()}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(b'abcdefghij' * 2), 'validation':
            self._generate_examples(b'xyz')}

  def _generate_examples(self, letters):
    for i, letter in enumerate(letters):
      yield i, {'text': chr(letter) * 50 * (i + 1), 'url': ''}


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  """Both datasets, really prepared, as array_record."""
  folder = tmp_path_factory.mktemp('tfds')
  for builder in (MoejaxTinyImages, MoejaxTinyText):
    builder(data_dir=str(folder), file_format='array_record').download_and_prepare()
  return folder


def test_prepared_images(tfds_dir):
  config = data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir), batch_size=8,
                           eval_batch_size=8,
                           image=data.ImageConfig(size=12, augment='flip_crop'))
  dataset = data.build(config, seed=0)
  # No validation split of its own: the last 5 % of train, and the test split for reporting.
  assert dataset.examples == {'train': 38, 'validation': 2, 'test': 7}
  assert (dataset.num_classes, dataset.image_shape) == (3, (12, 12, 3))
  seen = set()
  for step, batch in enumerate(dataset.train_batches(0, 10)):
    np.testing.assert_array_equal(batch['image'][:, 6, 6].argmax(-1), batch['label'])
    seen |= {round(float(v) * 255) for v in batch['image'][:, 6, 6].max(-1)}
    if step < 4:
      assert len(set(batch['image'][:, 6, 6].max(-1).tolist())) == 8
  assert len(seen) == 38 and seen < set(range(100, 140))
  (test,) = dataset.eval_batches('test')
  assert test['weight'].tolist() == [1] * 7 + [0]
  for image in test['image'][:7]:   # of one colour to the edge: never cropped or padded
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 1
  assert 'tensorflow' not in sys.modules


def test_prepared_text(tfds_dir):
  config = data.DataConfig(source='tfds:moejax_tiny_text', data_dir=str(tfds_dir), batch_size=4,
                           eval_batch_size=4)
  dataset = data.build(config, seed=0)
  assert not dataset.metric and not config.scored
  # The official validation split reports; choosing uses the last 5 % of train.
  assert dataset.examples == {'train': 19, 'validation': 1, 'test': 3}
  for batch in dataset.train_batches(0, 5):
    for row in batch['encoder_input']:
      assert set(dataset.vocabulary.decode(row)) < set('abcdefghij')
      assert len(set(dataset.vocabulary.decode(row))) == 1
  (test,) = dataset.eval_batches('test')
  assert {dataset.vocabulary.decode(row)[0] for row in test['encoder_input'][:3]} == set('xyz')
  assert not test['encoder_input'][3].any()
  assert 'tensorflow' not in sys.modules


def test_named_tfds_splits(tfds_dir):
  splits = data.TfdsConfig(train='train[:50%]', validation='train[50%:75%]', test='train[75%:]')
  config = data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir), tfds=splits)
  assert data.build(config, seed=0).examples == {'train': 20, 'validation': 10, 'test': 10}


def test_tfds_fingerprint_follows_the_files(tfds_dir):
  config = data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir))
  first = data.build(config, seed=0).fingerprint
  assert data.build(config, seed=1).fingerprint == first
  info = tfds_dir / 'moejax_tiny_images' / '1.0.0' / 'dataset_info.json'
  text = info.read_text()
  info.write_text(text + '\n')
  assert data.build(config, seed=0).fingerprint != first
  info.write_text(text)


def test_tfrecord_folder_says_how_to_convert(tfds_dir, tmp_path):
  # A tfrecord folder needs TensorFlow to write; what marks it is its metadata and file names.
  old, new = tfds_dir / 'moejax_tiny_images' / '1.0.0', tmp_path / 'moejax_tiny_images' / '1.0.0'
  new.mkdir(parents=True)
  for file in old.iterdir():
    content = file.read_bytes().replace(b'array_record', b'tfrecord')
    (new / file.name.replace('array_record', 'tfrecord')).write_bytes(content)
  assert json.loads((new / 'dataset_info.json').read_text())['fileFormat'] == 'tfrecord'
  with pytest.raises(ConfigError) as error:
    data.build(data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tmp_path)), seed=0)
  for word in ('tfrecord', 'array_record', 'convert_format', '--file_format=array_record',
               str(new)):
    assert word in str(error.value)


@pytest.mark.parametrize('name, words', [
    ('cifar10', ('data.data_dir', 'no prepared copy', 'tfds build cifar10')),
    ('no_such_set', ('data.data_dir', 'no_such_set', 'Check the name')),
])
def test_unprepared_and_unknown_names(tmp_path, name, words):
  with pytest.raises(ConfigError) as error:
    data.build(data.DataConfig(source=f'tfds:{name}', data_dir=str(tmp_path)), seed=0)
  assert all(word in str(error.value) for word in words)


def test_tfds_errors(tfds_dir, tmp_path):
  with pytest.raises(ConfigError, match='data.data_dir.*existing folder.*tfds build cifar10'):
    data.build(data.DataConfig(source='tfds:cifar10', data_dir=str(tmp_path / 'none')), seed=0)
  with pytest.raises(ConfigError, match='data.image.classes.*0 for a TFDS source'):
    data.build(data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir),
                               image=data.ImageConfig(classes=2)), seed=0)
  with pytest.raises(ConfigError, match='data.image.skip_classes.*0 for a TFDS source'):
    data.build(data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir),
                               image=data.ImageConfig(skip_classes=2)), seed=0)
  with pytest.raises(ConfigError, match='data.tfds: split .dev.*train, test|test, train'):
    data.build(data.DataConfig(source='tfds:moejax_tiny_images', data_dir=str(tfds_dir),
                               tfds=data.TfdsConfig('train', 'dev', 'test')), seed=0)
  assert not os.path.exists(tmp_path / 'none')


@pytest.mark.parametrize('name, augment, shape', [('cifar10', 'flip_crop', (24, 24, 3)),
                                                  ('mnist', 'mild', (24, 24, 1)),
                                                  ('imagenet2012', 'none', (24, 24, 3))])
def test_mock_images(name, augment, shape):
  config = data.DataConfig(source=f'tfds:{name}', batch_size=8, eval_batch_size=8,
                           image=data.ImageConfig(augment=augment),
                           tfds=data.TfdsConfig('train', 'validation', 'test'))
  with tfds.testing.mock_data(num_examples=20):
    dataset = data.build(config, seed=0)
    batch = dataset.train_batch(0)
    whole = list(dataset.eval_batches('test'))
  assert dataset.image_shape == shape and batch['image'].shape == (8, *shape)
  assert 0 <= batch['label'].min() <= batch['label'].max() < dataset.num_classes
  assert batch['image'].std() > 0.01 and sum(b['weight'].sum() for b in whole) == 20
  assert 'tensorflow' not in sys.modules


def test_mock_text():
  config = data.DataConfig(source='tfds:imdb_reviews', batch_size=8, eval_batch_size=8,
                           tfds=data.TfdsConfig('train', 'validation', 'test'))
  with tfds.testing.mock_data(num_examples=20):
    batch = data.build(config, seed=0).train_batch(0)
  assert batch['weight'].sum(1).min() >= 2 and batch['encoder_input'].max() == 383
