"""Writes tiny TFDS datasets as array_record files, without TensorFlow."""

import pathlib
from collections.abc import Iterable, Mapping

import tensorflow_datasets as tfds


def prepare(folder: pathlib.Path, dataset: str, features: dict, splits: Mapping[str, Iterable],
            configuration: str = '') -> None:
  """Prepares a dataset below folder, as its own builder would; moejax reads it without a builder.

  Args:
    folder: TFDS data_dir.
    dataset: its name.
    features: of an example, as tfds.features.
    splits: {name: examples}.
    configuration: name of the builder's configuration; '': none.
  """
  with tfds.core.registered.skip_registration():
    class Builder(tfds.core.GeneratorBasedBuilder):
      name = dataset
      VERSION = tfds.core.Version('1.0.0')
      BUILDER_CONFIGS = ([tfds.core.BuilderConfig(name=configuration, version='1.0.0')]
                         if configuration else [])
      code_path = None   # TFDS would look for checksums of downloads beside this file

      def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(examples) for split, examples in splits.items()}

      def _generate_examples(self, examples):
        yield from enumerate(examples)

  Builder(config=configuration or None, data_dir=str(folder),
          file_format='array_record').download_and_prepare()
