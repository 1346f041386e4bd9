"""Upcycles a run of t5_base.py: --config.init.parent=DIR names its workdir.

From the paper: every second layer of both stacks sparse, 32 experts, copies of the MLP; expert
choice with C = 2 in the encoder, top-2 with load-balance loss in the decoder; weights not
renormalised; optimizer state not carried over; rate, batch and data as in the parent. From
flaxformer: loss weight 0.01, which is 0.02 here (its fractions of assignments sum to k), groups of
about 4,096 tokens, and routers of standard deviation 0.02. (t5x divides the sum of all layers'
losses by all sparse layers, also those of the encoder, whose loss is 0 and which are half of them;
so its 0.01 is 0.01 here: set --config.model.decoder_moe.balance_weight for that.) Our choices: 8
sequences are a group in the decoder too, and 200,000 steps, as in the paper's Fig. 6. The name of a
preset as argument replaces the routing, as in t5_stdlib_upcycled.py; a word of
configs.paper.ABLATIONS changes what the paper varies.
"""

from configs.common import preset, set_moe, t5_stacks
from configs.paper import ABLATIONS, place, shrink_t5, t5_base, vary
from moejax.moe import presets


def get_config(arg=None, size='base'):
  name, runlocal = preset(arg, *ABLATIONS)
  config = t5_base.get_config(size=size)
  config.steps = 200_000
  config.init.mode = 'upcycle'
  config.init.parent = f'runs/t5_{size}'
  config.init.optimizer = 'reset'
  for moe, length in t5_stacks(config):
    moe.layers = 'every_2'
    moe.num_experts = 32
    moe.group_size = 8 * length
  set_moe(config.model.encoder_moe, name or 'sparse_upcycling')
  causal = name and presets.preset(name).causal
  set_moe(config.model.decoder_moe, name if causal else 'sparse_upcycling_decoder')
  for moe, _ in t5_stacks(config):
    vary(moe, arg)
  place(config, f't5_{size}', experts=config.model.encoder_moe.num_experts)
  if runlocal:
    shrink_t5(config, 'stdlib_text', 114, 32)
  return config
