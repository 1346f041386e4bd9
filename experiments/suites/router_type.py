"""Which router: expert choice or token choice, one expert or two, with or without priority?

Claims (Komatsuzaki et al. 2023, B.1). Vision (Table 2, L/32, 7 dense epochs + 7; JFT precision@1):
dense 49.60, expert choice C=1 51.91, top-1 51.51, expert choice C=2 52.80, top-2 52.88, token
choice with batch priority. So all beat dense, two experts beat one, and at equal cost expert choice
and top-k are equal. Language: expert choice beats top-2 (with priority) and Switch's top-1.

C = k makes the cost of expert choice and token choice equal, per step and per FLOP alike; top-1
is compared with C=1, top-2 with C=2. In text the encoder's router changes and the decoder's stays
top-2 (expert choice is not causal), except for top-1, which is Switch in both stacks as in the
paper; so expert choice with C=1 in the encoder takes a few FLOPs more than it. The dense model at
equal FLOPs has those of expert choice with C=2; arms with one expert take less, as the table says.

Refuted if the order of the arms is another.
"""

from experiments import protocol
from experiments.suite import Suite

TABLE2 = 'Komatsuzaki et al. 2023, Table 2'
B1 = 'Komatsuzaki et al. 2023, B.1'
TOP = {'router': 'top_k', 'balance_weight': 0.02}   # on the scale where balanced is 1
ONE = 'expert choice, C=1'
ARMS = {   # name -> (of the encoder or ViT, of the decoder)
    ONE: ({'capacity_factor': 1.0}, {}),
    'top-1': ({**TOP, 'k': 1, 'capacity_factor': 1.0}, {'k': 1, 'capacity_factor': 1.0}),
    'top-1, priority': ({**TOP, 'k': 1, 'capacity_factor': 1.0, 'batch_priority': True},
                        {'k': 1, 'capacity_factor': 1.0}),
    'top-2': ({**TOP, 'k': 2}, {}),
    'top-2, priority': ({**TOP, 'k': 2, 'batch_priority': True}, {}),
}


def get_suite(scale: str) -> Suite:
  arms, claims = [], []
  for regime in (protocol.text(scale), protocol.vision(scale)):
    for pair in regime.pairs():
      up = pair.upcycled()
      arms += [pair.arm('dense, equal steps', pair.dense()),
               pair.arm('dense, equal FLOPs', pair.matched_dense(up)),
               pair.arm('expert choice, C=2', up, reference=True)]
      for name, (encoder, decoder) in ARMS.items():
        if name == 'top-1, priority' and len(regime.stacks) == 2:
          continue   # no claim is about it
        arms.append(pair.arm(_one(regime) if name == ONE else name, pair.upcycled(
            encoder=_valid(regime, encoder), decoder=decoder)))
    claims += [
        regime.claim('one expert per token beats dense at equal steps (expert choice)', TABLE2,
                     '51.91 against 49.60', _one(regime), '<', 'dense, equal steps'),
        regime.claim('two experts per token beat one (expert choice)', TABLE2,
                     '52.80 against 51.91', 'expert choice, C=2', '<', _one(regime)),
    ]
  text, vision = protocol.text(scale), protocol.vision(scale)
  claims += [
      text.claim('expert choice beats top-2 with priority in the encoder', B1, 'no figures',
                 'expert choice, C=2', '<', 'top-2, priority'),
      text.claim("expert choice C=1 beats Switch's top-1", B1, 'no figures',
                 _one(text), '<', 'top-1'),
      vision.claim('top-2 with priority equals expert choice C=2', TABLE2, '52.88 and 52.80',
                   'top-2, priority', '~', 'expert choice, C=2'),
      vision.claim('top-1 with priority equals expert choice C=1', TABLE2, '51.51 and 51.91',
                   'top-1, priority', '~', ONE),
  ]
  return Suite('router_type', scale, tuple(arms), tuple(claims), plot='points')


def _one(regime: protocol.Regime) -> str:
  """The name of arm ONE; where there is a decoder, that keeps two experts per token."""
  return f'{ONE} in the encoder' if len(regime.stacks) == 2 else ONE


def _valid(regime: protocol.Regime, moe: dict) -> dict:
  """The ViT's upcycled weights are renormalised, which a single weight per token cannot be."""
  if moe.get('k') == 1 and len(regime.stacks) == 1:
    return {**moe, 'renormalize': False}
  return moe
