"""Settings of a run's data: what is read, how it is shaped, how it is batched."""

import dataclasses

from moejax.config import check, check_choice
from moejax.data import registry

AUGMENTS = ('none', 'mild', 'flip_crop')


@dataclasses.dataclass(frozen=True)
class ImageConfig:
  """Images become (size, size, channels) float32, (pixel / 255 - mean) / std.

  Attributes:
    size: height and width in pixels.
    channels: 1 or 3; 0: as many as the source has.
    classes: this many classes, by a fixed random permutation (512 are among the 1,024); 0: all.
    skip_classes: leave out the first classes of that permutation: 4,096 here gives classes that a
      run with classes=4096 never saw. Labels count from 0 again.
    augment: 'none'; 'mild' (rotation, scale, shear, shift, contrast, noise: see image.MILD), for
      glyphs and digits; 'flip_crop' (horizontal flip, crop after padding size/8), for photographs,
      in the training split only. 'mild' applies to every split, with fixed draws outside training:
      held-out glyphs are as distorted as the training glyphs.
    mean, std: of the normalisation above.
  """
  size: int = 24
  channels: int = 0
  classes: int = 0
  skip_classes: int = 0
  augment: str = 'mild'
  mean: float = 0.0
  std: float = 1.0

  def __post_init__(self):
    check(self.size >= 4, 'data.image.size', self.size, 'at least 4 pixels', 'Try 24.')
    check_choice('data.image.channels', self.channels, (0, 1, 3))
    check(self.classes == 0 or self.classes >= 2, 'data.image.classes', self.classes,
          '0 (all) or at least 2', 'Use 0 for every class of the source.')
    check(self.skip_classes >= 0, 'data.image.skip_classes', self.skip_classes, '0 or more',
          'Use 0 to leave none out.')
    check_choice('data.image.augment', self.augment, AUGMENTS)
    check(self.std > 0, 'data.image.std', self.std, 'above 0', 'Use 1.0 to leave pixels in [0, 1].')


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """T5's span corruption (Raffel et al. 2020, section 3.1.4) of windows of text, or pairs of texts.

  Attributes:
    encoder_length, decoder_length: tokens, eos included. The input of a pair is cut at its end to
      fit; a target that does not fit is an error.
    window: tokens cut from the text per example; 0: as many as fill encoder_length after
      corruption (the t5 library's rule: 127 tokens for 113, 568 for 512). Not read for pairs.
    noise_density: fraction of masked tokens. Not read for pairs.
    mean_span_length: tokens per masked span. Not read for pairs.
    vocabulary: 'bytes' or the path of a SentencePiece model.
  """
  encoder_length: int = 113
  decoder_length: int = 22
  window: int = 0
  noise_density: float = 0.14
  mean_span_length: float = 6.0
  vocabulary: str = 'bytes'

  def __post_init__(self):
    for key in ('encoder_length', 'decoder_length'):
      check(getattr(self, key) >= 4, f'data.text.{key}', getattr(self, key),
            'at least 4 tokens', 'Try 113 and 22.')
    check(self.window == 0 or self.window >= 2, 'data.text.window', self.window,
          '0 (fill encoder_length) or at least 2 tokens', 'Use 0.')
    check(0 < self.noise_density < 1, 'data.text.noise_density', self.noise_density,
          'between 0 and 1, both excluded', 'T5 uses 0.15.')
    check(self.mean_span_length >= 1, 'data.text.mean_span_length', self.mean_span_length,
          'at least 1 token', 'T5 uses 3.0.')


@dataclasses.dataclass(frozen=True)
class TfdsConfig:
  """How a TFDS dataset is read.

  Attributes:
    train, validation, test: which TFDS split is read as which (TFDS slicing syntax, as
      'train[:95%]'): all three, or '' for the rule below.
    input, target: string features that make a text-to-text dataset; '': image and label, or text.

  The rule: `test`, for reporting, is the dataset's own test split if it is labelled, else its own
  validation split. `validation`, for choosing, is the dataset's own if that is still free, else
  the last 5 % of train, which `train` then leaves out.
  """
  train: str = ''
  validation: str = ''
  test: str = ''
  input: str = ''
  target: str = ''

  def __post_init__(self):
    check(bool(self.input) == bool(self.target), 'data.tfds.input and target',
          (self.input, self.target), 'both or none',
          'Name the feature to read and the feature to predict.')
    given = [bool(self.train), bool(self.validation), bool(self.test)]
    check(all(given) or not any(given), 'data.tfds', (self.train, self.validation, self.test),
          'all three of train, validation and test, or none',
          'Name all three, so that no example is in two of them by accident.')

  @property
  def splits(self) -> dict[str, str]:
    """{moejax's split: TFDS split} as given; {} for the rule."""
    given = {key: getattr(self, key) for key in ('train', 'validation', 'test')}
    return given if all(given.values()) else {}


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What a run reads.

  Attributes:
    source: 'glyphs', 'digits', 'stdlib_text', 'stdlib_tasks', 'cmudict'; 'super_glue', its eight
      tasks from TFDS in one mixture; or 'tfds:NAME' ('tfds:cifar10', 'tfds:c4/en').
    batch_size, eval_batch_size: global examples per step; the number of hosts must divide both.
    eval_examples: evaluate the first n of each split's fixed order; 0: the whole split.
    eval_repeats: evaluate each of them this often, with other fixed draws (distortions, windows).
    cache_dir: '': $MOEJAX_CACHE or ~/.cache/moejax.
    data_dir: TFDS data_dir; '': TFDS's own default.
    threads: background threads that make batches ahead of the train step.
    image, text, tfds: see their own classes.
  """
  source: str = 'glyphs'
  batch_size: int = 64
  eval_batch_size: int = 256
  eval_examples: int = 0
  eval_repeats: int = 1
  cache_dir: str = ''
  data_dir: str = ''
  threads: int = 2
  image: ImageConfig = ImageConfig()
  text: TextConfig = TextConfig()
  tfds: TfdsConfig = TfdsConfig()

  @property
  def metric(self) -> str:
    """How decoded outputs are scored, a key of text_scores.METRICS; '' where they are not."""
    if self.source in registry.SOURCES:
      return registry.SOURCES[self.source].metric
    return 'exact_match' if self.tfds.input else ''

  def __post_init__(self):
    registry.check_name(self.source)
    for key in ('batch_size', 'eval_batch_size', 'eval_repeats', 'threads'):
      check(getattr(self, key) >= 1, f'data.{key}', getattr(self, key), 'at least 1', 'Raise it.')
    check(self.eval_examples >= 0, 'data.eval_examples', self.eval_examples,
          '0 (the whole split) or more', 'Use 0.')
