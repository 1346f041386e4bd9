"""Sources that need no network: glyphs from matplotlib's fonts, digits, the standard library.

Each function returns a Source whose splits are sequences of examples in memory. N rows, H W pixels.
"""

import hashlib
import os
import pathlib
import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from moejax.config import ConfigError, check
from moejax.data.config import DataConfig
from moejax.data.image import ImageTable
from moejax.data.source import Source

CELL = 32                # rendered glyphs are CELL x CELL pixels
EM, BASELINE = 24, 23    # font size, and the row the letters stand on
# Two code points of one font whose bitmaps differ by less than this share of their ink look alike;
# alike in half of the fonts that draw both (Latin A, Greek Alpha, Cyrillic A), they are one shape.
SAME_SHAPE = 0.01
HELD_OUT = 'STIXGeneral'
FAMILIES = ('DejaVuSans', 'DejaVuSansMono', 'DejaVuSerif', HELD_OUT)
RENDERING = 1            # raise when the rendering changes: cached glyphs are rendered anew


def cache_dir(config: DataConfig) -> pathlib.Path:
  """The folder of things worth keeping between runs, created; ConfigError if it cannot be."""
  path = pathlib.Path(config.cache_dir or os.environ.get('MOEJAX_CACHE')
                      or pathlib.Path.home() / '.cache' / 'moejax').expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'data.cache_dir: cannot create {str(path)!r} ({error.strerror}). '
                      'Set it, or $MOEJAX_CACHE, to a writable folder.') from error
  return path


def save_atomically(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """np.savez under a temporary name, then a rename: a reader never sees half a file."""
  handle, name = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
  try:
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, **arrays)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def digest(*arrays: np.ndarray) -> str:
  """SHA-256 hex of arrays: dtypes, shapes and contents."""
  sha = hashlib.sha256()
  for a in arrays:
    a = np.ascontiguousarray(a)
    sha.update(f'{a.dtype.str}{a.shape}'.encode())
    sha.update(a.view(np.uint8).reshape(-1).data if a.size else b'')
  return sha.hexdigest()


# glyphs


def font_files() -> dict[str, list[pathlib.Path]]:
  """Family -> its files (regular, bold, italic, bold italic) in matplotlib's font folder."""
  import matplotlib
  folder = pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
  style = r'(-(Bold|Oblique|Italic|BoldOblique|BoldItalic)|Bol|BolIta|Italic)?\.ttf'
  return {family: sorted(f for f in folder.iterdir() if re.fullmatch(family + style, f.name))
          for family in FAMILIES}


def _render(path: pathlib.Path, code_points: Sequence[int], progress: tqdm) -> np.ndarray:
  """Code points of one font -> (N, CELL, CELL) uint8, on one baseline, shrunk if too large."""
  from PIL import Image, ImageDraw, ImageFont

  def load(size):
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)

  fonts = {EM: load(EM)}
  images = np.zeros((len(code_points), CELL, CELL), np.uint8)
  for n, code_point in enumerate(code_points):
    text, size = chr(code_point), EM
    left, top, right, bottom = fonts[size].getbbox(text, anchor='ls')
    extent = max(right - left, bottom - top)
    if extent > CELL - 2:
      size = max(int(EM * (CELL - 2) / extent), 4)
      if size not in fonts:
        fonts[size] = load(size)
      left, top, right, bottom = fonts[size].getbbox(text, anchor='ls')
    x = round((CELL - right - left) / 2)
    y = min(max(BASELINE, 1 - top), CELL - 1 - bottom)
    cell = Image.new('L', (CELL, CELL))
    ImageDraw.Draw(cell).text((x, y), text, fill=255, font=fonts[size], anchor='ls')
    images[n] = np.asarray(cell)
    progress.update()
  return images


