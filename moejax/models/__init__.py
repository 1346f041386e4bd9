"""Backbones: `build(config)` returns the pure functions of a T5 or a ViT, dense or sparse.

Reading order: t5.py or vit.py (config and module), blocks.py (block, stack), scan.py (how a stack
is executed), attention.py, layers.py, build.py (module -> pure functions).
"""

from moejax.models.build import Config, Model, build, examples_per_group

__all__ = ['Config', 'Model', 'build', 'examples_per_group']
