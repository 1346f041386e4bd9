"""Batches: every source of examples, and the pipeline that makes step n's batch a function of n."""

from moejax.data.pipeline import Dataset, build, throughput
from moejax.data.settings import DataConfig, ImageConfig, TextConfig, TfdsConfig

__all__ = ['DataConfig', 'Dataset', 'ImageConfig', 'TextConfig', 'TfdsConfig', 'build',
           'throughput']
