"""Upcycles a run of vit_b32.py as vit_b16_upcycled.py does: the last half of the blocks."""

from configs.paper import vit_b16_upcycled


def get_config(arg=None):
  return vit_b16_upcycled.get_config(arg, size='B/32', layers='last_6')
