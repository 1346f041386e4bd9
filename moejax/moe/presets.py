"""MoE settings as published: each function gives the MoEConfig of one line of work.

A preset says what a paper says about routing, balancing and experts; where a source is silent or
was not read, the docstring says "our choice". Model sizes are not part of it. Any field can be
replaced, as in `presets.switch(num_experts=16)`; config files take a preset's name as argument:
`--config=configs/upcycle/t5_stdlib_upcycled.py:switch`.

Three conventions differ between sources, and presets convert:
- capacity_factor counts slots per expert over S / E, without k (vmoe multiplies by k);
- the balance loss is 1 when balanced, whatever k (flaxformer's and Hugging Face's is k, GShard's
  1 / E^2 with its own constants);
- flaxformer's floor of 4 slots per expert is min_capacity=4.
"""

import dataclasses

from moejax.config import check_choice
from moejax.moe.config import MoEConfig


def sparsely_gated(**changes) -> MoEConfig:
  """The sparsely-gated layer (Shazeer et al. 2017, "Outrageously large neural networks").

  H(x) = x W_g + N(0, 1) softplus(x W_noise), softmax over the k largest; W_g and W_noise start at
  0; importance and load losses with weight 0.1 each (language modelling), sections 2.1, 4 and
  appendix A. k = 4, no capacity: dropless here. Recalled from the paper, not checked against its
  text. Our choice: E = 32 (the paper goes from 4 to 131072), every second block.
  """
  return _preset(changes, router='top_k', num_experts=32, layers='every_2', k=4,
                 score='softmax_of_chosen', learned_noise=True, router_init_std=0.0,
                 importance_weight=0.1, load_weight=0.1, dispatch='grouped')


def gshard(**changes) -> MoEConfig:
  """GShard (Lepikhin et al. 2020, section 2.2 and algorithm 1).

  Top-2 with renormalised weights; the second expert is used with probability 2 * g2; experts in
  every other block; capacity 2 * S / E; load-balance loss on first choices. Recalled from the
  paper, not checked against its text. Our choices: loss weight 0.01, E = 32 (the paper: 128 to
  2048), the second expert is always used in evaluation. vmoe notes that lingvo multiplies the loss
  by E^2, as ours does, which the paper does not mention.
  """
  return _preset(changes, router='top_k', num_experts=32, layers='every_2', k=2, renormalize=True,
                 second_threshold=0.5, balance_weight=0.01, balance_counts='first',
                 capacity_factor=2.0, eval_capacity_factor=2.0)


def switch(**changes) -> MoEConfig:
  """Switch Transformer (Fedus et al. 2021, section 2; public configs).

  Top-1, weight = the probability; loss weight 1e-2 (eq. 4-6); capacity factor 1.25, in evaluation
  2.0; input jitter 1e-2; every other block; the experts' dropout 0.4 is for fine-tuning (table 4)
  and not set here. Floor of 4 slots as in flaxformer. E = 128 in Switch-Base. Its router
  initialisation, a truncated normal of variance 0.1 / D, is N(0, 0.02^2) here (equal at D = 250).
  """
  return _preset(changes, router='top_k', num_experts=128, layers='every_2', k=1,
                 balance_weight=0.01, jitter=0.01, capacity_factor=1.25, eval_capacity_factor=2.0,
                 min_capacity=4)


def glam(**changes) -> MoEConfig:
  """GLaM (Du et al. 2022): 64 experts, top-2, every other block, gating as GShard's.

  Recalled from the paper, not checked against its text. Our choices: loss weight 0.01, capacity
  factor 2, the second expert always used.
  """
  return _preset(changes, router='top_k', num_experts=64, layers='every_2', k=2, renormalize=True,
                 balance_weight=0.01, balance_counts='first', capacity_factor=2.0,
                 eval_capacity_factor=2.0)


