"""Does upcycling need a well-trained dense model?

Claim (Komatsuzaki et al. 2023, Fig. 6): upcycled at different points of the dense pretraining, each
followed by the same extra steps, the gain over dense continuation is roughly constant.

What was seen while sizes were chosen (experiments/LOG.md) speaks against it for small models: far
from its plateau the dense one gains as much from extra steps as from extra parameters. Starts are
the trunk of the pretraining and earlier points of the same run.

Refuted if upcycling is behind dense continuation at an early start.
"""

from experiments import protocol
from experiments.suite import Suite

FIG6 = 'Komatsuzaki et al. 2023, Fig. 6'
STARTS = {'T5': 1, 'ViT': 2}   # how many earlier points of the pretraining


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    starts = (*regime.early[-STARTS[regime.family]:], regime.trunk)
    for pair in regime.pairs():
      for start in starts:
        how = {} if start == regime.trunk else {'start': start}
        up = pair.upcycled(**how)
        runs = {'dense, equal FLOPs': pair.matched_dense(up, **how), 'upcycled': up}
        for series, run in runs.items():
          arms.append(pair.arm(f'{series}, from {start:,}', run, series=series, x=start,
                               start_step=start, base_step=regime.trunk,
                               reference=start == regime.trunk and series.startswith('dense')))
    for start in starts:
      claims.append(regime.claim(
          f'upcycled at step {start:,} beats dense continuation at equal extra FLOPs', FIG6,
          'roughly the same gain at every start; no figures',
          f'upcycled, from {start:,}', '<', f'dense, equal FLOPs, from {start:,}'))
  return Suite('dense_pretraining_amount', scale, tuple(arms), tuple(claims), plot='sweep',
               x_label='dense pretraining before (steps)')
