"""Characters rendered from the fonts inside matplotlib; the label is the character.

Rendered once and cached. N glyphs (one character in one font).
"""

import hashlib
import os
import pathlib
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from moejax.config import ConfigError
from moejax.data.config import DataConfig
from moejax.data.image import ImageTable, choose_labels, grey_source
from moejax.data.source import Source

CELL = 32                # rendered glyphs are CELL x CELL pixels
EM, BASELINE = 24, 23    # font size, and the pixel row of the baseline
# Two code points of one font look alike if their bitmaps differ by less than this share of their
# ink. Alike in half of the fonts that draw both (Latin A, Greek Alpha), they are one shape.
SAME_SHAPE = 0.01
HELD_OUT = 'STIXGeneral'
FAMILIES = ('DejaVuSans', 'DejaVuSansMono', 'DejaVuSerif', HELD_OUT)
RENDERING = 1            # raise when the rendering changes, so that cached glyphs are not used


def cache_dir(config: DataConfig) -> pathlib.Path:
  """The folder of files to keep between runs, created if missing.

  Raises:
    ConfigError: it cannot be created.
  """
  path = pathlib.Path(config.cache_dir or os.environ.get('MOEJAX_CACHE')
                      or pathlib.Path.home() / '.cache' / 'moejax').expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ConfigError(f'data.cache_dir: cannot create {str(path)!r} ({error.strerror}). '
                      'Set it, or $MOEJAX_CACHE, to a writable folder.') from error
  return path


def save_atomically(path: pathlib.Path, **arrays: np.ndarray) -> None:
  """np.savez under a temporary name, then a rename, so that a reader never sees half a file."""
  handle, name = tempfile.mkstemp(dir=path.parent, suffix='.tmp')
  try:
    with os.fdopen(handle, 'wb') as file:
      np.savez(file, **arrays)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise


def font_files() -> dict[str, list[pathlib.Path]]:
  """{family: its files (regular, bold, italic, bold italic) in matplotlib's font folder}."""
  import matplotlib
  folder = pathlib.Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'
  style = r'(-(Bold|Oblique|Italic|BoldOblique|BoldItalic)|Bol|BolIta|Italic)?\.ttf'
  return {family: sorted(f for f in folder.iterdir() if re.fullmatch(family + style, f.name))
          for family in FAMILIES}


def _render(path: pathlib.Path, code_points: Sequence[int], progress: tqdm) -> np.ndarray:
  """Draws code points of one font on one baseline, shrunk if too large: (N, CELL, CELL) uint8."""
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
  """Pairs (code point, smaller code point) that look alike in one font (see SAME_SHAPE)."""
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
  """Code points to keep: in ascending order, each whose shape no kept code point has.

  Args:
    code_point, font: (N,) of all glyphs.
    alike: {(code point, smaller code point): fonts in which they look alike}.
  """
  fonts, same_shape = defaultdict(set), defaultdict(set)
  for cp, n in zip(code_point.tolist(), font.tolist()):
    fonts[cp].add(n)
  for (cp, smaller), times in alike.items():
    if 2 * times >= len(fonts[cp] & fonts[smaller]):
      same_shape[cp].add(smaller)
  kept: set[int] = set()
  for cp in sorted(fonts):
    if not same_shape[cp] & kept:
      kept.add(cp)
  return kept


def _render_all(families: dict[str, list[pathlib.Path]]) -> dict[str, np.ndarray]:
  """Renders all glyphs and keeps those of distinct characters that two families draw.

  Returns:
    {'image': (N, CELL, CELL) uint8; 'code_point', 'font', 'family': (N,) int32}.
  """
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
  # Two families must draw a class with ink: some fonts cover a code point by a blank.
  family = np.repeat(np.arange(len(families)), [len(f) for f in families.values()])[font]
  pairs = np.unique(np.stack([code_point, family]), axis=1)[0]
  values, count = np.unique(pairs, return_counts=True)
  keep = np.isin(code_point, sorted(kept & set(values[count >= 2].tolist())))
  return {'image': image[keep], 'code_point': code_point[keep], 'font': font[keep],
          'family': family[keep].astype(np.int32)}


def _glyph_table(config: DataConfig) -> dict[str, np.ndarray]:
  """What _render_all returns, from the cache if it holds glyphs of these fonts and renderer."""
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


def load(config: DataConfig) -> Source:
  """Characters of four font families (16 fonts), by the code points that `_render_all` keeps.

  A few pairs of classes still look alike in some fonts, such as italic m and Cyrillic te.

  Splits: 'test' is the family STIXGeneral, which covers about half of the classes: the one family
  from another foundry, so that its shapes are new, not only its slant or weight. 'validation', for
  choosing, and 'test_seen', for reporting, are in distribution: a tenth each of the DejaVu glyphs,
  chosen by hash, where at least two others of the class remain for training; a sister style
  (oblique, bold) of a held-out glyph is usually among those.

  Raises:
    ConfigError: fonts are missing, the cache folder cannot be made, or config.image takes or skips
      too many classes.
  """
  table = _glyph_table(config)
  points, klass = np.unique(table['code_point'], return_inverse=True)
  label = choose_labels(config, len(points))[klass]               # (N,)
  test = table['family'] == FAMILIES.index(HELD_OUT)
  number = table['code_point'].astype(np.uint64) * 16 + table['font'].astype(np.uint64)
  hashed = (number * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)  # Fibonacci hashing
  drawn = np.bincount(klass[~test], minlength=len(points))
  # A tenth each; but all except two glyphs of a class at most.
  order = np.lexsort((hashed, klass))
  order = order[~test[order]]
  rank = np.empty(len(klass), np.int64)
  rank[order] = np.arange(len(order)) - np.searchsorted(klass[order], klass[order])
  held = ~test & (hashed % 10 < 2) & (drawn[klass] >= 3)
  held[order] &= rank[order] < (drawn - 2)[klass[order]]
  validation = held & (hashed % 10 == 0)
  chosen = label >= 0
  splits = {name: ImageTable(table['image'][part & chosen][..., None], label[part & chosen])
            for name, part in (('train', ~test & ~held), ('validation', validation),
                               ('test_seen', held & ~validation), ('test', test))}
  return grey_source(splits, int(label.max()) + 1)
