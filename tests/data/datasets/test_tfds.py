"""TFDS read without TensorFlow: mock data, and tiny datasets really prepared as array_record."""

import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moejax import data
from moejax.config import ConfigError
from tests.data.datasets.prepare import prepare

TEXT = tfds.features.Text()


@pytest.fixture(autouse=True)
def without_tensorflow():
  yield
  assert 'tensorflow' not in sys.modules


def images(n):
  """n images of one colour, each of another size; the label names the colour."""
  for i in range(n):
    pixels = np.zeros((10 + i, 14, 3), np.uint8)
    pixels[..., i % 3] = 100 + i
    file = io.BytesIO()   # encoded here: TFDS would encode an array with TensorFlow
    Image.fromarray(pixels).save(file, 'PNG')
    file.seek(0)
    yield {'image': file, 'label': i % 3, 'id': str(i)}


def documents(letters):
  return [{'text': letter * 50 * (i + 1), 'url': ''} for i, letter in enumerate(letters)]


def words(n):
  """n words and the same words backwards; the 33rd is longer than the others."""
  for i in range(n):
    word = f'é{i:04d}' + 'x' * 20 * (i == 33)
    yield {'word': word, 'reversed': word[::-1], 'tags': [word], 'label': 0}


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  """tiny_images without a validation split, tiny_text without a test split, tiny_pairs."""
  folder = tmp_path_factory.mktemp('tfds')
  prepare(folder, 'tiny_images',
          {'image': tfds.features.Image(shape=(None, None, 3)), 'id': TEXT,
           'label': tfds.features.ClassLabel(num_classes=3)},
          {'train': images(40), 'test': images(7)})
  prepare(folder, 'tiny_text', {'text': TEXT, 'url': TEXT},
          {'train': documents('abcdefghij' * 2), 'validation': documents('xyz')})
  prepare(folder, 'tiny_pairs',
          {'word': TEXT, 'reversed': TEXT, 'tags': tfds.features.Sequence(TEXT),
           'label': tfds.features.ClassLabel(num_classes=2)},
          {'train': words(60), 'test': words(6)})
  return folder


def image_config(folder, *splits, **image):
  return data.DataConfig(source='tfds:tiny_images', data_dir=str(folder), batch_size=8,
                         eval_batch_size=8, image=data.ImageConfig(size=12, **image),
                         tfds=data.TfdsConfig(*splits))


def pairs_config(folder, decoder_length=32, **tfds):
  return data.DataConfig(source='tfds:tiny_pairs', data_dir=str(folder), batch_size=60,
                         eval_batch_size=8, tfds=data.TfdsConfig(**tfds),
                         text=data.TextConfig(encoder_length=40, decoder_length=decoder_length))


def test_prepared_images(tfds_dir):
  dataset = data.build(image_config(tfds_dir, augment='flip_crop'), seed=0)
  # No validation split of its own: the last 5 % of train, and the test split for reporting.
  assert dataset.examples == {'train': 38, 'validation': 2, 'test': 7}
  named = image_config(tfds_dir, 'train[:50%]', 'train[50%:75%]', 'train[75%:]')
  assert data.build(named, seed=0).examples == {'train': 20, 'validation': 10, 'test': 10}
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


def test_prepared_text(tfds_dir):
  config = data.DataConfig(source='tfds:tiny_text', data_dir=str(tfds_dir), batch_size=4,
                           eval_batch_size=4)
  dataset = data.build(config, seed=0)
  assert dataset.metric == ''
  # The official validation split is for reporting; the last 5 % of train for choosing.
  assert dataset.examples == {'train': 19, 'validation': 1, 'test': 3}
  for batch in dataset.train_batches(0, 5):
    for ids in batch['encoder_input']:
      assert set(dataset.vocabulary.decode(ids)) < set('abcdefghij')
      assert len(set(dataset.vocabulary.decode(ids))) == 1
  (test,) = dataset.eval_batches('test')
  assert {dataset.vocabulary.decode(ids)[0] for ids in test['encoder_input'][:3]} == set('xyz')
  assert not test['encoder_input'][3].any()


