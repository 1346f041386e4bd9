"""Upcycles a run of t5_xl.py as t5_base_upcycled.py does: 12 of 24 layers a stack."""

from configs.paper import t5_base_upcycled


def get_config(arg=None):
  return t5_base_upcycled.get_config(arg, size='xl')
