"""Upcycles a run of t5_stdlib.py: --config.init.parent=DIR names its workdir.

As in the paper for language (Komatsuzaki et al. 2023): every second layer sparse, expert choice
with C = 2 in the encoder, top-2 with load-balance loss in the decoder, weights not renormalised,
optimizer state not carried over. The paper's loss weight 0.01 is flaxformer's, whose fractions of
assignments sum to k = 2; here they sum to 1, hence 0.02. The name of a preset as argument, such as
:switch or :mixtral, replaces the routing of both stacks, or of the encoder alone if it is not
causal.
"""

from configs.common import preset, set_moe, t5_stacks
from configs.pretrain import t5_stdlib
from moejax.moe import presets


def get_config(arg=None):
  name, runlocal = preset(arg)
  config = t5_stdlib.get_config(runlocal)
  config.init.mode = 'upcycle'
  config.init.parent = 'runs/t5_stdlib'
  config.init.optimizer = 'reset'
  for moe, length in t5_stacks(config):
    moe.layers = 'every_2'
    moe.num_experts = 8
    moe.capacity_factor = moe.eval_capacity_factor = 2.0
    moe.group_size = 8 * length   # 8 sequences
  config.model.encoder_moe.router = 'expert_choice'
  config.model.decoder_moe.router = 'top_k'
  config.model.decoder_moe.k = 2
  config.model.decoder_moe.balance_weight = 0.02
  if name:
    set_moe(config.model.encoder_moe, name)
    if presets.preset(name).causal:
      set_moe(config.model.decoder_moe, name)
  if not runlocal:
    config.steps = 4_800   # 20 % of the parent's
    config.eval_every = config.checkpoint_every = 800
  return config
