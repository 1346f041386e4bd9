"""Should the optimizer's state be carried over?

Claims (Komatsuzaki et al. 2023, B.6): carried over, it "gives a performance boost" for vision
models, whatever the number of experts; for language it makes no difference. (A survey has it the
wrong way round.) The paper's optimizer is Adafactor; ours is Adam, whose slots here have a count
each, so that fresh ones take small first steps.

Refuted if carrying does not help in vision, or helps in language.
"""

from experiments import protocol
from experiments.suite import Suite

B6 = 'Komatsuzaki et al. 2023, B.6'


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs():
      up = pair.upcycled()
      arms.append(pair.arm('dense, equal FLOPs', pair.matched_dense(up)))
      for name in ('carry', 'reset'):
        run = pair.upcycled(init={'optimizer': name})
        arms.append(pair.arm(name, run, reference=run.key == up.key))
  text, vision = protocol.text(scale), protocol.vision(scale)
  claims = [
      vision.claim('carrying the optimizer state over helps', B6, 'a boost at every E',
                   'carry', '<', 'reset'),
      text.claim('carrying the optimizer state over makes no difference', B6, 'no improvement',
                 'carry', '~', 'reset'),
  ]
  return Suite('optimizer_state', scale, tuple(arms), tuple(claims), plot='points')
