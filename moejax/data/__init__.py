"""Batches: every source of examples, and the pipeline that makes step n's batch a function of n."""

from moejax.data.config import DataConfig, ImageConfig, TextConfig, TfdsConfig
from moejax.data.pipeline import Dataset, build, throughput

__all__ = ['DataConfig', 'Dataset', 'ImageConfig', 'TextConfig', 'TfdsConfig', 'build',
           'throughput']
