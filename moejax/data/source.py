"""What a source of examples is, whoever reads it."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Source:
  """Splits of examples with random access.

  kind: 'classification', examples {'image': (H, W, C) uint8, 'label': int}; or 'seq2seq', examples
    {'text': UTF-8 bytes} to be span-corrupted, or pairs.
  pairs: examples are {'input': UTF-8 bytes, 'target': UTF-8 bytes, 'task': int}; with 'references',
    a tuple of UTF-8 bytes, where more answers than 'target' are right.
  tasks: names that 'task' indexes; () where there is one thing to learn.
  metric: how answers to pairs are scored: 'exact_match' or 'pronunciation'; '' without pairs.
  splits: 'train', 'validation', 'test' -> sequence (len, [i]).
  digest: SHA-256 hex of the contents.
  num_classes, channels: of images; 0 for text.
  same_shape: all images are square and of one size.
  """
  kind: str
  splits: Mapping[str, Sequence]
  digest: str
  num_classes: int = 0
  channels: int = 0
  same_shape: bool = False
  pairs: bool = False
  tasks: tuple[str, ...] = ()
  metric: str = ''
