"""Backbones: `build(config)` returns the pure functions of a T5 or a ViT, dense or sparse."""

from moejax.models.build import Config, Model, build, examples_per_group

__all__ = ['Config', 'Model', 'build', 'examples_per_group']
