"""Batches from every source of examples: step n's batch is a function of (config, seed, n).

Reading order: source.py (what a source provides), registry.py (their names), one of datasets/,
text.py, text_pairs.py or image.py (examples to batches), pipeline.py (order, batches, hosts).
"""

from moejax.data.config import DataConfig, ImageConfig, TextConfig, TfdsConfig
from moejax.data.pipeline import Dataset, build

__all__ = ['DataConfig', 'Dataset', 'ImageConfig', 'TextConfig', 'TfdsConfig', 'build']
