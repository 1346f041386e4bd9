"""Fine-tunes a run of vit_glyphs.py on scikit-learn's handwritten digits, with a new head.

--config.init.parent=DIR names the run; with :upcycled it is a run of vit_glyphs_upcycled.py, with
:switch of vit_glyphs_upcycled.py:switch, and so for each preset. All parameters are trained. At the
end a few-shot linear probe measures the features.
"""

from configs.common import of_parent, shrink
from configs.pretrain import vit_glyphs
from configs.upcycle import vit_glyphs_upcycled


def get_config(arg=None):
  parents_arg, runlocal = of_parent(arg)
  parent = vit_glyphs if parents_arg is None else vit_glyphs_upcycled
  config = parent.get_config(parents_arg)
  config.init.mode = 'continue'
  config.init.parent = f'runs/{parent.__name__.rpartition(".")[2]}'
  config.init.new_head = True
  config.init.step = -2   # its end, cooled, not its trunk
  config.init.optimizer = 'reset'
  config.steps = 600
  config.log_every = 50
  config.eval_every = config.checkpoint_every = 300

  config.data.source = 'digits'
  config.data.image.classes = 0
  config.data.eval_examples = 0
  config.model.num_classes = 10
  config.probe.source = 'digits'

  config.optimizer.learning_rate = 1e-3
  config.schedule.name = 'constant'
  config.schedule.start = 'restart'
  config.schedule.warmup_steps = 50
  config.schedule.cooldown_steps = 150

  if runlocal:
    shrink(config)
  return config
