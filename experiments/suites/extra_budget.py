"""Does the gap between upcycling and dense continuation grow with the extra budget?

Claim (Komatsuzaki et al. 2023, section 4.1, Fig. 2): for a little extra compute the two are equal;
the more there is, the further ahead is upcycling. `dense_vs_upcycled` compares them at one budget,
of 25 % (T5) and 20 % (ViT) more steps, where the gap in text is too small to be decided. Here the
same at twice that budget, paired with the same dense parents.

Made after the verdicts of `dense_vs_upcycled` and before its own runs; its single budgets are that
suite's runs. The twice as long ones were 40 % (one seed, another selection of data) when sizes were
chosen, and had the larger gap (experiments/LOG.md); that they were left out then was for the sake
of time.

Refuted if the gap at equal extra FLOPs is smaller with the larger budget, or dense continuation is
ahead with it.
"""

from experiments import protocol
from experiments.suite import Suite

FIG2 = 'Komatsuzaki et al. 2023, Fig. 2'
FACTORS = (1, 2)   # of the regime's extra steps


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    percent = {factor: f'{factor * regime.extra / regime.trunk:.0%}'.replace('%', ' %')
               for factor in FACTORS}
    for pair in regime.pairs(core=True):
      for factor in FACTORS:
        steps = factor * regime.extra
        up = pair.upcycled(steps)
        for series, run in (('dense, equal FLOPs', pair.matched_dense(up)), ('upcycled', up)):
          arms.append(pair.arm(f'{series}, {percent[factor]}', run, series=series,
                               x=100 * steps / regime.trunk,
                               reference=factor == 1 and series.startswith('dense')))
    less, more = ((f'upcycled, {percent[factor]}', f'dense, equal FLOPs, {percent[factor]}')
                  for factor in FACTORS)
    claims += [
        regime.claim('with twice the extra budget, upcycled beats dense continuation', FIG2,
                     'ahead; no figures', more[0], '<', more[1]),
        regime.claim('twice the extra budget, a larger gap', FIG2,
                     'a gap that grows with the extra budget; no figures',
                     more[0], '<', more[1], than=less)]
  return Suite('extra_budget', scale, tuple(arms), tuple(claims), plot='sweep',
               x_label='extra steps of the upcycled model (% of dense pretraining)')
