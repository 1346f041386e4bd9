"""Few large experts or many small ones, at the same cost?

Claim (He et al. 2024, 2410.07524; Nemotron 15B, 1T tokens): upcycled into 64 experts of an eighth
of the MLP, 8 chosen (E8G8T8, by virtual groups with scaled weights) the loss is 1.320 at the cost
of the dense model (1.377); into 8 whole experts, 2 chosen, 1.306 at a higher cost. At equal
granularity-independent cost finer experts were better, 64 better than 8.

Here the number of experts times G and the slots per token times G, so FLOPs stay the same: top-2 of
8, top-4 of 16 halves, top-8 of 32 quarters, in both stacks, with the paper's scaling of all
matrices.

Refuted if whole experts have the lower loss.
"""

from experiments import protocol
from experiments.suite import Suite

SOURCE = 'He et al. 2024 (2410.07524)'
TOP = {'router': 'top_k', 'balance_weight': 0.02}


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.text(scale), []
  for pair in regime.pairs():
    up = pair.upcycled()
    arms += [pair.arm('dense, equal FLOPs', pair.matched_dense(up)), pair.arm('expert choice', up)]
    for G in (1, 2, 4):
      moe = {**TOP, 'granularity': G, 'num_experts': 8 * G, 'k': 2 * G, 'capacity_factor': 2.0 * G}
      run = pair.upcycled(moe=moe, init={'scaling': 'all'})
      arms.append(pair.arm(f'top-{2 * G} of {8 * G}, G={G}', run, reference=G == 1,
                           series='top-k', x=G))
  claims = (
      regime.claim('halves of experts beat whole ones at equal cost', SOURCE, '64 better than 8',
                   'top-4 of 16, G=2', '<', 'top-2 of 8, G=1'),
      regime.claim('quarters of experts beat whole ones at equal cost', SOURCE, '64 better than 8',
                   'top-8 of 32, G=4', '<', 'top-2 of 8, G=1'),
  )
  return Suite('granularity', scale, tuple(arms), claims, plot='points')
