"""Where a claim of the paper was not reproduced: is our explanation right?

Each claim here was made after the verdict it explains, and before the runs that test it.

One expert per token (`router_type`, ViT): expert choice with C = 1 lost to dense continuation by
0.05 nats at equal steps, where the paper's wins (Komatsuzaki et al. 2023, Table 2). Explanation:
with 256 tokens of 16 images in a group, C = 1 leaves a fifth of the tokens without any expert,
and a model of 16 tokens an image has none to spare. Test: the same FLOPs, each token in one expert
and none left out: top-1 without a capacity. Its weights do not sum to one, so its experts' outputs
are scaled to what the parent's MLP puts out (`init.scaling`), which the renormalised weights of
expert choice do by themselves. Refuted if it does not beat dense continuation, or does not beat
expert choice with C = 1.
"""

from experiments import protocol
from experiments.suite import Suite

OURS = 'ours, of Komatsuzaki et al. 2023, Table 2'
DROPLESS = {'router': 'top_k', 'k': 1, 'dispatch': 'grouped', 'renormalize': False,
            'balance_weight': 0.02}


def get_suite(scale: str) -> Suite:
  regime = protocol.vision(scale)
  arms = []
  for pair in regime.pairs():
    arms += [
        pair.arm('dense, equal steps', pair.dense()),
        pair.arm('expert choice, C=1', pair.upcycled(encoder={'capacity_factor': 1.0})),
        pair.arm('top-1, none left out', pair.upcycled(
            encoder=DROPLESS, init={'scaling': 'output'}), reference=True)]
  claims = (
      regime.claim('one expert per token beats dense at equal steps if no token is left out', OURS,
                   'expert choice with C=1 does', 'top-1, none left out', '<',
                   'dense, equal steps'),
      regime.claim('... and beats expert choice with C=1, which leaves a fifth out', OURS,
                   'top-1 51.51, expert choice 51.91', 'top-1, none left out', '<',
                   'expert choice, C=1'),
  )
  return Suite('explanations', scale, tuple(arms), claims, plot='points')
