"""Upcycles a run of vit_b16.py: --config.init.parent=DIR names its workdir.

From the paper: 32 experts in the last six of the twelve blocks (B.4's best, with five), copies of
the MLP; expert choice with C = 2; weights renormalised (B.7) and the optimizer's state carried over
(B.6); half as many steps again as the parent's (B.1: 7 epochs after 14). A group is the tokens of
one image, as in the same research group's published Soft MoE config; we do not know the paper's.
Groups this small are dispatched by one-hot matmuls, which cost a TPU less than gathers (6 % of the
FLOPs of the experts at 196 tokens). The name of a preset as argument replaces the routing; a word
of configs.paper.ABLATIONS changes what the paper varies.
"""

from configs.common import preset, set_moe
from configs.paper import ABLATIONS, place, shrink_vit, vary, vit_b16


def get_config(arg=None, size='B/16', layers='last_6'):
  name, runlocal = preset(arg, *ABLATIONS)
  config = vit_b16.get_config(size=size)
  config.steps = 56_000
  config.eval_every = config.checkpoint_every = 2_800
  config.init.mode = 'upcycle'
  config.init.parent = f'runs/{vit_b16.short_name(size)}'
  config.model.moe.layers = layers
  config.model.moe.num_experts = 32
  set_moe(config.model.moe, name or 'sparse_upcycling')
  if not name:
    config.model.moe.renormalize = True
  if config.model.moe.dispatch == 'gather':
    config.model.moe.dispatch = 'einsum'
  vary(config.model.moe, arg)
  place(config, vit_b16.short_name(size), experts=config.model.moe.num_experts)
  if runlocal:
    shrink_vit(config)
  return config
