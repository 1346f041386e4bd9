"""Does drawing a part of each expert's hidden units anew help?

Claim (Nakamura et al. 2025, Drop-Upcycling, 2502.19261): re-initialising a fraction r of each
expert's hidden units, r = 0.5 best, beats naive copies in the long run (8x152M to 8x3.7B, up to
500B tokens); at the start it is behind. Ours shares one set of units among an expert's matrices.

Ours are short continuations, so this may come out against it here: refuted at this scale if copies
have the lower loss.
"""

from experiments import protocol
from experiments.suite import Suite

SOURCE = 'Nakamura et al. 2025, Drop-Upcycling'


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.text(scale), []
  for pair in regime.pairs():
    up = pair.upcycled()
    arms += [pair.arm('dense, equal FLOPs', pair.matched_dense(up)),
             pair.arm('copies (r=0)', up, reference=True)]
    arms += [pair.arm(f'r={r:g}', pair.upcycled(
        init={'experts': 'drop', 'reinit_fraction': r})) for r in (0.5, 1.0)]
  claims = (
      regime.claim('half of the units drawn anew beat copies', SOURCE, 'best of all r',
                   'r=0.5', '<', 'copies (r=0)'),
      regime.claim('half of the units drawn anew beat all of them', SOURCE, 'r=0.5 best',
                   'r=0.5', '<', 'r=1'),
  )
  return Suite('drop_upcycling', scale, tuple(arms), claims, plot='points')
