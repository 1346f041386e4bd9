"""How many layers should become sparse, and which?

Claim (Komatsuzaki et al. 2023, B.4, Fig. 12; B/16, C=1, E=32): of Last-1 to Last-11, Last-5 and
Last-6 of the 12 blocks (40 to 50 %) are best; a sparse first block is "problematic".

Ours has 4 blocks: Last-2 is a half. Equal extra steps, as there: more sparse layers cost more.

Refuted if Last-1 or all four beat Last-2 (by their loss), or if a sparse first block does no harm.
"""

from experiments import protocol
from experiments.suite import Suite

B4 = 'Komatsuzaki et al. 2023, B.4, Fig. 12'
LAYERS = {'last 1': 'last_1', 'last 3': 'last_3', 'all 4': 'last_4', 'first 2': '0,1',
          'every 2nd': 'every_2'}


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.vision(scale), []
  for pair in regime.pairs():
    up = pair.upcycled()
    arms += [pair.arm('dense, equal steps', pair.dense()),
             pair.arm('dense, equal FLOPs', pair.paying(up)),
             pair.arm('last 2', up, reference=True)]
    arms += [pair.arm(name, pair.upcycled(moe={'layers': layers}))
             for name, layers in LAYERS.items()]
  claims = (
      regime.claim('half of the layers beat fewer', B4, 'best are 5 and 6 of 12',
                   'last 2', '<', 'last 1'),
      regime.claim('half of the layers beat all of them', B4, 'best are 5 and 6 of 12',
                   'last 2', '<', 'all 4'),
      regime.claim('all but the first block beat all of them', B4, 'the first is problematic',
                   'last 3', '<', 'all 4'),
      regime.claim('the last two beat the first two', B4, 'the first is problematic',
                   'last 2', '<', 'first 2'),
  )
  return Suite('moe_layers', scale, tuple(arms), claims, plot='points')
