"""Affine warps against scipy's resampling; augmentations; resizing."""

import numpy as np
import pytest
from scipy import ndimage

from moejax.data import ImageConfig, image


def warp_by_scipy(picture, affine, size):
  """One grey picture, point by point: rotate(shear(p - shift)) / scale about both centres."""
  rotation, log_scale, shear, down, right = affine
  H, W = picture.shape
  y, x = np.meshgrid(np.arange(size), np.arange(size), indexing='ij')
  y, x = y - (size - 1) / 2 - down, x - (size - 1) / 2 - right
  x = x + shear * y
  y, x = (np.sin(rotation) * x + np.cos(rotation) * y, np.cos(rotation) * x - np.sin(rotation) * y)
  y, x = y * np.exp(-log_scale), x * np.exp(-log_scale)
  at = [y * H / size + (H - 1) / 2, x * W / size + (W - 1) / 2]
  return ndimage.map_coordinates(picture, at, order=1, mode='grid-constant', cval=0.0)


def test_affine_warp_equals_scipy():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (6, 20, 20, 2), dtype=np.uint8)
  affine = rng.uniform(-0.4, 0.4, (6, 5)).astype(np.float32)
  affine[:, 3:] *= 10   # far enough that points fall outside
  out = image.affine_warp(images, affine, 15)
  assert out.shape == (6, 15, 15, 2) and out.dtype == np.float32
  for b in range(6):
    for c in range(2):
      expected = warp_by_scipy(images[b, ..., c] / 255, affine[b].astype(np.float64), 15)
      np.testing.assert_allclose(out[b, ..., c], expected, atol=1e-4)


def make_batch(config, images, channels=1, same_shape=True, train=True):
  processor = image.ImageProcessor(config, channels, same_shape)
  draws = [processor.draw({'image': im, 'label': n}, np.random.default_rng([0, n]), train)
           for n, im in enumerate(images)]
  return processor.finish({k: np.stack([d[k] for d in draws]) for k in draws[0]})


def test_mild_augmentation_stays_within_its_bounds():
  # A grey square covering the middle: its centre survives any mild warp, so the centre pixel is
  # contrast * 1 + noise, and a corner is noise alone.
  square = np.zeros((400, 32, 32, 1), np.uint8)
  square[:, 8:24, 8:24] = 255
  out = make_batch(ImageConfig(size=24), square)['image']
  assert out.shape == (400, 24, 24, 1) and out.dtype == np.float32
  assert out.min() >= 0 and out.max() <= 1
  centre = out[:, 10:14, 10:14].mean((1, 2, 3))
  assert 0.65 < centre.min() < 0.78 and 0.97 < centre.max() <= 1
  ends = [0, 1, 2, 21, 22, 23]               # mean of max(noise, 0) <= 0.12 * 0.399
  corner = out[:, ends][:, :, ends].mean((1, 2, 3))
  assert 0 <= corner.min() < 0.005 and 0.03 < corner.max() < 0.1
  ink = (out > 0.5).sum((1, 2, 3))           # 12 x 12 = 144 pixels, scaled by exp(+-0.24)
  assert 144 * 0.68 < ink.min() < 130 and 160 < ink.max() < 144 * 1.4


def test_contrast_and_noise_are_on_top_of_the_warp_and_nothing_else_is():
  rng = np.random.default_rng(0)
  batch = {'image': rng.integers(0, 256, (3, 24, 24, 1), dtype=np.uint8),
           'affine': rng.normal(0, 0.1, (3, 5)).astype(np.float32), 'label': np.zeros(3, np.int32),
           'contrast': np.array([1.0, 0.5, 2.0]),
           'noise': np.full((3, 24, 24, 1), 0.25, np.float32)}
  processor = image.ImageProcessor(ImageConfig(size=24, augment='mild'), 1, True)
  plain = image.affine_warp(batch['image'], batch['affine'], 24)
  expected = np.clip(plain * np.array([1.0, 0.5, 2.0])[:, None, None, None] + 0.25, 0, 1)
  np.testing.assert_allclose(processor.finish(batch)['image'], expected, atol=1e-6)


def test_no_augmentation_is_the_resized_and_normalised_image():
  images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 1), dtype=np.uint8)
  out = make_batch(ImageConfig(size=24, augment='none'), images)
  np.testing.assert_allclose(out['image'], images / 255, atol=1e-6)
  assert out['label'].tolist() == [0, 1] and out['weight'].tolist() == [1, 1]
  small = make_batch(ImageConfig(size=12, augment='none'), np.full((1, 24, 24, 1), 51, np.uint8))
  np.testing.assert_allclose(small['image'], 0.2, atol=1e-6)
  config = ImageConfig(augment='none', channels=3, mean=0.5, std=0.25)
  colour = make_batch(config, np.full((1, 24, 24, 1), 51, np.uint8))['image']
  assert colour.shape == (1, 24, 24, 3) and colour.flags.writeable
  np.testing.assert_allclose(colour, (0.2 - 0.5) / 0.25, atol=1e-5)


def test_flip_crop_in_training_only():
  picture = np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8)
  config = ImageConfig(size=16, augment='flip_crop')
  fixed = make_batch(config, [picture] * 2, 3, False, train=False)['image']
  np.testing.assert_allclose(fixed, np.stack([picture] * 2) / 255, atol=1e-6)
  padded = np.pad(picture, ((2, 2), (2, 2), (0, 0)))
  allowed = {(padded[y:y + 16, x:x + 16][:, ::step]).tobytes(): (y, x, step)
             for y in range(5) for x in range(5) for step in (1, -1)}
  out = make_batch(config, [picture] * 200, 3, False)['image']
  seen = {allowed[np.round(picture * 255).astype(np.uint8).tobytes()] for picture in out}
  assert len(seen) > 40   # of 50


@pytest.mark.parametrize('shape, channels', [((40, 30, 3), 3), ((30, 40, 3), 1), ((10, 10, 1), 3),
                                             ((24, 24, 3), 3)])
def test_fit_keeps_the_centre(shape, channels):
  picture = np.zeros(shape, np.uint8)
  middle = tuple(slice(n // 2 - n // 8, n // 2 + n // 8) for n in shape[:2])
  picture[middle] = 200
  out = image.fit(picture, 24, channels)
  assert out.shape == (24, 24, channels) and out.dtype == np.uint8
  assert abs(int(out[12, 12, 0]) - 200) < 3 and out[0, 0, 0] == out[-1, -1, 0] == 0
  row, col = (np.average(np.arange(24), weights=out[..., 0].sum(axis) + 0.0) for axis in (1, 0))
  assert abs(row - 11.5) < 0.6 and abs(col - 11.5) < 0.6
