"""Any TFDS dataset, read without TensorFlow from files with random access (array_record)."""

import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moejax.config import ConfigError, check, check_choice
from moejax.data import registry
from moejax.data.config import DataConfig, TfdsConfig
from moejax.data.source import Source

SAMPLED = 16   # examples per split that represent it: in the digest, and as targets to check


class TfdsExamples:
  """A TFDS split with random access, reduced to the features that a task needs."""

  def __init__(self, data: Sequence, read: Callable[[dict], dict[str, Any]]):
    self._data, self._read = data, read

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self._read(self._data[int(i)])

  def sampled(self) -> list[dict[str, Any]]:
    """SAMPLED evenly spaced examples, or all if there are fewer."""
    numbers = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int)
    return [self[i] for i in numbers]

  @property
  def targets(self) -> set[bytes]:
    """The targets of sampled pairs; reading all would take too long."""
    return {example['target'] for example in self.sampled()}


def _read_image(example: dict) -> dict[str, Any]:
  image = np.asarray(example['image'])
  return {'image': image if image.dtype == np.uint8 else _to_uint8(image),
          'label': int(example['label'])}


def _to_uint8(image: np.ndarray) -> np.ndarray:
  """The top 8 bits of an integer image, or 255 times a float image in [0, 1]."""
  if np.issubdtype(image.dtype, np.floating):
    return np.clip(np.round(image * 255), 0, 255).astype(np.uint8)
  return (image.astype(np.uint32) >> (8 * (image.dtype.itemsize - 1))).astype(np.uint8)


def _read_text(example: dict) -> dict[str, Any]:
  return {'text': as_bytes(example['text'])}


def _pair_reader(input: str, target: str) -> Callable[[dict], dict[str, Any]]:
  """A function from a TFDS example to the pair of two of its features."""
  def read(example):
    return {'input': as_bytes(example[input]), 'target': as_bytes(example[target]), 'task': 0}
  return read


def as_bytes(text: Any) -> bytes:
  """A TFDS string as UTF-8."""
  return text if isinstance(text, bytes) else str(text).encode()


def load(config: DataConfig) -> Source:
  """A prepared TFDS dataset of two named texts, image and label, or text.

  Raises:
    ConfigError: the package or the folder is missing, the name is unknown, the files are tfrecord,
      a split does not exist, or the features are of another kind of task.
  """
  name = config.source.removeprefix(registry.TFDS)
  builder = open_builder(name, config.data_dir)
  features = builder.info.features
  if config.tfds.input:
    for key in ('input', 'target'):
      strings = [feature for feature in features if _is_string(features[feature])]
      check_choice(f'data.tfds.{key}', getattr(config.tfds, key), strings)
    kind, read = 'seq2seq', _pair_reader(config.tfds.input, config.tfds.target)
  elif {'image', 'label'} <= set(features) and hasattr(features['label'], 'num_classes'):
    kind, read = 'classification', _read_image
    for key in ('classes', 'skip_classes'):
      check(getattr(config.image, key) == 0, f'data.image.{key}', getattr(config.image, key),
            '0 for a TFDS source', 'Remove it.')
  elif 'text' in features:
    kind, read = 'seq2seq', _read_text
  else:
    raise ConfigError(f'data.source: {config.source} has features {", ".join(sorted(features))}; '
                      'moejax reads datasets with image and label, with text, or with two texts '
                      'that data.tfds.input and data.tfds.target name. Choose another.')
  splits = {ours: TfdsExamples(open_split(builder, name, split), read)
            for ours, split in _choose_splits(builder, name, config.tfds, kind).items()}
  image = kind == 'classification'
  # An unknown number of channels (None) is taken for colour.
  channels = (features['image'].shape[-1] or 3) if image else 0
  return Source(kind=kind, splits=splits, digest=_digest(builder, splits),
                num_classes=features['label'].num_classes if image else 0,
                channels=1 if channels == 1 else 3 if image else 0,
                pairs=bool(config.tfds.input))


def _is_string(feature: Any) -> bool:
  """Whether a TFDS feature is a single string (Text, or a scalar Tensor of strings)."""
  return feature.shape == () and np.dtype(feature.np_dtype).kind in 'OSU'