def vmoe(**changes) -> MoEConfig:
  """V-MoE (Riquelme et al. 2021; public configs).

  softmax of noisy logits, then top-2, not renormalised; noise N(0, 1 / E^2); importance and load
  losses with weight 0.005 each; capacity factor 1.05 for each of the k choices, hence 2.1 here (8
  in evaluation stands for the 4 of the S/32 ImageNet-1k config); E = 8, the last two of the odd
  blocks in the small models: our choice 'every_2'. Batch priority is off while training; set
  batch_priority=True to evaluate with little capacity. vmoe rounds capacity up to a multiple of 4;
  here it is rounded. Its group of 8 images is group_size = 8 * tokens per image.
  """
  return _preset(changes, router='top_k', num_experts=8, layers='every_2', k=2, noise_std=1.0,
                 importance_weight=0.005, load_weight=0.005, capacity_factor=2.1,
                 eval_capacity_factor=8.0)


def st_moe(**changes) -> MoEConfig:
  """ST-MoE (Zoph et al. 2022).

  Top-2 renormalised over the two, the second used with probability min(1, g2 / 0.2) (the rule of
  its code, Mesh TensorFlow's; a second-hand account has g2 / g1 > 0.2 instead); balance loss
  1e-2 and z-loss 1e-3 (eq. 5-6); capacity factor 1.25 while training, 2.0 in evaluation; every 4th
  block; E = 32 (ST-MoE-L). The balance weight is flaxformer's 0.01, whose fractions sum to k = 2,
  hence 0.02. Not built: the dense MLP and multiplicative bias beside each MoE block. Our choice:
  the second expert is always used in evaluation.
  """
  return _preset(changes, router='top_k', num_experts=32, layers='every_4', k=2, renormalize=True,
                 second_threshold=0.2, balance_weight=0.02, z_weight=1e-3, capacity_factor=1.25,
                 eval_capacity_factor=2.0, min_capacity=4)


def expert_choice(**changes) -> MoEConfig:
  """Expert choice (Zhou et al. 2022, eq. 1-2): softmax over experts, then each one's top tokens.

  Capacity factor 2. No auxiliary loss. Encoders and ViT only. E = 64 in the 8B model; every other
  block.
  """
  return _preset(changes, router='expert_choice', num_experts=64, layers='every_2',
                 capacity_factor=2.0, eval_capacity_factor=2.0)


def sparse_upcycling(**changes) -> MoEConfig:
  """Sparse upcycling's encoder and ViT (Komatsuzaki et al. 2023): expert choice, E = 32.

  Capacity factor 2. Half of the MLPs; router N(0, 0.02). Its ViTs renormalise the weights (B.7),
  its language models do not: set renormalize. Its T5 decoder is `sparse_upcycling_decoder`.
  """
  return _preset(changes, router='expert_choice', num_experts=32, layers='every_2',
                 capacity_factor=2.0, eval_capacity_factor=2.0, router_init_std=0.02)


def sparse_upcycling_decoder(**changes) -> MoEConfig:
  """Sparse upcycling's T5 decoder (Komatsuzaki et al. 2023): top-2, E = 32, capacity factor 2.

  Loss weight 0.01 of flaxformer, whose fractions sum to k = 2: 0.02 here. Floor of 4 slots.
  """
  return _preset(changes, router='top_k', num_experts=32, layers='every_2', k=2,
                 balance_weight=0.02, capacity_factor=2.0, eval_capacity_factor=2.0,
                 min_capacity=4, router_init_std=0.02)


def deepseek_moe(**changes) -> MoEConfig:
  """DeepSeekMoE (Dai et al. 2024), the 16B model's figures.

  64 routed experts a quarter of an MLP wide, top-6 by softmax, weights not renormalised; 2 shared
  experts; expert-level balance loss 0.001 (recalled); every block but the first: list them, e.g.
  layers='1,2,3' (here: 'every_1', our choice). The device-level loss is not built. Dropless.

  Upcycled from a dense model it begins far from it. A token's weights, of a softmax over N experts,
  sum to 6 / N at first, and four experts make up one MLP, so that the routed ones give 6 / (4 N) of
  the MLP's output: 0.19 of it with 8 experts, 0.02 with 64. (The shared ones add half of its hidden
  units.) init.scaling, which would undo this, is refused: it needs a k that is a multiple of 4, so
  that no token meets some quarters of the MLP without the others. Set k to 4 or 8 for it.
  """
  return _preset(changes, router='top_k', num_experts=64, layers='every_1', granularity=4, k=6,
                 shared_experts=2, balance_weight=0.001, dispatch='grouped')


