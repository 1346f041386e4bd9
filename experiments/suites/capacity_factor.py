"""How many tokens should an expert take?

Claim (Komatsuzaki et al. 2023, B.2, Fig. 9; B/16 and T5 Base): in vision C=1 and C=5 do worse than
2 to 3 (per compute); in language C=2 is clearly best per compute. Its figures are in plots only.

Per compute: every arm spends the FLOPs of C=2, so C=1 takes more steps and C=3 and 5 fewer.

Refuted if C=1 or the largest C has the lower loss at equal extra FLOPs.
"""

import functools

from experiments import protocol
from experiments.suite import Suite

B2 = 'Komatsuzaki et al. 2023, B.2, Fig. 9'
FACTORS = {'T5': (1.0, 2.0, 3.0), 'ViT': (1.0, 2.0, 3.0, 5.0)}


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    factors = FACTORS[regime.family]
    for pair in regime.pairs(core=True):
      base = pair.upcycled()
      arms.append(pair.arm('dense, FLOPs of C=2', pair.matched_dense(base)))
      for factor in factors:
        run = base if factor == 2.0 else pair.equal_flops(
            base, functools.partial(pair.upcycled, moe={'capacity_factor': factor}))
        arms.append(pair.arm(f'C={factor:g}', run, reference=factor == 2.0,
                             series='upcycled', x=factor))
    for factor in factors:
      if factor != 2.0:
        claims.append(regime.claim(
            f'C=2 beats C={factor:g} at equal extra FLOPs', B2,
            'C=1 and C=5 underperform 2 to 3' if len(regime.stacks) == 1 else 'C=2 clearly best',
            'C=2', '<', f'C={factor:g}'))
  return Suite('capacity_factor', scale, tuple(arms), tuple(claims), plot='sweep',
               x_label='capacity factor C')
