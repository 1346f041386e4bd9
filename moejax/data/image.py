"""Images: random affine distortion of a whole batch at once, flips and crops, resizing.

B batch, N rows of a table, H and W height and width, S output size, C channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.data.config import ImageConfig

# Each draw is uniform: rotation (rad), log of scale, shear and shift (output pixels) between minus
# and plus the value; contrast from the value to 1; noise's standard deviation from 0 to the value.
MILD = {'rotation': 0.14, 'log_scale': 0.12, 'shear': 0.12, 'shift': 1.0, 'contrast': 0.76,
        'noise': 0.12}
_SPREAD = np.array([MILD['rotation'], MILD['log_scale'], MILD['shear'], MILD['shift'],
                    MILD['shift']], np.float32)


def affine_warp(images: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
  """Resamples each image bilinearly at rotated, scaled, sheared and shifted points.

  Args:
    images: (B, H, W, C) uint8.
    affine: (B, 5) float32: rotation, log of scale, shear, shift down and right in output pixels;
      zeros resize the whole image to the output.
    size: S.

  Returns:
    (B, S, S, C) float32 in [0, 1]; points outside the image are 0.
  """
  B, H, W, C = images.shape
  rotation, log_scale, shear, down, right = affine.astype(np.float32).T[..., None, None]
  cos, sin = np.cos(rotation), np.sin(rotation)
  zoom = np.exp(-log_scale)                  # a larger glyph is a finer walk over the source
  at = np.arange(size, dtype=np.float32) - (size - 1) / 2
  y, x = at[:, None] - down, at[None, :] - right                   # (B, S, 1), (B, 1, S)
  row = (sin * zoom) * x + (cos + sin * shear) * zoom * y
  col = (cos * zoom) * x + (cos * shear - sin) * zoom * y          # (B, S, S)
  # The border of zeros around the source is where every point outside lands.
  row = np.clip(row * (H / size) + (H + 1) / 2, 0, H + 1)
  col = np.clip(col * (W / size) + (W + 1) / 2, 0, W + 1)
  # One row before and two after, so that a point at H + 1 has its four neighbours too.
  padded = np.zeros((B, H + 3, W + 3, C), np.float32)
  padded[:, 1:-2, 1:-2] = images
  table = padded.reshape(-1, C)                                    # (B * (H+3) * (W+3), C)
  top, left = row.astype(np.int32), col.astype(np.int32)
  # float32 throughout: numpy would make float64 of float32 - int32.
  fy = (row - top.astype(np.float32))[..., None]                   # (B, S, S, 1)
  fx = (col - left.astype(np.float32))[..., None]
  first = np.arange(B, dtype=np.int32) * ((H + 3) * (W + 3))
  base = first[:, None, None] + top * (W + 3) + left
  corner = [np.take(table, base + step, axis=0) for step in (0, 1, W + 3, W + 4)]
  upper = corner[0] + fx * (corner[1] - corner[0])
  lower = corner[2] + fx * (corner[3] - corner[2])
  return (upper + fy * (lower - upper)) * np.float32(1 / 255)


def flip_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """(S, S, C) -> a crop of the same size after padding S/8 zeros, mirrored half of the time."""
  S = image.shape[0]
  margin = max(S // 8, 1)
  padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
  y, x = rng.integers(0, 2 * margin + 1, size=2)
  image = padded[y:y + S, x:x + S]
  return image[:, ::-1] if rng.integers(2) else image


def fit(image: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Any (H, W, C) uint8 image -> (S, S, channels): shorter side to S, central crop.

  Grey is repeated into colour; colour becomes luma.
  """
  from PIL import Image
  picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
  picture = picture.convert('L' if channels == 1 else 'RGB')
  scale = size / min(picture.size)
  if picture.size != (size, size):
    width, height = (max(round(side * scale), size) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    picture = picture.crop((left, top, left + size, top + size))
  return np.asarray(picture).reshape(size, size, channels)


@dataclasses.dataclass(frozen=True)
class ImageTable:
  """A split in memory: images (N, H, W, C) uint8, labels (N,) int32; item i is one example."""
  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {'image': self.images[i], 'label': self.labels[i]}


class ImageProcessor:
  """Examples {'image': (H, W, C) uint8, 'label': ()} -> classification batches.

  Args:
    config: ImageConfig.
    channels: the source's own, used where config.channels is 0.
    same_shape: every image of the source has one shape, so that a whole batch can be resized at
      once; otherwise each is resized (`fit`) as it is read.
  """
  kind = 'classification'

  def __init__(self, config: ImageConfig, channels: int, same_shape: bool):
    self.config = config
    self.channels = config.channels or channels
    # Colour images, and the crops of flip_crop, are made one by one at their final size.
    self._fit_each = not same_shape or config.augment == 'flip_crop' or self.channels < channels
    self._mild = config.augment == 'mild'

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (self.config.size, self.config.size, self.channels)

  def draw(self, example: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws this example's few random numbers; the pixels are left to `finish`."""
    return self._draw(example, rng, self.config.augment == 'flip_crop')

  def draw_fixed(self, example: Mapping[str, Any],
                 rng: np.random.Generator) -> dict[str, np.ndarray]:
    """As draw, for evaluation: never flipped or cropped."""
    return self._draw(example, rng, False)

  def _draw(self, example, rng, crop):
    image = example['image']
    if self._fit_each:
      image = fit(image, self.config.size, self.channels)
    if crop:
      image = flip_crop(image, rng)
    out = {'image': image, 'label': np.int32(example['label'])}
    if self._mild:
      u = rng.random(7, np.float32)
      out['affine'] = (2 * u[:5] - 1) * _SPREAD
      out['contrast'] = MILD['contrast'] + (1 - MILD['contrast']) * u[5]
      out['noise'] = rng.standard_normal(self.image_shape, np.float32) * (MILD['noise'] * u[6])
    return out

  def finish(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stacked draws -> image (B, S, S, C) float32, label (B,) int32, weight (B,) float32."""
    images, size = batch['image'], self.config.size
    B = len(images)
    if self._mild:
      pixels = affine_warp(images, batch['affine'], size)
      pixels = pixels * batch['contrast'].astype(np.float32)[:, None, None, None] + batch['noise']
      np.clip(pixels, 0, 1, out=pixels)
    elif images.shape[1:3] != (size, size):
      pixels = affine_warp(images, np.zeros((B, 5), np.float32), size)
    else:
      pixels = images.astype(np.float32) * np.float32(1 / 255)
    if pixels.shape[-1] < self.channels:
      pixels = np.repeat(pixels, self.channels, axis=-1)
    if (self.config.mean, self.config.std) != (0.0, 1.0):
      pixels = (pixels - np.float32(self.config.mean)) * np.float32(1 / self.config.std)
    return {'image': pixels, 'label': batch['label'],
            'weight': np.ones(B, np.float32)}
