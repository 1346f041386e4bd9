"""How many experts?

Claims (Komatsuzaki et al. 2023, B.3, Fig. 10-11; B/16, 6 MoE layers): from 2 to 128 experts more is
better upstream, at the same cost per step; with very many the initial drop grows (see the suite
initial_drop). The figures are in plots only.

Refuted if a step up in the number of experts raises the final loss.
"""

from experiments import protocol
from experiments.suite import Suite

B3 = 'Komatsuzaki et al. 2023, B.3, Fig. 10'
COUNTS = {'T5': (2, 8, 32), 'ViT': (2, 8, 32, 64)}


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    counts = COUNTS[regime.family]
    for pair in regime.pairs(core=True):
      up = pair.upcycled()
      arms += [pair.arm('dense, equal steps', pair.dense()),
               pair.arm(f'dense, FLOPs of E={regime.experts}', pair.matched_dense(up))]
      arms += [pair.arm(f'E={n}', pair.upcycled(moe={'num_experts': n}), series='upcycled', x=n,
                        reference=n == regime.experts) for n in counts]
    claims += [regime.claim(f'{more} experts beat {fewer}', B3, 'more is better, 2 to 128',
                            f'E={more}', '<', f'E={fewer}')
               for fewer, more in zip(counts, counts[1:])]
  return Suite('num_experts', scale, tuple(arms), tuple(claims), plot='sweep',
               x_label='experts E')
