"""The command line with a suite of a parent and a child: python -m tests.experiments.tiny ..."""

import sys

from experiments import main as main_lib
from experiments import suite as suite_lib
from experiments.suite import Arm, Run, Suite

STEPS = 600


def parent(**changes) -> Run:
  return Run('parent', 'vit_glyphs', {
      'steps': STEPS, 'model.num_layers': 1, 'log_every': 10, 'eval_every': STEPS,
      'checkpoint_every': STEPS, **changes}, arg='runlocal')


def suite() -> Suite:
  child = Run('child', 'vit_glyphs', {
      'steps': 4, 'model.num_layers': 1, 'init.mode': 'continue', 'eval_every': 8,
      'checkpoint_every': 8}, parent(), arg='runlocal')
  return Suite('tiny', 'mini', (Arm('d', 'parent', parent(), parent(), reference=True),
                                Arm('d', 'child', child, parent())))


if __name__ == '__main__':
  suite_lib.load = lambda name, scale: suite()
  sys.exit(main_lib.main())