def deepseek_v3(**changes) -> MoEConfig:
  """DeepSeek-V3's routing (Wang et al. 2024, loss-free balancing; figures from public configs).

  Sigmoid scores, top-8, weights renormalised and times 2.5, 1 shared expert, bias balancing; 256
  routed experts. bias_rate 1e-3 is Megatron's default. Our choices: granularity 4, 'every_1'; its
  groups of experts by node are not built. Upcycled from a dense model, its routed experts begin at
  2.5 / 4 of the MLP's output, or with init.scaling='output' at all of it.
  """
  return _preset(changes, router='top_k', num_experts=256, layers='every_1', granularity=4, k=8,
                 score='sigmoid', renormalize=True, weight_scale=2.5, shared_experts=1,
                 bias_rate=1e-3, dispatch='grouped')


def mixtral(**changes) -> MoEConfig:
  """Mixtral 8x7B (Jiang et al. 2024): 8 experts in every block, softmax over the 2 largest logits.

  Dropless. Our choice: balance weight 0.02, as in a public 8x152M config of the same code, whose
  fractions sum to k = 2: 0.04 here.
  """
  return _preset(changes, router='top_k', num_experts=8, layers='every_1', k=2,
                 score='softmax_of_chosen', balance_weight=0.04, dispatch='grouped')


def grok(**changes) -> MoEConfig:
  """Grok-1 (public code): 8 experts in every block, softmax over all, then top-2 as they are.

  Dropless. Its public config's loss weight 0.001, whose fractions sum to k = 2: 0.002 here.
  """
  return _preset(changes, router='top_k', num_experts=8, layers='every_1', k=2,
                 balance_weight=0.002, dispatch='grouped')


def top_p(**changes) -> MoEConfig:
  """Dynamic number of experts (Huang et al. 2024): probability p = 0.4, entropy loss 1e-4.

  Recalled from the paper, not checked against its text. Our choices: E = 16, at most 8 experts per
  token, balance weight 0.01.
  """
  return _preset(changes, router='top_p', num_experts=16, layers='every_1', k=8, p=0.4,
                 entropy_weight=1e-4, balance_weight=0.01, dispatch='grouped')


def norm(**changes) -> MoEConfig:
  """Norm-based routing, a suggestion of Lo et al. 2024 ("A closer look into MoE"), section 5.

  The two experts whose outputs are largest. Runs every expert on every token, and has no router to
  learn. Our choices: weights are the chosen experts' shares of the norms, renormalised; E = 8.
  Upcycled experts that are exact copies tie, and the first two win: start them apart
  (init.experts='noise' or 'drop').
  """
  return _preset(changes, router='norm', num_experts=8, layers='every_2', k=2, renormalize=True)


BY_NAME = {f.__name__: f for f in (
    sparsely_gated, gshard, switch, glam, vmoe, st_moe, expert_choice, sparse_upcycling,
    sparse_upcycling_decoder, deepseek_moe, deepseek_v3, mixtral, grok, top_p, norm)}


def preset(name: str, **changes) -> MoEConfig:
  """The MoEConfig of a named preset, fields replaced. ConfigError names the presets there are."""
  check_choice('moe preset', name, BY_NAME)
  return BY_NAME[name](**changes)


def _preset(changes: dict, **published) -> MoEConfig:
  unknown = set(changes) - {f.name for f in dataclasses.fields(MoEConfig)}
  if unknown:
    check_choice('moe field', min(unknown), [f.name for f in dataclasses.fields(MoEConfig)])
  return MoEConfig(**(published | changes))
