"""Names to sources, and to what turns their examples into batches."""

from collections.abc import Callable

from moejax.config import check
from moejax.data.config import NAMED, DataConfig
from moejax.data.datasets import cmudict, embedded, stdlib_tasks, superglue, tfds
from moejax.data.image import ImageProcessor
from moejax.data.source import Source
from moejax.data.text import TextProcessor
from moejax.data.text_pairs import PairProcessor, PairTable

# A new source is a function (config, window_bytes) -> Source, here and in settings.NAMED.
REGISTRY: dict[str, Callable[[DataConfig, int], Source]] = {
    'glyphs': embedded.glyphs, 'digits': embedded.digits, 'stdlib_text': embedded.stdlib_text,
    'stdlib_tasks': stdlib_tasks.stdlib_tasks, 'cmudict': cmudict.cmudict,
    'super_glue': superglue.super_glue}
TEXT_SOURCES = ('stdlib_text',)

Processor = ImageProcessor | TextProcessor | PairProcessor


def build(config: DataConfig) -> tuple[Source, Processor]:
  """The source that config.source names, and what turns its examples into batches."""
  if config.source in REGISTRY:
    text = TextProcessor(config.text) if config.source in TEXT_SOURCES else None
    source = REGISTRY[config.source](config, text.window_bytes if text else 0)
  else:
    check(config.source.startswith('tfds:'), 'data.source', config.source,
          f'{", ".join(NAMED)} or tfds:NAME', 'Choose one of these.')
    source = tfds.tfds_source(config)
    text = TextProcessor(config.text) if source.kind == 'seq2seq' and not source.pairs else None
  if source.pairs:
    return source, _pair_processor(config, source)
  return source, text or ImageProcessor(config.image, source.channels, source.same_shape)


def _pair_processor(config: DataConfig, source: Source) -> PairProcessor:
  """The processor, once the targets fit: all those in memory, of others the ones of the digest."""
  processor = PairProcessor(config.text)
  targets: set[bytes] = set()
  for examples in source.splits.values():
    targets |= (examples.targets if isinstance(examples, PairTable)
                else {examples[i]['target'] for i in tfds.sampled(examples)})
  # The longest in bytes first, so that the length asked for is (for bytes) enough for all.
  for target in sorted(targets, key=lambda t: (-len(t), t)):
    processor.check_target(target)
  return processor
