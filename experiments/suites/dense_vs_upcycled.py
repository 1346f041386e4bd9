"""Dense continuation or sparse upcycling: what does the same extra budget bring?

Claim (Komatsuzaki et al. 2023, section 4.1, Fig. 2): for a little extra compute the two are equal;
with more, upcycling pulls ahead of training the dense model on, in vision and in language. The
figures are in plots only; second-hand, ViT-B/16 gains 1 % of ImageNet 10-shot by 58 % extra dense
training or by 13 % of upcycled. This is the gate of all other suites: an equal-cost comparison, at
one budget; `extra_budget` has another.

Refuted if, over the pairs, dense continuation at equal extra FLOPs has the lower loss. At equal
steps the sparse model spends more FLOPs, so that comparison alone would show little.
"""

from experiments import protocol
from experiments.suite import Suite

FIG2 = 'Komatsuzaki et al. 2023, Fig. 2'


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs(core=True):
      up = pair.upcycled()
      arms += [
          pair.arm('dense parent, cooled', pair.parent),
          pair.arm('dense, equal steps', pair.dense()),
          pair.arm('dense, equal FLOPs', pair.matched_dense(up), reference=True),
          pair.arm('upcycled', up),
          pair.arm('MoE from scratch', pair.scratch()),
      ]
    claims += [
        regime.claim('upcycled beats dense continuation at equal extra FLOPs', FIG2,
                     'ahead, but for the smallest budgets; no figures',
                     'upcycled', '<', 'dense, equal FLOPs'),
        regime.claim('upcycled beats dense continuation at equal extra steps', FIG2,
                     'no figures', 'upcycled', '<', 'dense, equal steps'),
        regime.claim('upcycled beats the same MoE from scratch at equal extra steps',
                     'Komatsuzaki et al. 2023, Fig. 4', 'no figures; far ahead at 20 %',
                     'upcycled', '<', 'MoE from scratch'),
    ]
  vision = protocol.vision(scale)
  if vision.metric != 'test/loss':   # glyphs' test is a family of its own
    claims.append(vision.claim('... on a font family never trained on', FIG2, 'not measured there',
                               'upcycled', '<', 'dense, equal FLOPs', metric='test/loss'))
  return Suite('dense_vs_upcycled', scale, tuple(arms), tuple(claims))
