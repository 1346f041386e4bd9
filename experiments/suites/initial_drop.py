"""What does the surgery itself cost, before any training?

Claims (Komatsuzaki et al. 2023, Fig. 15, B.3, B.7): the loss jumps at step 0; the more so the more
experts and the smaller the capacity; with normalised weights and a large C the upcycled model keeps
the dense function. Random experts lose it whatever the rest.

Every combination of E, C, normalisation and start of the experts is cut out of each pair's trunk
and evaluated, not trained. Our expectation from the definition: with identical experts and weights
that sum to 1 only tokens that no expert chose differ, so the gap goes to 0 as C grows.

Refuted if the gap does not grow with E (raw weights), does not shrink with C, or does not vanish
with normalised weights at the largest C.
"""

from experiments import protocol
from experiments.suite import Arm, Suite

FIG15 = 'Komatsuzaki et al. 2023, Fig. 15'
GAP = 'step0/step0_gap'
COUNTS, FACTORS = (2, 8, 32), (1.0, 2.0, 4.0)


def _name(E: int, C: float, renormalize: bool, experts: str) -> str:
  return f'E={E}, C={C:g}, {"normalised" if renormalize else "raw"}, {experts}'


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs(core=True):
      arms += _cells(pair)
    name = _name
    claims += [
        regime.claim('raw weights: the gap grows with E (2 to 32)', FIG15, 'no figures',
                     name(2, 2, False, 'copy'), '<', name(32, 2, False, 'copy'), metric=GAP),
        regime.claim('the gap shrinks as C grows (1 to 4; normalised)', FIG15, 'no figures',
                     name(8, 4, True, 'copy'), '<', name(8, 1, True, 'copy'), metric=GAP),
        regime.claim('normalised weights lower the gap (E=8, C=2)', FIG15, 'no figures',
                     name(8, 2, True, 'copy'), '<', name(8, 2, False, 'copy'), metric=GAP),
        regime.claim('random experts lose more than copies (normalised, E=8, C=2)',
                     'Komatsuzaki et al. 2023, Fig. 13', 'no figures',
                     name(8, 2, True, 'copy'), '<', name(8, 2, True, 'random'), metric=GAP),
    ]
  return Suite('initial_drop', scale, tuple(arms), tuple(claims),
               metrics=(GAP, 'validation/loss', 'test/loss'), plot='sweep', x_label='experts E')


def _cells(pair: protocol.Pair) -> list[Arm]:
  arms = []
  for experts in ('copy', 'random'):
    for renormalize in (True, False):
      for C in FACTORS:
        for E in COUNTS:
          name = _name(E, C, renormalize, experts)
          cell = pair.surgery(moe={'num_experts': E, 'capacity_factor': C,
                                   'renormalize': renormalize}, init={'experts': experts})
          arms.append(pair.arm(name, cell, series=name.split(', ', 1)[1], x=E))
  return arms
