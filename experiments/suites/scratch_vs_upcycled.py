"""When does a sparse model trained from scratch catch up with an upcycled one?

Claim (Komatsuzaki et al. 2023, Fig. 4): in language, training the MoE from scratch catches up after
about 120 % of the dense model's budget; beyond that it wins. Their vision table 2 says the same of
sunk cost: per added epoch upcycling wins (52.80 after 7 more, from scratch 51.28), but counting the
7 dense epochs too, scratch wins (55.46 after 14).

A ladder of budgets, in % of a short dense parent's steps (a sixth of the others' pretraining, so
that budgets past 100 % are affordable): one uncooled run each for upcycled, scratch and dense, from
which every budget branches with a cooldown of its own. Sunk cost counted, scratch at 120 % is
compared with upcycled at 20 %: equally many steps in all, as the paper's epochs are, and more FLOPs
(the table has both).

Refuted if scratch is ahead at 60 %, or upcycled still is at 180 %.
"""

import functools

from experiments import protocol
from experiments.suite import Arm, Suite

FIG4 = 'Komatsuzaki et al. 2023, Fig. 4'
BUDGETS = (20, 60, 120, 180)   # extra steps, in % of the dense pretraining
CONTROLS = (20, 120)           # those at which the dense model is trained on too


def get_suite(scale: str) -> Suite:
  regime = protocol.text(scale)
  arms = [arm for pair in regime.pairs(core=True) for arm in _pair(regime, pair)]
  near, far = 'scratch, {} %', 'upcycled, {} %'
  claims = (
      regime.claim('at 20 % of the dense budget, upcycled is far ahead', FIG4, 'no figures',
                   far.format(20), '<', near.format(20)),
      regime.claim('at 60 %, upcycled is still ahead', FIG4, 'no figures',
                   far.format(60), '<', near.format(60)),
      regime.claim('at 180 %, from scratch is ahead', FIG4, 'they cross at about 120 %',
                   near.format(180), '<', far.format(180)),
      regime.claim('counting the sunk cost (120 % against 100 % + 20 %), from scratch wins',
                   'Komatsuzaki et al. 2023, Table 2', 'vision L/32, 14 epochs in all: 55.46 '
                   'from scratch, 52.80 upcycled', near.format(120), '<', far.format(20)),
  )
  return Suite('scratch_vs_upcycled', scale, tuple(arms), claims, plot='sweep',
               x_label='extra steps (% of dense pretraining)')


def _pair(regime: protocol.Regime, pair: protocol.Pair) -> list[Arm]:
  """The arms of one pair: a cooldown per series and budget."""
  base, arms = regime.early[0], []
  for series, make, first, budgets in (
      ('upcycled', functools.partial(pair.upcycled, start=base), base, BUDGETS),
      ('scratch', pair.scratch, 0, BUDGETS),
      ('dense', functools.partial(pair.dense, start=base), base, CONTROLS)):
    steps = [round(base * percent / 100) for percent in budgets]
    trunks = [n - round(protocol.COOLDOWN * n) for n in steps]   # where each cooldown begins
    long = make(trunks[-1], changes={'schedule.cooldown_steps': 0,
                                     'branch_steps': tuple(trunks[:-1])})
    for percent, n, trunk in zip(budgets, steps, trunks):
      rung = pair.cooldown(long, first + trunk, n - trunk)
      arms.append(pair.arm(f'{series}, {percent} %', rung, series=series, x=percent,
                           start_step=first, base_step=base))
  return arms
