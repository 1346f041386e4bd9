"""Should experts start as copies of the MLP?

Claims (Komatsuzaki et al. 2023, B.5, Fig. 13): copies are far better than random experts, whatever
E, for a long time; copying into only a subset of the experts is worse too; a little Gaussian noise
on the copies brings nothing, much of it hurts. Their noise is not known here; ours is relative to
each leaf's standard deviation, 0.03 and 0.5. In text, copies and random experts only.

Refuted if random or partly random experts are as good at the end, or noise helps.
"""

from experiments import protocol
from experiments.suite import Suite

B5 = 'Komatsuzaki et al. 2023, B.5, Fig. 13'
STARTS = {
    'half copies': lambda E: {'experts': 'subset', 'copied_experts': E // 2},
    'random': lambda E: {'experts': 'random'},
    'noise 0.03': lambda E: {'experts': 'noise', 'noise_std': 0.03},
    'noise 0.5': lambda E: {'experts': 'noise', 'noise_std': 0.5},
}


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  text, vision = protocol.text(scale), protocol.vision(scale)
  for regime in (text, vision):
    for pair in regime.pairs(core=True):
      up = pair.upcycled()
      arms += [pair.arm('dense, equal FLOPs', pair.matched_dense(up)),
               pair.arm('copies', up, reference=True)]
      arms += [pair.arm(name, pair.upcycled(init=init(regime.experts)))
               for name, init in STARTS.items() if name == 'random' or len(regime.stacks) == 1]
    claims.append(regime.claim('copied experts beat random ones', B5, 'far ahead',
                               'copies', '<', 'random'))
  claims += [
      vision.claim('copies for all experts beat copies for half of them', B5, 'no figures',
                   'copies', '<', 'half copies'),
      vision.claim('a little noise on the copies changes nothing', B5, 'no figures',
                   'noise 0.03', '~', 'copies'),
      vision.claim('much noise on the copies hurts', B5, 'no figures', 'copies', '<', 'noise 0.5'),
  ]
  return Suite('expert_init', scale, tuple(arms), tuple(claims), plot='points')
