"""Should deep layers have more experts than shallow ones?

Suggestion (Lo et al. 2024, "A Closer Look into Mixture-of-Experts in Large Language Models",
2406.18219): experts' outputs grow less alike with depth and more alike again in the last layer, so
give more experts to deep layers and fewer to the last. It is a suggestion there, not a result;
their own experiment is about which one layer should stay dense.

The last four blocks sparse (of 4 in the ViT on glyphs), 64 experts in all (so the same parameters;
the cost per step is the same whatever E). Refuted if an even allocation has the lower loss.
"""

from experiments import protocol
from experiments.suite import Suite

SOURCE = 'Lo et al. 2024 (2406.18219)'
ARMS = {'even: 16 16 16 16': (16, 16, 16, 16), 'deep: 4 12 20 28': (4, 12, 20, 28),
        'deep, last few: 8 16 32 8': (8, 16, 32, 8), 'shallow: 28 20 12 4': (28, 20, 12, 4)}


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.vision(scale), []
  even, deep, last, shallow = ARMS
  for pair in regime.pairs():
    arms.append(pair.arm(f'dense, FLOPs of {regime.depth // 2} sparse blocks',
                         pair.matched_dense(pair.upcycled())))
    for name, counts in ARMS.items():
      moe = {'layers': 'last_4', 'experts_per_layer': counts}
      arms.append(pair.arm(name, pair.upcycled(moe=moe), reference=name == even))
  claims = (
      regime.claim('more experts in deep layers, fewer in the last, beat an even share', SOURCE,
                   'a suggestion, not measured', last, '<', even),
      regime.claim('more experts in deep layers beat an even share', SOURCE,
                   'a suggestion, not measured', deep, '<', even),
      regime.claim('more experts in deep layers beat more in shallow ones', SOURCE,
                   'a suggestion, not measured', deep, '<', shallow),
  )
  return Suite('expert_allocation', scale, tuple(arms), claims, plot='points')
