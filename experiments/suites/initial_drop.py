"""What does the surgery itself cost, before any training?

Claims (Komatsuzaki et al. 2023, Fig. 15, B.3, B.7): the loss jumps at step 0; the more so the more
experts and the smaller the capacity; with normalised weights and a large C the upcycled model keeps
the dense function. Random experts lose it whatever the rest.

Every combination of E, C, normalisation and start of the experts is made from each pair's trunk by
surgery and evaluated, not trained. Our expectation from the definition: with identical experts and
weights that sum to 1 only tokens that no expert chose differ, so the gap goes to 0 as C grows.

Refuted if the gap does not grow with E (raw weights), does not shrink with C, or does not vanish
with normalised weights at the largest C.
"""

from experiments import protocol
from experiments.suite import Arm, Suite

FIG15 = 'Komatsuzaki et al. 2023, Fig. 15'
GAP = 'step0/step0_gap'
COUNTS, FACTORS = (2, 8, 32), (1.0, 2.0, 4.0)


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs(core=True):
      arms += _swept_arms(pair, _random(regime), 'random')
      arms.append(_arm(pair, _random(regime), 8, 2, True, 'copy'))   # for comparison
    for pair in regime.pairs(core=True):
      arms += _swept_arms(pair, regime.domain, 'copy')
    claims += [
        regime.claim('raw weights: the gap grows with E (2 to 32)', FIG15, 'no figures',
                     _name(2, 2, False, 'copy'), '<', _name(32, 2, False, 'copy'), metric=GAP),
        regime.claim('the gap shrinks as C grows (1 to 4; normalised)', FIG15, 'no figures',
                     _name(8, 4, True, 'copy'), '<', _name(8, 1, True, 'copy'), metric=GAP),
        regime.claim('normalised weights lower the gap (E=8, C=2)', FIG15, 'no figures',
                     _name(8, 2, True, 'copy'), '<', _name(8, 2, False, 'copy'), metric=GAP),
        regime.claim('random experts lose more than copies (normalised, E=8, C=2)',
                     'Komatsuzaki et al. 2023, Fig. 13', 'no figures', _name(8, 2, True, 'copy'),
                     '<', _name(8, 2, True, 'random'), metric=GAP, domain=_random(regime)),
    ]
  return Suite('initial_drop', scale, tuple(arms), tuple(claims),
               metrics=(GAP, 'validation/loss', 'test/loss'), plot='sweep', x_label='experts E')


def _random(regime: protocol.Regime) -> str:
  """A domain of their own, since they would flatten the curves of the copies."""
  return f'{regime.domain}, random experts'


def _name(E: int, C: float, renormalize: bool, experts: str) -> str:
  return f'E={E}, C={C:g}, {"normalised" if renormalize else "raw"}, {experts}'


def _swept_arms(pair: protocol.Pair, domain: str, experts: str) -> list[Arm]:
  return [_arm(pair, domain, E, C, renormalize, experts, series=True)
          for renormalize in (True, False) for C in FACTORS for E in COUNTS]


def _arm(pair: protocol.Pair, domain: str, E: int, C: float, renormalize: bool, experts: str,
         series: bool = False) -> Arm:
  name = _name(E, C, renormalize, experts)
  run = pair.untrained(moe={'num_experts': E, 'capacity_factor': C, 'renormalize': renormalize},
                     init={'experts': experts})
  where = {'series': name.split(', ', 1)[1], 'x': E} if series else {}
  return pair.arm(name, run, domain=domain, **where)
