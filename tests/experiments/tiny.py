"""The command line with small suites: python -m tests.experiments.tiny --suite=chain ...

chains  two parents, the second with a child
chain   the first of these parents, with a child
alone   that parent
"""

import dataclasses
import os
import sys
import types

from experiments import main as main_lib
from experiments import suite as suite_lib
from experiments import suites
from experiments.suite import Arm, Run, Suite
from moejax.config import check_choice
from tests import xla

STEPS = 200


def parent(seed: int = 0, **changes) -> Run:
  return Run(f'parent {seed}', 'vit_glyphs', {
      'steps': STEPS, 'model.num_layers': 1, 'log_every': 10, 'eval_every': STEPS,
      'checkpoint_every': STEPS // 4, 'seed': seed, **changes}, arg='runlocal')


def child(of: Run) -> Run:
  return Run(f'child of {of.label}', 'vit_glyphs', {
      'steps': 4, 'model.num_layers': 1, 'init.mode': 'continue', 'log_every': 2,
      'eval_every': 8, 'checkpoint_every': 8}, of, arg='runlocal')


def chains(scale: str = 'mini') -> Suite:
  return Suite('chains', scale, (
      Arm('d', 'parent', parent(0), parent(0), reference=True, pair=0),
      Arm('d', 'parent', parent(1), parent(1), reference=True, pair=1),
      Arm('d', 'child', child(parent(1)), parent(1), pair=1)))


def chain(scale: str = 'mini') -> Suite:
  return Suite('chain', scale, (Arm('d', 'parent', parent(), parent(), reference=True),
                                Arm('d', 'child', child(parent()), parent())))


def alone(scale: str = 'mini') -> Suite:
  return Suite('alone', scale, (Arm('d', 'parent', parent(), parent(), reference=True),))


SUITES = {suite.__name__: types.SimpleNamespace(__doc__='Tiny.', get_suite=suite, SCALES=scales)
          for suite, scales in ((chains, ('mini',)), (chain, ('mini', 'smoke')),
                                (alone, ('mini', 'smoke')))}


def environment() -> dict[str, str]:
  """For processes: one device, as a user's have; XLA compiles quickly."""
  return {**os.environ, 'XLA_FLAGS': xla.QUICK}


def module(name: str):
  check_choice('--suite', name, SUITES)
  return SUITES[name]


def use(set_attribute=setattr) -> None:
  """Replaces all suites by these; a test gives monkeypatch.setattr."""
  set_attribute(suite_lib, 'names', lambda: sorted(SUITES))
  set_attribute(suite_lib, 'module', module)
  set_attribute(suites, 'ORDER', tuple(SUITES))


if __name__ == '__main__':
  SUITES['drop_upcycling'] = types.SimpleNamespace(   # for the notebook, which shows committed ones
      __doc__='Tiny.', get_suite=lambda scale: dataclasses.replace(
          chain(scale), name='drop_upcycling'))
  use()
  try:
    sys.exit(main_lib.main())
  except suite_lib.ConfigError as error:
    sys.exit(f'experiments: {error}')
