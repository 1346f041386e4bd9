"""What every source of examples provides, whether it is read from memory, files or TFDS."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Source:
  """Splits of examples with random access.

  Attributes:
    kind: 'classification', examples {'image': (H, W, C) uint8, 'label': int}; or 'seq2seq',
      examples {'text': UTF-8 bytes} for span corruption, or pairs.
    splits: {'train', 'validation', 'test', perhaps more: sequence (len, [i])}. Splits of pairs also
      have `targets`, the targets to check against decoder_length before training.
    digest: SHA-256 hex of the contents.
    num_classes, channels: of images; 0 for text.
    same_shape: whether all images are square and of one size.
    pairs: whether examples are {'input': UTF-8 bytes, 'target': UTF-8 bytes, 'task': int}; with
      'references', a tuple of UTF-8 bytes, where more answers than 'target' are right.
    tasks: names that 'task' indexes; () for a single task.
  """
  kind: str
  splits: Mapping[str, Sequence]
  digest: str
  num_classes: int = 0
  channels: int = 0
  same_shape: bool = False
  pairs: bool = False
  tasks: tuple[str, ...] = ()
