"""Quickstart: does upcycling a small dense model beat giving the dense model the same compute?

Sparse upcycling (Komatsuzaki et al. 2023) copies each MLP of a trained dense model into the experts
of a Mixture-of-Experts and trains on. Here a ViT on glyphs and, smaller, a T5 on the standard
library's text are pretrained; from the trunk (the checkpoint before any cooldown) branch, with 20 %
extra steps:

  dense, equal steps   the same model trained on: what the extra steps alone bring
  dense, equal FLOPs   ... for as many more steps as the sparse model's FLOPs pay for
  upcycled             the sparse model started from the trunk
  MoE from scratch     the same sparse model, the same steps, started from nothing

Each arm ends with a linear cooldown over the same fraction of its own steps. The parent is reported
too, cooled down from the trunk directly, and this cooldown is as long as that of `dense, equal
steps`.

An honest answer is whatever sign the difference between `upcycled` and `dense, equal FLOPs` has on
held-out data. Expect it small or against upcycling: at this length the dense models are far from
their plateau, where extra steps help them nearly as much as extra parameters. What should be large
is the distance to `MoE from scratch`, and the ViT's gap at step 0 should be near zero, since its
weights are renormalised, but not the T5's. One seed per arm: small differences mean nothing.
"""

from experiments.suite import Arm, Run, Suite

SCALES = ('mini', 'smoke')
COOLDOWN = 0.4   # of the extra steps
EXTRA = 0.2      # extra steps as a share of pretraining
METRICS = ('validation/loss', 'validation/accuracy', 'test/loss', 'test/accuracy')

# Steps to the trunk, and between evaluations of the arms; a smoke test only shows that they run.
STEPS = {
    'mini': {'vit_glyphs': (6000, 150), 't5_stdlib': (3000, 100)},
    'smoke': {'vit_glyphs': (10, 2), 't5_stdlib': (10, 2)},
}
EVAL_EXAMPLES = {'mini': {'vit_glyphs': 2048, 't5_stdlib': 1024},
                 'smoke': {'vit_glyphs': 16, 't5_stdlib': 16}}


def get_suite(scale: str) -> Suite:
  """The suite at 'mini' (minutes on 2 cores) or 'smoke' (a few steps of each run)."""
  return Suite('quickstart', scale, (
      *_arms('ViT on glyphs', 'ViT', 'vit_glyphs', scale),
      *_arms('T5 on stdlib_text', 'T5', 't5_stdlib', scale)), metrics=METRICS)


def _arms(domain: str, model: str, config: str, scale: str) -> list[Arm]:
  trunk, every = STEPS[scale][config]
  extra, examples = round(EXTRA * trunk), EVAL_EXAMPLES[scale][config]

  def run(label: str, steps: int, parent: Run | None = None, *, config: str = config,
          cooldown: int = 0, mode: str = 'scratch', eval_every: int = every) -> Run:
    changes = {
        'steps': steps,
        'schedule.cooldown_steps': cooldown or round(COOLDOWN * steps),
        'log_every': every // 2,
        'eval_every': eval_every,
        'checkpoint_every': 5 * every,
        'data.eval_examples': examples,
        'init.mode': mode,
    }
    return Run(f'{model} {label}', config, changes, parent,
               arg='runlocal' if scale == 'smoke' else '')

  cooldown = round(COOLDOWN * extra)
  parent = run('pretraining', trunk + cooldown, cooldown=cooldown, eval_every=5 * every)
  dense = run('dense, equal steps', extra, parent, mode='continue')
  upcycled = run('upcycled', extra, parent, config=f'{config}_upcycled', mode='upcycle')
  scratch = run('MoE from scratch', extra, config=f'{config}_upcycled')
  paid = round(extra * upcycled.step_flops / dense.step_flops)
  longer = run('dense, equal FLOPs', paid, parent, mode='continue')
  return [
      Arm(domain, 'dense parent, cooled', parent, parent),
      Arm(domain, 'dense, equal steps', dense, parent),
      Arm(domain, 'dense, equal FLOPs', longer, parent, reference=True),
      Arm(domain, 'upcycled', upcycled, parent),
      Arm(domain, 'MoE from scratch', scratch, parent),
  ]
