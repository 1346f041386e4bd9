"""The source text of Python's own standard library, for span corruption (source 'stdlib_text').

It differs between versions of Python, and so does its digest.
"""

import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Sequence

import numpy as np

from moejax.data.config import DataConfig
from moejax.data.source import Source
from moejax.data.text import TextProcessor


class TextChunks:
  """A split of text in memory; item i is {'text': bytes}, room for one window at any offset.

  Chunk k of a file starts at k * stride and is 2 * stride - 1 bytes long (less at the end of the
  file). Windows of `stride` bytes cut at a random offset of a random chunk then begin at every byte
  equally often in expectation, and an epoch covers each byte about once. Files below one stride are
  left out.
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


def library_root() -> pathlib.Path:
  """The folder of the running Python's standard library."""
  return pathlib.Path(sysconfig.get_paths()['stdlib'])


def library_files(root: pathlib.Path) -> list[pathlib.Path]:
  """The standard library's source files, sorted, relative to root.

  Left out are tests, which some systems strip, and what differs between builds of one Python:
  installed packages and the build's own settings.
  """
  skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(d for d in folders if d not in skip and not d.startswith('config-'))
    files += [pathlib.Path(folder, n).relative_to(root) for n in names
              if n.endswith('.py') and not n.startswith('_sysconfigdata')]
  return sorted(files, key=lambda f: f.as_posix())


def split_of(name: str) -> str:
  """The split of a file: 90 / 5 / 5 % by a hash of its path relative to the root."""
  draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big') % 100
  return 'train' if draw < 90 else 'validation' if draw < 95 else 'test'


def load(config: DataConfig) -> Source:
  """The standard library in chunks of two windows, split by file.

  Raises:
    ConfigError: see TextProcessor.
  """
  window_bytes, root = TextProcessor(config.text).window_bytes, library_root()
  files: dict[str, list[bytes]] = {'train': [], 'validation': [], 'test': []}
  sha = hashlib.sha256()
  for path in library_files(root):
    text, name = (root / path).read_bytes(), path.as_posix()
    files[split_of(name)].append(text)
    sha.update(f'{split_of(name)} {name} {len(text)}\n'.encode() + text)
  splits = {split: TextChunks(texts, window_bytes) for split, texts in files.items()}
  return Source(kind='seq2seq', splits=splits, digest=sha.hexdigest())
