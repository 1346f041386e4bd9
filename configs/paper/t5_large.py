"""T5 v1.1 Large on C4: t5_base.py with 24 + 24 layers, 783 million parameters.

The paper starts from the published checkpoint of this size; this run makes one.
"""

from configs.paper import t5_base


def get_config(arg=None):
  return t5_base.get_config(arg, size='large')