def open_builder(name: str, folder: str) -> Any:
  """The TFDS builder of a dataset whose files are array_record.

  Args:
    name: in TFDS: 'cifar10', 'c4/en'.
    folder: TFDS data_dir; '': TFDS's own default.

  Raises:
    ConfigError: see `load`.
  """
  check(not folder or os.path.isdir(os.path.expanduser(folder)) or '://' in folder,
        'data.data_dir', folder, 'an existing folder of prepared TFDS datasets',
        f'Prepare it: tfds build {name} --file_format=array_record --data_dir={folder}')
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ConfigError(f'data.source: {name} in TFDS needs a package that is missing: '
                      'pip install tensorflow-datasets array_record') from error
  not_found = tfds.core.registered.DatasetNotFoundError
  data_dir = os.path.expanduser(folder) or None
  try:   # prepared files need no builder code, and some of that code needs TensorFlow
    builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir)
  except not_found:
    try:
      builder = tfds.builder(name, data_dir=data_dir)
    except (not_found, ImportError) as error:
      raise _not_prepared(name, folder or "TFDS's default data_dir") from error
  path = pathlib.Path(os.fspath(builder.data_path))
  file_format = builder.info.file_format
  if path.is_dir() and file_format and file_format.value != 'array_record':
    raise ConfigError(
        f'data.data_dir: {path} holds {file_format.value} files, which have no random access; '
        'array_record is needed. Convert: python -m tensorflow_datasets.scripts.convert_format '
        f'--dataset_dir={path} --out_file_format=array_record --out_dir=DIR (this needs '
        f'TensorFlow), or prepare anew: tfds build {name} --file_format=array_record')
  return builder


def _not_prepared(name: str, place: Any) -> ConfigError:
  return ConfigError(
      f'data.data_dir: no prepared copy of {name!r} in {place}. Check the name (data.source) and '
      f'the folder, or prepare it: tfds build {name} --file_format=array_record --data_dir=DIR')


def open_split(builder: Any, name: str, split: str) -> Sequence:
  """Random access to a TFDS split. Raises ConfigError, with what is missing."""
  try:
    return builder.as_data_source(split=split)
  except (AssertionError, FileNotFoundError) as error:
    raise _not_prepared(name, builder.data_path) from error
  except ValueError as error:
    raise ConfigError(f'data.tfds: split {split!r} of {name}: {error}. '
                      f'Splits: {", ".join(builder.info.splits)}.') from error


def _choose_splits(builder: Any, name: str, given: TfdsConfig, kind: str) -> dict[str, str]:
  """{moejax's split: TFDS split}, as given or by the rule of TfdsConfig."""
  if given.splits:
    return given.splits
  own = set(builder.info.splits)
  if not own:   # a builder without files lists no splits
    raise _not_prepared(name, builder.data_path)
  check_choice('data.source split', 'train', own)
  test = 'test' if 'test' in own and _labelled(builder, name, kind) else 'validation'
  check(test in own, 'data.tfds', sorted(own), 'a labelled test or a validation split',
        "Name the splits: data.tfds.train='train[:90%]', validation='train[90%:95%]', "
        "test='train[95%:]'.")
  if 'validation' in own and test != 'validation':
    return {'train': 'train', 'validation': 'validation', 'test': test}
  return {'train': 'train[:95%]', 'validation': 'train[95%:]', 'test': test}


def _labelled(builder: Any, name: str, kind: str) -> bool:
  """Whether the dataset's own test split has labels (a withheld label is -1 in TFDS)."""
  return kind != 'classification' or int(open_split(builder, name, 'test')[0]['label']) >= 0


def _digest(builder: Any, splits: dict[str, TfdsExamples]) -> str:
  """SHA-256 hex of a TFDS dataset, which may be too large to read as a whole.

  It covers the metadata (dataset_info.json has name, version and shard lengths), the names and
  sizes of the files, and SAMPLED examples of each split.
  """
  sha = hashlib.sha256(f'{builder.info.full_name}\n'.encode())
  path = pathlib.Path(os.fspath(builder.data_path))
  for file in sorted(path.iterdir()) if path.is_dir() else []:
    sha.update(f'{file.name} {file.stat().st_size}\n'.encode())
    if file.suffix == '.json':
      sha.update(file.read_bytes())
  for name, examples in sorted(splits.items()):
    sha.update(f'{name} {len(examples)}\n'.encode())
    for example in examples.sampled():
      for key, value in sorted(example.items()):
        value = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else np.asarray(value)
        sha.update(f'{key} {value.dtype.str} {value.shape}'.encode() + value.tobytes())
  return sha.hexdigest()
