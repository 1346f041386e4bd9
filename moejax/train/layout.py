"""Single blocks, as checkpoints and surgery have them, made into stacked ones, and back."""

import functools

import jax
import jax.numpy as jnp

from moejax import trees
from moejax.trees import stacking


class Layout:
  """Stacks and unstacks trees of parameters and optimizer slots on their devices.

  Args:
    model: models.Model, whose `param_paths` says what is stacked.
    devices: of train.parallel.
  """

  def __init__(self, model, devices):
    self.param_paths, self.devices = model.param_paths, devices

  def shapes(self, tree: dict) -> dict:
    """Tree of shapes with single blocks -> that of the stacked ones, with their shardings."""
    def join(path, leaves):
      return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype)
    stacked = stacking.stack(jax.tree.map(lambda x: x, tree), self.param_paths, join)
    return jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
                        stacked, self.devices.shardings(stacked))

  def stack(self, tree: dict) -> dict:
    """Arrays of single blocks -> stacked ones. The tree is emptied: beside the result there is
    never more than one leaf's blocks."""
    shardings = trees.flatten(jax.tree.map(lambda s: s.sharding, self.shapes(tree)))
    return stacking.stack(tree, self.param_paths,
                          lambda path, leaves: _join(shardings[path])(leaves))

  def unstack(self, tree: dict) -> dict:
    """Stacked arrays -> those of single blocks, beside the ones given, on the devices where these
    are: what a step of pmap returns is on this process's alone."""
    parts = stacking.unstack(tree, lambda path, leaf: [
        jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)] * leaf.shape[0])
    shardings = trees.flatten(self.devices.shardings(parts))
    def split(path, leaf):
      wanted = tuple(shardings[member] for member in stacking.members(path))
      return _split(wanted if wanted[0].device_set == leaf.sharding.device_set else None)(leaf)
    return stacking.unstack(tree, split)


@functools.cache
def _join(sharding):
  return jax.jit(jnp.stack, out_shardings=sharding)


@functools.cache
def _split(shardings):
  return jax.jit(list, out_shardings=list(shardings)) if shardings else jax.jit(list)
