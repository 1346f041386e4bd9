"""Continue the parent's learning rate, warm it up again, or restart it?

Claims. Komatsuzaki et al. 2023 continue the reciprocal-square-root schedule without a jump. He et
al. 2024 (2410.07524) find that going on at a small constant rate plateaus and that a reset to the
peak wins later (15B, upcycled), and Skywork-MoE (2406.06563) that upcycling at too low a rate is
the worst of all; the choice is known to flip conclusions, since a high rate helps the sparse model
to leave the dense one behind, at the price of a worse start.

Dense continuation gets the same three rates: what matters is the best dense against the best sparse
one. The peak is the parent's; 'rewarm' goes back to the continued rate, 'restart' to the peak.

Refuted (the paper) if upcycling wins only under another schedule than its own.
"""

from experiments import protocol
from experiments.suite import Suite

STARTS = {'T5': ('continue', 'restart'), 'ViT': ('continue', 'rewarm', 'restart')}


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    starts = STARTS[regime.family]
    for pair in regime.pairs():
      for start in starts:
        changes = {} if start == 'continue' else {'schedule.start': start}
        up = pair.upcycled(changes=changes)
        arms += [pair.arm(f'dense, equal FLOPs, {start}', pair.matched_dense(up, changes=changes)),
                 pair.arm(f'upcycled, {start}', up, reference=start == 'continue')]
    claims += [regime.claim(
        f'upcycled beats dense at equal extra FLOPs, rate: {start}',
        'Komatsuzaki et al. 2023, 3' if start == 'continue' else 'He et al. 2024',
        'no figures here', f'upcycled, {start}', '<', f'dense, equal FLOPs, {start}')
               for start in starts]
    claims.append(regime.claim('restarting the rate helps the upcycled model',
                               'He et al. 2024 (2410.07524)', 'the peak wins later, 15B',
                               'upcycled, restart', '<', 'upcycled, continue'))
  return Suite('learning_rate', scale, tuple(arms), tuple(claims), plot='points')
