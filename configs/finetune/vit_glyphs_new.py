"""Fine-tunes a run of vit_glyphs.py on the 284 glyph classes that it never saw, with a new head.

--config.init.parent=DIR names the run; :upcycled and presets choose its kind, as in vit_digits.py.
All parameters are trained. The classes have 2,781 glyphs: 2,078 to train on, 172 (of 120 classes)
for validation, 190 (of 130) in test_seen, 341 (of 139) in test, of the family that is held out in
the parent's run too.

At the end a few-shot linear probe measures the features on these classes, of which 222 have the
five glyphs that it needs. To probe the features of pretraining alone, set it in the parent's run:
--config.probe.source=glyphs --config.probe.skip_classes=4096 --config.probe.drop_rare
"--config.probe.shots=(1, 5)".
"""

from configs.common import of_parent, shrink
from configs.finetune import vit_digits


def get_config(arg=None):
  _, runlocal = of_parent(arg)
  config = vit_digits.get_config(arg)
  config.data.source = config.probe.source = 'glyphs'
  config.data.image.skip_classes = config.probe.skip_classes = 4096
  config.model.num_classes = 284
  config.probe.drop_rare = True
  config.probe.shots = (1, 5)
  config.eval_splits = ('test_seen', 'test')
  config.steps = 1_200
  config.log_every = 100
  config.schedule.cooldown_steps = 300

  if runlocal:
    shrink(config)
  return config
