"""Glyphs: how they are drawn and cached, and splits that hold out a family and share nothing."""

import dataclasses

import numpy as np
import pytest

from moejax import data
from moejax.config import ConfigError
from moejax.data.datasets import glyphs

GLYPHS = data.DataConfig(source='glyphs')


@pytest.fixture(scope='module')
def table():
  return glyphs._glyph_table(GLYPHS)


def test_the_table_has_the_size_of_the_committed_results(table):
  points = np.unique(table['code_point'])
  assert 4300 < len(points) < 4450 and 41_000 < len(table['image']) < 44_000
  assert table['image'].shape[1:] == (32, 32) and table['image'].dtype == np.uint8
  pairs = np.unique(np.stack([table['code_point'], table['family']]), axis=1)
  assert np.bincount(pairs[0])[points].min() == 2   # of the four families
  rendered = set(points.tolist())
  assert {ord(c) for c in 'Aamgж'} <= rendered
  assert not rendered & {0x391, 0x410, 0x1D400}     # Alpha, Cyrillic A, mathematical bold A


def test_glyphs_are_drawn_upright_on_one_baseline(table):
  def picture(char):
    at = (table['code_point'] == ord(char)) & (table['font'] == 3)   # DejaVu Sans
    return table['image'][at][0].astype(int)

  def ink(char, axis):
    return np.flatnonzero((picture(char) > 64).any(axis))
  for char in 'HExm':
    assert abs(ink(char, 1)[-1] - (glyphs.BASELINE - 1)) <= 1
  assert ink('H', 1)[0] < ink('x', 1)[0] and ink('g', 1)[-1] > ink('x', 1)[-1] + 3
  assert all(abs(ink(c, 0)[[0, -1]].mean() - 15.5) <= 1 for c in 'HxmW')
  half, L = glyphs.CELL // 2, picture('L')
  assert L[:, :half].sum() > L[:, half:].sum()   # its stem is on the left
  assert L[half:].sum() > L[:half].sum()         # and its foot below


def test_glyphs_are_cached_and_not_rendered_again(tmp_path, monkeypatch):
  config = data.DataConfig(source='glyphs', cache_dir=str(tmp_path))
  rendered = iter([{'image': np.arange(3)}, {'image': np.arange(4)}])
  monkeypatch.setattr(glyphs, '_render_all', lambda families: next(rendered))
  for _ in range(2):
    np.testing.assert_array_equal(glyphs._glyph_table(config)['image'], np.arange(3))
  monkeypatch.setattr(glyphs, 'RENDERING', -1)   # another renderer, another file
  np.testing.assert_array_equal(glyphs._glyph_table(config)['image'], np.arange(4))
  assert [file.suffix for file in tmp_path.iterdir()] == ['.npz'] * 2


def test_a_failed_save_leaves_nothing(tmp_path):
  class Unwritable:
    def __array__(self, *args, **kwargs):
      raise RuntimeError('disk full')
  with pytest.raises(RuntimeError):
    glyphs.save_atomically(tmp_path / 'x.npz', a=np.zeros(3), b=Unwritable())
  assert not list(tmp_path.iterdir())


def test_unwritable_cache_dir(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='data.cache_dir.*MOEJAX_CACHE'):
    data.build(data.DataConfig(cache_dir=str(tmp_path / 'file' / 'sub')), seed=0)


def test_splits_hold_out_a_family_and_share_nothing(table):
  source = glyphs.load(GLYPHS)
  assert list(source.splits) == ['train', 'validation', 'test_seen', 'test']
  size = {name: len(split) for name, split in source.splits.items()}
  stix = (table['family'] == glyphs.FAMILIES.index('STIXGeneral')).sum()
  assert size['test'] == stix and sum(size.values()) == len(table['image'])
  assert 0.06 < size['validation'] / (size['train'] + size['validation']) < 0.1
  train = np.bincount(source.splits['train'].labels, minlength=source.num_classes)
  for name in ('validation', 'test_seen'):
    held = np.bincount(source.splits[name].labels, minlength=source.num_classes)
    assert train.min() >= 1 and train[held > 0].min() >= 2
  assert source.num_classes == len(np.unique(table['code_point']))
  few = glyphs.load(dataclasses.replace(GLYPHS, image=data.ImageConfig(classes=64)))
  for name, split in few.splits.items():   # the glyphs of 64 characters, and no others
    images = {image.tobytes() for image in source.splits[name].images}
    assert len(split) > 10 and set(split.labels.tolist()) <= set(range(64))
    assert images > {image.tobytes() for image in split.images}