def _alike(images: np.ndarray, code_points: np.ndarray) -> list[tuple[int, int]]:
  """Pairs (code point, smaller code point) whose bitmaps in this font are nearly the same."""
  half = images.reshape(-1, CELL // 2, 2, CELL // 2, 2).mean((2, 4)).reshape(len(images), -1)
  half = half.astype(np.float32) / 255                             # (N, 256)
  ink = np.square(half).sum(1)
  pairs = []
  for start in range(0, len(half), 512):
    block = slice(start, start + 512)
    distance = ink[block, None] + ink[None] - 2 * half[block] @ half.T
    near = distance < SAME_SHAPE * (ink[block, None] + ink[None]) / 2
    i, j = np.nonzero(np.tril(near, start - 1))
    pairs += zip(code_points[i + start].tolist(), code_points[j].tolist())
  return pairs


def _distinct(code_point: np.ndarray, font: np.ndarray, alike: Counter) -> set[int]:
  """The code points left when, in ascending order, each one of a kept one's shape is dropped."""
  fonts: dict[int, set[int]] = {}
  for cp, n in zip(code_point.tolist(), font.tolist()):
    fonts.setdefault(cp, set()).add(n)
  same: dict[int, set[int]] = {}
  for (cp, smaller), times in alike.items():
    if 2 * times >= len(fonts[cp] & fonts[smaller]):
      same.setdefault(cp, set()).add(smaller)
  kept: set[int] = set()
  for cp in sorted(fonts):
    if not same.get(cp, set()) & kept:
      kept.add(cp)
  return kept


def _render_all(families: dict[str, list[pathlib.Path]]) -> dict[str, np.ndarray]:
  """Every glyph kept: image (N, CELL, CELL) uint8, code_point (N,) int32, font (N,) int32."""
  from matplotlib.ft2font import FT2Font
  covered = {f: {cp for cp in FT2Font(str(f)).get_charmap() if chr(cp).isprintable()}
             for files in families.values() for f in files}
  by_family = [set().union(*(covered[f] for f in files)) for files in families.values()]
  shared = {cp for cps in by_family for cp in cps if sum(cp in other for other in by_family) >= 2}
  images, code_points, fonts, alike = [], [], [], Counter()
  total = sum(len(cps & shared) for cps in covered.values())
  with tqdm(total=total, desc='rendering glyphs (once)', unit='glyph', disable=None) as progress:
    for n, (path, cps) in enumerate(covered.items()):
      cps = np.array(sorted(cps & shared), np.int32)
      rendered = _render(path, cps, progress)
      inked = rendered.reshape(len(cps), -1).sum(1, dtype=np.int64) >= 255
      cps, rendered = cps[inked], rendered[inked]
      alike.update(_alike(rendered, cps))
      images.append(rendered)
      code_points.append(cps)
      fonts.append(np.full(len(cps), n, np.int32))
  image, code_point, font = map(np.concatenate, (images, code_points, fonts))
  kept = _distinct(code_point, font, alike)
  # A class needs two families even where one of them draws it blank.
  family = np.repeat(np.arange(len(families)), [len(f) for f in families.values()])[font]
  pairs = np.unique(np.stack([code_point, family]), axis=1)[0]
  values, count = np.unique(pairs, return_counts=True)
  keep = np.isin(code_point, sorted(kept & set(values[count >= 2].tolist())))
  return {'image': image[keep], 'code_point': code_point[keep], 'font': font[keep],
          'family': family[keep].astype(np.int32)}


def _glyph_table(config: DataConfig) -> dict[str, np.ndarray]:
  """The rendered glyphs, from the cache if these fonts and this renderer filled it before."""
  import PIL
  from PIL import features
  families = font_files()
  missing = [family for family, files in families.items() if len(files) != 4]
  if missing:
    raise ConfigError(f'data.source: glyphs needs four files each of {", ".join(missing)} in '
                      "matplotlib's font folder. Reinstall matplotlib from PyPI.")
  sha = hashlib.sha256(f'{RENDERING} {PIL.__version__} {features.version("freetype2")} '
                       f'{CELL} {EM} {BASELINE} {SAME_SHAPE}'.encode())
  for files in families.values():
    for path in files:
      sha.update(path.read_bytes())
  path = cache_dir(config) / f'glyphs-{sha.hexdigest()[:16]}.npz'
  if path.exists():
    with np.load(path) as table:
      return dict(table)
  table = _render_all(families)
  save_atomically(path, **table)
  return table


def _choose_classes(config: DataConfig, classes: int) -> np.ndarray:
  """(classes,) int32: class -> label, or -1 for a class that config.image leaves out."""
  skip = config.image.skip_classes
  left = classes - skip
  check(skip == 0 or left >= 2, 'data.image.skip_classes', skip,
        f'at most {classes - 2} of the {classes} classes of {config.source}',
        'Leave two to tell apart.')
  n = config.image.classes or left
  check(n <= left, 'data.image.classes', n,
        f'at most {left} for {config.source}' + (f' without the first {skip}' if skip else ''),
        'Use 0 for all of them.')
  label = np.arange(classes, dtype=np.int32)
  if n < classes:
    label[:] = -1
    label[np.random.default_rng(0).permutation(classes)[skip:skip + n]] = np.arange(n)
  return label


def _image_source(splits: dict[str, ImageTable], classes: int) -> Source:
  parts = [a for name in sorted(splits) for a in (splits[name].images, splits[name].labels)]
  return Source(kind='classification', splits=splits, digest=digest(*parts), num_classes=classes,
                channels=1, same_shape=True)


def glyphs(config: DataConfig, window_bytes: int) -> Source:
  """Characters of four font families (16 fonts); the label is the character.

  Kept are code points drawn in at least two families whose shape no smaller code point has
  (_distinct); a few pairs still look alike in some fonts, such as italic m and Cyrillic te.

  'test' is the family STIXGeneral: the one family from another foundry, so that its shapes, and not
  only its slant or weight, are new; it covers about half of the classes. 'validation', to choose
  by, and 'test_seen', to report, are in distribution: a tenth each of the DejaVu glyphs (one
  character in one font), chosen by hash, where at least two others of the class remain for
  training; a sister style (oblique, bold) of the same character is usually among those. None of
  the three is trained on.
  """
  del window_bytes
  table = _glyph_table(config)
  points, klass = np.unique(table['code_point'], return_inverse=True)
  label = _choose_classes(config, len(points))[klass]              # (N,)
  test = table['family'] == FAMILIES.index(HELD_OUT)
  mixed = (table['code_point'].astype(np.uint64) * 16 + table['font'].astype(np.uint64))
  mixed = (mixed * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # Fibonacci hashing
  drawn = np.bincount(klass[~test], minlength=len(points))
  # One in ten each, but of each class at most as many as leave two.
  order = np.lexsort((mixed, klass))
  order = order[~test[order]]
  rank = np.empty(len(klass), np.int64)
  rank[order] = np.arange(len(order)) - np.searchsorted(klass[order], klass[order])
  held = ~test & (mixed % 10 < 2) & (drawn[klass] >= 3)
  held[order] &= rank[order] < (drawn - 2)[klass[order]]
  validation = held & (mixed % 10 == 0)
  chosen = label >= 0
  splits = {name: ImageTable(table['image'][rows & chosen][..., None], label[rows & chosen])
            for name, rows in (('train', ~test & ~held), ('validation', validation),
                               ('test_seen', held & ~validation), ('test', test))}
  return _image_source(splits, int(label.max()) + 1)


def digits(config: DataConfig, window_bytes: int) -> Source:
  """scikit-learn's 1,797 handwritten digits, 8 x 8: 1,297 / 250 / 250 by a fixed permutation."""
  del window_bytes
  from sklearn.datasets import load_digits
  raw = load_digits()
  images = np.round(raw.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = _choose_classes(config, 10)[raw.target]
  order = np.random.default_rng(0).permutation(len(labels))
  parts = np.split(order, [len(order) - 500, len(order) - 250])
  parts = [rows[labels[rows] >= 0] for rows in parts]
  splits = {name: ImageTable(images[rows], labels[rows])
            for name, rows in zip(('train', 'validation', 'test'), parts)}
  return _image_source(splits, int(labels.max()) + 1)


# stdlib_text


class TextChunks:
  """A split of text in memory; item i is {'text': bytes}, room for one window at any offset.

  Chunk k of a file starts at k * stride and is 2 * stride - 1 bytes long (less at the end of the
  file), so that windows of `stride` bytes cut at a random offset begin at every byte equally often
  in expectation, and an epoch sees each byte about once. Files below one stride are left out.
  """

  def __init__(self, files: Sequence[bytes], stride: int):
    files = [f for f in files if len(f) >= stride]
    self._text = b''.join(files)
    ends = np.cumsum([len(f) for f in files], dtype=np.int64)
    starts = [np.arange(end - len(f), end - stride + 1, stride) for f, end in zip(files, ends)]
    self._start = np.concatenate([np.zeros(0, np.int64), *starts])
    self._end = np.concatenate(
        [np.zeros(0, np.int64), *(np.minimum(s + 2 * stride - 1, e) for s, e in zip(starts, ends))])

  def __len__(self) -> int:
    return len(self._start)

  def __getitem__(self, i: int) -> dict[str, bytes]:
    return {'text': self._text[self._start[i]:self._end[i]]}


def stdlib_files(root: pathlib.Path) -> list[pathlib.Path]:
  """The standard library's sources, sorted, relative to root.

  Tests are left out (some systems strip them), and so is what differs between builds of one Python:
  installed packages and the build's own settings.
  """
  skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(d for d in folders if d not in skip and not d.startswith('config-'))
    files += [pathlib.Path(folder, n).relative_to(root) for n in names
              if n.endswith('.py') and not n.startswith('_sysconfigdata')]
  return sorted(files, key=lambda f: f.as_posix())


def stdlib_root() -> pathlib.Path:
  """The folder of the running Python's standard library."""
  return pathlib.Path(sysconfig.get_paths()['stdlib'])


def stdlib_split(name: str) -> str:
  """A file's split in stdlib_text: 90 / 5 / 5 % by a hash of its path relative to the root."""
  draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big') % 100
  return 'train' if draw < 90 else 'validation' if draw < 95 else 'test'


def stdlib_text(config: DataConfig, window_bytes: int) -> Source:
  """Python's own standard library, split by file (stdlib_split)."""
  del config
  root = stdlib_root()
  parts: dict[str, list[bytes]] = {'train': [], 'validation': [], 'test': []}
  sha = hashlib.sha256()
  for path in stdlib_files(root):
    text, name = (root / path).read_bytes(), path.as_posix()
    split = stdlib_split(name)
    parts[split].append(text)
    sha.update(f'{split} {name} {len(text)}\n'.encode() + text)
  splits = {name: TextChunks(files, window_bytes) for name, files in parts.items()}
  return Source(kind='seq2seq', splits=splits, digest=sha.hexdigest())
