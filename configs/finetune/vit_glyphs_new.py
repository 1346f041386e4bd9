"""Fine-tunes a run of vit_glyphs.py on the 284 glyph classes that it never saw, with a new head.

--config.init.parent=DIR names the run; :upcycled and presets say which, as in vit_digits.py. All
parameters are trained. Of the classes' 2,781 glyphs 2,078 are trained on; 172 (of 120 classes) are
the validation split, 190 (of 130) test_seen, and 341 (of 139) test, of a family held out as before.

A few-shot linear probe on the same classes is taken at the end; 222 of them have the five glyphs it
takes. To probe what pretraining alone made of the features, set the same probe in the parent's run:
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
