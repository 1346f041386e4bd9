"""Do upcycled models stay ahead after fine-tuning?

Claims (Komatsuzaki et al. 2023, section 4.1, Fig. 3): in vision the upstream gains carry over to
full fine-tuning and to the 10-shot probe; in language fine-tuning is noisier but favours upcycling
(second-hand: 1.5 to 2 SuperGLUE points at 46 to 55 % extra).

Each pair's dense model at equal extra FLOPs and its upcycled model, both cooled, are fine-tuned
alike: T5 on a mixture of three tasks about Python code (stdlib_tasks, held-out files), scored by
exact match of greedy outputs, and on spelling to phonemes (cmudict), by phoneme error rate; ViT on
digits and on glyph classes the parent never saw, with a new head, and by a few-shot probe of the
frozen features, of these classes and of digits. Loss is given beside the score of the code tasks,
which a model of this size does not raise above always giving the commonest answer. At scale
`paper`: SuperGLUE, and the 10-shot probe of ImageNet. Rates, dropout and lengths are the
fine-tuning configs', chosen on validation splits.

Refuted if the dense model scores higher on the test splits.
"""

from experiments import protocol
from experiments.suite import Suite

FIG3 = 'Komatsuzaki et al. 2023, Fig. 3'
STEPS = {'mini': {'t5_stdlib_tasks': 800}}   # where the config's own would take too long
TEXT_TASKS = {   # config -> (what the table calls it, metric, whether higher is better)
    't5_stdlib_tasks': ('code tasks', 'test/mean_over_tasks', '>'),
    't5_cmudict': ('pronunciation', 'test/phoneme_error_rate', '<'),
}
BY_LOSS = ('t5_stdlib_tasks',)   # there is a claim about its loss too
VISION_TASKS = {
    'vit_digits': ('digits', 'test/accuracy', '>'),
    'vit_glyphs_new': ('new classes', 'test_seen/accuracy', '>'),
}
PROBE = 'probe/5shot_accuracy', 'ViT, 5-shot probe of new classes'   # metric, domain
FROZEN = {'vit_digits': 'ViT, few-shot probe of digits'}   # no claim: added after the verdicts
PAPER = {'paper/t5_base_superglue': ('SuperGLUE', 'test/mean_over_tasks', '>')}
PAPER_PROBE = 'probe/10shot_accuracy', 'ViT, 10-shot probe of ImageNet'


def get_suite(scale: str) -> Suite:
  text, vision = protocol.text(scale), protocol.vision(scale)
  text_tasks, vision_tasks, (probe, probed) = (
      (PAPER, {}, PAPER_PROBE) if scale == 'paper' else (TEXT_TASKS, VISION_TASKS, PROBE))
  arms, claims = [], []
  for regime, tasks in ((text, text_tasks), (vision, vision_tasks)):
    for config, (title, metric, better) in tasks.items():
      domain = f'{regime.family} on {title}'
      for pair in regime.pairs(core=True):
        up = pair.upcycled()
        for name, parent in (('dense, equal FLOPs', pair.matched_dense(up)), ('upcycled', up)):
          run = pair.finetuned(config, parent, STEPS.get(scale, {}).get(config, 0))
          arms.append(pair.arm(name, run, domain=domain, reference=name == 'dense, equal FLOPs'))
      claims.append(regime.claim(
          f'upcycled stays ahead of dense after full fine-tuning ({title})', FIG3,
          'gains carry over' if regime is vision else 'noisier, favours upcycling',
          'upcycled', better, 'dense, equal FLOPs', metric=metric, domain=domain))
      if config in BY_LOSS:
        claims.append(regime.claim(
            f'... and in loss ({title})', FIG3, 'not measured', 'upcycled', '<',
            'dense, equal FLOPs', metric='test/loss', domain=domain))
  for config, domain in FROZEN.items() if scale != 'paper' else ():
    for pair in vision.pairs(core=True):
      up = pair.upcycled()
      for name, parent in (('dense parent, cooled', pair.parent),
                           ('dense, equal FLOPs', pair.matched_dense(up)), ('upcycled', up)):
        arms.append(pair.arm(name, pair.frozen(config, parent), domain=domain,
                             reference=name == 'dense, equal FLOPs'))
  for pair in vision.pairs(core=True):
    up = pair.upcycled()
    arms += [pair.arm(name, run, domain=probed, reference=name == 'dense, equal FLOPs')
             for name, run in (('dense parent, cooled', pair.parent),
                               ('dense, equal FLOPs', pair.matched_dense(up)), ('upcycled', up))]
  claims.append(vision.claim(
      'upcycled is ahead of dense in the few-shot probe', FIG3, 'gains carry over',
      'upcycled', '>', 'dense, equal FLOPs', metric=probe, domain=probed))
  scores = [metric for _, metric, _ in (*text_tasks.values(), *vision_tasks.values())]
  # Where classes are new, claims are about the families that were trained on.
  metrics = dict.fromkeys([probe, *sorted(scores, key='test/accuracy'.__eq__),
                           'test/word_error_rate', 'test/accuracy', 'test/loss'])
  return Suite('finetuning', scale, tuple(arms), tuple(claims), metrics=tuple(metrics),
               plot='points')
