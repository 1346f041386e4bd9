"""Should a token's combine weights be made to sum to 1?

Claims (Komatsuzaki et al. 2023, B.7): for upcycled vision models normalisation helps, since it
keeps the dense function at step 0; from scratch it makes little difference (Table 3, V-MoE-B/32:
C=1 48.71 to 48.23, C=2 50.02 to 49.75). For language it makes no difference upstream (70.8 and
70.7) and hurts downstream (SuperGLUE 79.3 to 78.8).

Refuted if normalisation does not help in vision, or helps or hurts in language upstream.
"""

from experiments import protocol
from experiments.suite import Suite

B7 = 'Komatsuzaki et al. 2023, B.7'


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs():
      up = pair.upcycled()
      arms.append(pair.arm('dense, equal FLOPs', pair.matched_dense(up)))
      for name, renormalize in (('normalised', True), ('raw', False)):
        moe = {'renormalize': renormalize}
        run = pair.upcycled(moe=moe)
        arms.append(pair.arm(name, run, reference=run.key == up.key))
        if len(regime.stacks) == 1:
          arms.append(pair.arm(f'{name}, from scratch', pair.scratch(moe=moe)))
  text, vision = protocol.text(scale), protocol.vision(scale)
  claims = [
      vision.claim('normalised weights help an upcycled model', B7, 'it indeed helps',
                   'normalised', '<', 'raw'),
      vision.claim('normalised weights make little difference from scratch', B7,
                   'Table 3: C=1 48.71 and 48.23, C=2 50.02 and 49.75',
                   'normalised, from scratch', '~', 'raw, from scratch'),
      text.claim('normalised weights make no difference to an upcycled model upstream', B7,
                 'token accuracy 70.8 and 70.7', 'normalised', '~', 'raw'),
  ]
  return Suite('combine_normalisation', scale, tuple(arms), tuple(claims), plot='points')
