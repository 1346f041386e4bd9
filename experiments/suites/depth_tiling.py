"""Sparse upcycling or a deeper dense model: which way to grow a trained model?

Claim (Komatsuzaki et al. 2023, Fig. 5; T5 Base): a dense model made deeper by repeating the trained
blocks (Rae et al. 2021) gains quickly over its parent, but stays below sparse upcycling. Their
depth and size are not known here; ours doubles the depth, at which one step costs nearly twice the
parent's, so it takes as many steps as upcycling's FLOPs pay for.

Refuted if the tiled model has the lower loss at equal extra FLOPs.
"""

from experiments import protocol
from experiments.suite import Suite

FIG5 = 'Komatsuzaki et al. 2023, Fig. 5'
TILINGS = {'T5': ('stack',), 'ViT': ('stack', 'layer')}   # the whole stack again, or each layer


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs(core=True):
      up = pair.upcycled()
      arms += [
          pair.arm('dense parent, cooled', pair.parent),
          pair.arm('dense, equal FLOPs', pair.matched_dense(up), reference=True),
          pair.arm('upcycled', up),
          *(pair.arm(f'depth tiled, {tiling}', pair.tiled(up, tiling))
            for tiling in TILINGS[regime.family]),
      ]
    for tiling in TILINGS[regime.family]:
      claims.append(regime.claim(
          f'upcycled beats a depth-tiled dense model (each {tiling} repeated)', FIG5,
          'no figures', 'upcycled', '<', f'depth tiled, {tiling}'))
    claims.append(regime.claim('a depth-tiled model improves on its parent', FIG5, 'no figures',
                               'depth tiled, stack', '<', 'dense parent, cooled'))
  return Suite('depth_tiling', scale, tuple(arms), tuple(claims))
