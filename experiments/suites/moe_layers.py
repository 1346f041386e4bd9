"""How many layers should become sparse, and which?

Claim (Komatsuzaki et al. 2023, B.4, Fig. 12; B/16, C=1, E=32): of Last-1 to Last-11, Last-5 and
Last-6 of the 12 blocks (40 to 50 %) are best; a sparse first block is "problematic".

On glyphs the ViT has 4 blocks: Last-2 is a half. Equal extra steps, as there: more sparse layers
cost more.

Refuted if Last-1 or all four beat Last-2 (by their loss), or if a sparse first block does no harm.
"""

from experiments import protocol
from experiments.suite import Suite

B4 = 'Komatsuzaki et al. 2023, B.4, Fig. 12'


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.vision(scale), []
  depth = regime.depth
  half, few, most = depth // 2, depth // 4, depth - 1
  layers = {f'last {few}': f'last_{few}', f'last {most}': f'last_{most}',
            f'all {depth}': f'last_{depth}',
            f'first {half}': ','.join(map(str, range(half))), 'every 2nd': 'every_2'}
  last = f'last {half}'   # the configs' own
  for pair in regime.pairs():
    up = pair.upcycled()
    arms += [pair.arm('dense, equal steps', pair.dense()),
             pair.arm(f'dense, FLOPs of {last}', pair.matched_dense(up)),
             pair.arm(last, up, reference=True)]
    arms += [pair.arm(name, pair.upcycled(moe={'layers': which}))
             for name, which in layers.items()]
  claims = (
      regime.claim('half of the layers beat fewer', B4, 'best are 5 and 6 of 12',
                   last, '<', f'last {few}'),
      regime.claim('half of the layers beat all of them', B4, 'best are 5 and 6 of 12',
                   last, '<', f'all {depth}'),
      regime.claim('all but the first block beat all of them', B4, 'the first is problematic',
                   f'last {most}', '<', f'all {depth}'),
      regime.claim('the last half beats the first half', B4, 'the first is problematic',
                   last, '<', f'first {half}'),
  )
  return Suite('moe_layers', scale, tuple(arms), claims, plot='points')
