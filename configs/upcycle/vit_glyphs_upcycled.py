"""Upcycles a run of vit_glyphs.py: --config.init.parent=DIR names its workdir.

As in the paper for vision (Komatsuzaki et al. 2023, B.6-B.7): expert choice with C = 2 in the last
half of the blocks, weights renormalised, the optimizer's state carried over. The name of a preset
as argument, such as :switch or :vmoe, replaces the routing.
"""

from configs.common import preset, set_moe
from configs.pretrain import vit_glyphs


def get_config(arg=None):
  name, runlocal = preset(arg)
  config = vit_glyphs.get_config(runlocal)
  config.init.mode = 'upcycle'
  config.init.parent = 'runs/vit_glyphs'
  config.model.moe.layers = 'last_2'
  config.model.moe.num_experts = 8
  config.model.moe.router = 'expert_choice'
  config.model.moe.capacity_factor = config.model.moe.eval_capacity_factor = 2.0
  config.model.moe.renormalize = True
  config.model.moe.group_size = 256   # 16 images of 16 patches
  if name:
    set_moe(config.model.moe, name)
  if not runlocal:
    config.steps = 4_800   # 20 % of the parent's
    config.eval_every = config.checkpoint_every = 800
  return config