def test_prepared_pairs(tfds_dir):
  dataset = data.build(pairs_config(tfds_dir, input='word', target='reversed'), seed=0)
  assert (dataset.metric, dataset.tasks) == ('exact_match', ())
  assert dataset.examples == {'train': 57, 'validation': 3, 'test': 6}
  (batch,) = dataset.eval_batches('test')
  answers = dataset.references('test', batch)
  for i in range(6):
    word = dataset.vocabulary.decode(batch['encoder_input'][i])
    assert answers[i] == (word[::-1],) and word[0] == 'é'
    assert dataset.vocabulary.decode(batch['target'][i]) == word[::-1]
  assert answers[6:] == [(), ()] and not batch['target'][6:].any()
  assert sorted(a[0] for a in dataset.answers('test')[0]) == [f'{i:04d}'[::-1] + 'é'
                                                             for i in range(6)]
  other = data.build(pairs_config(tfds_dir, input='reversed', target='word'), seed=0)
  assert other.fingerprint != dataset.fingerprint


def test_a_long_target_is_an_error_when_it_is_read(tfds_dir):
  # 6 bytes and eos fit 8 tokens; the one of 26 bytes is not among the examples tried at build.
  dataset = data.build(pairs_config(tfds_dir, 8, input='word', target='reversed'), seed=0)
  with pytest.raises(ConfigError, match='data.text.decoder_length: got 8.*at least 27'):
    list(dataset.train_batches(0, 2))
  with pytest.raises(ConfigError, match='data.text.decoder_length: got 6.*at least 7'):
    data.build(pairs_config(tfds_dir, 6, input='word', target='reversed'), seed=0)


def test_fingerprint_follows_the_files(tfds_dir):
  config = image_config(tfds_dir)
  first = data.build(config, seed=0).fingerprint
  assert data.build(config, seed=1).fingerprint == first
  info = tfds_dir / 'tiny_images' / '1.0.0' / 'dataset_info.json'
  text = info.read_text()
  info.write_text(text + '\n')
  assert data.build(config, seed=0).fingerprint != first
  info.write_text(text)


def test_tfrecord_folder_says_how_to_convert(tfds_dir, tmp_path):
  # A tfrecord folder needs TensorFlow to write; what marks it is its metadata and file names.
  old, new = tfds_dir / 'tiny_images' / '1.0.0', tmp_path / 'tiny_images' / '1.0.0'
  new.mkdir(parents=True)
  for file in old.iterdir():
    content = file.read_bytes().replace(b'array_record', b'tfrecord')
    (new / file.name.replace('array_record', 'tfrecord')).write_bytes(content)
  assert json.loads((new / 'dataset_info.json').read_text())['fileFormat'] == 'tfrecord'
  with pytest.raises(ConfigError) as error:
    data.build(image_config(tmp_path), seed=0)
  for word in ('tfrecord', 'array_record', 'convert_format', '--file_format=array_record',
               str(new)):
    assert word in str(error.value)


def test_errors(tfds_dir, tmp_path):
  named = lambda name, folder: data.DataConfig(source=f'tfds:{name}', data_dir=str(folder))
  for config, message in (
      (named('cifar10', tmp_path), r'data\.data_dir.*no prepared copy.*tfds build cifar10'),
      (named('no_such_set', tmp_path), r'data\.data_dir.*no_such_set.*Check the name'),
      (named('cifar10', tmp_path / 'none'), 'data.data_dir.*existing folder.*tfds build cifar10'),
      (image_config(tfds_dir, classes=2), 'data.image.classes.*0 for a TFDS source'),
      (image_config(tfds_dir, skip_classes=2), 'data.image.skip_classes.*0 for a TFDS source'),
      (pairs_config(tfds_dir, input='word', target='reverse'),
       "data.tfds.target: got 'reverse'.*Did you mean 'reversed'"),
      (pairs_config(tfds_dir, input='label', target='word'), "data.tfds.input: got 'label'.*word"),
      (pairs_config(tfds_dir, input='tags', target='word'), "data.tfds.input: got 'tags'"),
      (pairs_config(tfds_dir), 'tiny_pairs has features label, reversed, tags, word.*tfds.input'),
      (image_config(tfds_dir, 'train', 'dev', 'test'),
       "data.tfds: split 'dev' of tiny_images.*Splits: (train, test|test, train)")):
    with pytest.raises(ConfigError, match=message):
      data.build(config, seed=0)
  assert not (tmp_path / 'none').exists()
  with pytest.raises(ConfigError, match='data.tfds.input and target.*both or none'):
    data.TfdsConfig(input='word')


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
