"""T5 v1.1 XL on C4: t5_base.py with 24 + 24 layers, 2.85 billion parameters.

The paper starts from the published checkpoint of this size; this run makes one.
"""

from configs.paper import t5_base


def get_config(arg=None):
  return t5_base.get_config(arg, size='xl')
