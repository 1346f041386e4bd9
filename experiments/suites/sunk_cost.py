"""Counting all steps, the parent's too: is a sparse model from scratch better than an upcycled one?

Made after the verdict of `scratch_vs_upcycled`, as `explanations` are, and before its own runs.
There the upcycled T5 was still ahead of the same MoE from scratch by 0.16 nats at 180 % of a dense
budget of 4,000 steps; the paper's cross at about 120 % (Komatsuzaki et al. 2023, Fig. 4).
Explanation: that budget is too short for sparsity to pay. In its first 4,000 steps a T5 from
scratch has the train loss of a dense one (1.89 to 1.94, the dense ones 1.88 to 1.91; the runs'
metrics.jsonl), so it cannot make up for a head start of as many steps. Then sparsity should have
paid at the end of the whole budget of the other suites, and the MoE from scratch be ahead of one
that was sparse for the last fifth only.

Claim (Table 2, vision L/32): 55.46 from scratch after 14 epochs, 52.80 upcycled after 7 and 7. Here
the steps of the dense pretraining and of the continuation, all of them sparse, with the same rate,
data and cooldown at each step.

Refuted if the MoE from scratch is not ahead.
"""

from experiments import protocol
from experiments.protocol import COOLDOWN
from experiments.suite import Suite

TABLE2 = 'Komatsuzaki et al. 2023, Table 2'
SCRATCH = 'MoE from scratch, as many in all'


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs():
      arms += [
          pair.arm('dense, equal steps', pair.dense(), reference=True),
          pair.arm('upcycled', pair.upcycled()),
          pair.arm(SCRATCH, pair.scratch(regime.trunk + regime.extra, changes={
              'schedule.cooldown_steps': round(COOLDOWN * regime.extra)}))]
    claims.append(regime.claim(
        'with as many steps in all, from scratch beats upcycled', TABLE2,
        'vision L/32: 55.46 from scratch, 52.80 upcycled', SCRATCH, '<', 'upcycled'))
  return Suite('sunk_cost', scale, tuple(arms), tuple(claims))
