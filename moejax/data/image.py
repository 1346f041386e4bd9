"""Images: splits in memory, choice of classes, and examples to batches.

A batch is distorted by random affine warps all at once; photographs are flipped and cropped one by
one.

B batch, N examples of a split, H height, W width, S output size, C channels.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax.config import check
from moejax.data.config import DataConfig, ImageConfig
from moejax.data.source import Source

# Ranges of uniform draws. Rotation (rad), log of scale, shear and shift (output pixels) lie between
# minus and plus the value; contrast from the value to 1; noise's standard deviation from 0 to it.
MILD = {'rotation': 0.14, 'log_scale': 0.12, 'shear': 0.12, 'shift': 1.0, 'contrast': 0.76,
        'noise': 0.12}
_SPREAD = np.array([MILD['rotation'], MILD['log_scale'], MILD['shear'], MILD['shift'],
                    MILD['shift']], np.float32)


@dataclasses.dataclass(frozen=True)
class ImageTable:
  """A split in memory: images (N, H, W, C) uint8, labels (N,) int32; item i is one example."""
  images: np.ndarray
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return {'image': self.images[i], 'label': self.labels[i]}


def grey_source(splits: Mapping[str, ImageTable], num_classes: int) -> Source:
  """The Source of square grey images in memory; its digest covers every pixel and label."""
  sha = hashlib.sha256()
  for name in sorted(splits):
    for array in (splits[name].images, splits[name].labels):
      sha.update(f'{array.dtype.str}{array.shape}'.encode() + np.ascontiguousarray(array).tobytes())
  return Source(kind='classification', splits=splits, digest=sha.hexdigest(),
                num_classes=num_classes, channels=1, same_shape=True)


def choose_labels(config: DataConfig, num_classes: int) -> np.ndarray:
  """(num_classes,) int32: class of the source -> label, or -1 where config.image leaves it out.

  Raises:
    ConfigError: config.image takes or skips more classes than there are.
  """
  skip = config.image.skip_classes
  left = num_classes - skip
  check(skip == 0 or left >= 2, 'data.image.skip_classes', skip,
        f'at most {num_classes - 2} of the {num_classes} classes of {config.source}',
        'Leave at least two.')
  n = config.image.classes or left
  check(n <= left, 'data.image.classes', n,
        f'at most {left} for {config.source}' + (f' without the first {skip}' if skip else ''),
        'Use 0 for all of them.')
  label = np.arange(num_classes, dtype=np.int32)
  if n < num_classes:
    label[:] = -1
    label[np.random.default_rng(0).permutation(num_classes)[skip:skip + n]] = np.arange(n)
  return label


def affine_warp(images: np.ndarray, affine: np.ndarray, size: int) -> np.ndarray:
  """Rotates, scales, shears and shifts images of any size, by bilinear resampling.

  Args:
    images: (B, H, W, C) uint8.
    affine: (B, 5) float32: rotation (rad), log of scale, shear, shift down and right (output
      pixels). Zeros resize the whole image.
    size: S.

  Returns:
    (B, S, S, C) float32 in [0, 1]; points outside the image are 0.
  """
  B, H, W, C = images.shape
  rotation, log_scale, shear, down, right = affine.astype(np.float32).T[..., None, None]
  cos, sin = np.cos(rotation), np.sin(rotation)
  zoom = np.exp(-log_scale)                  # source pixels per output pixel shrink as images grow
  at = np.arange(size, dtype=np.float32) - (size - 1) / 2
  y, x = at[:, None] - down, at[None, :] - right                   # (B, S, 1), (B, 1, S)
  row = (sin * zoom) * x + (cos + sin * shear) * zoom * y
  col = (cos * zoom) * x + (cos * shear - sin) * zoom * y          # (B, S, S)
  # Points outside the source are moved to the border of zeros around it.
  row = np.clip(row * (H / size) + (H + 1) / 2, 0, H + 1)
  col = np.clip(col * (W / size) + (W + 1) / 2, 0, W + 1)
  # Zeros: one row before and two after, so that a point at H + 1 also has four neighbours.
  padded = np.zeros((B, H + 3, W + 3, C), np.float32)
  padded[:, 1:-2, 1:-2] = images
  pixels = padded.reshape(-1, C)                                   # (B * (H+3) * (W+3), C)
  top, left = row.astype(np.int32), col.astype(np.int32)
  # float32 throughout: numpy would make float64 of float32 - int32.
  fy = (row - top.astype(np.float32))[..., None]                   # (B, S, S, 1)
  fx = (col - left.astype(np.float32))[..., None]
  first = np.arange(B, dtype=np.int32) * ((H + 3) * (W + 3))
  base = first[:, None, None] + top * (W + 3) + left
  corner = [np.take(pixels, base + step, axis=0) for step in (0, 1, W + 3, W + 4)]
  upper = corner[0] + fx * (corner[1] - corner[0])
  lower = corner[2] + fx * (corner[3] - corner[2])
  return (upper + fy * (lower - upper)) * np.float32(1 / 255)


def flip_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A random crop, (S, S, C), of an image (S, S, C) padded by S/8 zeros; half are mirrored."""
  S = image.shape[0]
  margin = max(S // 8, 1)
  padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)))
  y, x = rng.integers(0, 2 * margin + 1, size=2)
  image = padded[y:y + S, x:x + S]
  return image[:, ::-1] if rng.integers(2) else image


def fit(image: np.ndarray, size: int, channels: int) -> np.ndarray:
  """(H, W, C) uint8 -> (S, S, channels) uint8: the shorter side is resized to S, then cropped.

  The crop is central. Grey is repeated into three channels; colour becomes luma in one.
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


class ImageProcessor:
  """Turns examples {'image': (H, W, C) uint8, 'label': ()} into classification batches.

  Args:
    config: ImageConfig.
    channels: of the source, used where config.channels is 0.
    same_shape: whether all images of the source have one shape, so that a whole batch can be
      resized at once; otherwise each is resized (`fit`) as it is read.
  """

  def __init__(self, config: ImageConfig, channels: int, same_shape: bool):
    self.config = config
    self.channels = config.channels or channels
    # A crop needs its image at the final size; luma is computed by `fit`.
    self._fit_each = not same_shape or config.augment == 'flip_crop' or self.channels < channels
    self._mild = config.augment == 'mild'

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (self.config.size, self.config.size, self.channels)

  def draw(self, example: Mapping[str, Any], rng: np.random.Generator,
           train: bool = True) -> dict[str, np.ndarray]:
    """An example's image, label and random numbers; `finish` distorts the pixels.

    train: whether flip_crop flips and crops.
    """
    image = example['image']
    if self._fit_each:
      image = fit(image, self.config.size, self.channels)
    if train and self.config.augment == 'flip_crop':
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
