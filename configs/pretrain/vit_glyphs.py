"""ViT on glyphs: 4,096 characters from the fonts inside matplotlib, told apart at 24 x 24 pixels.

The size is one that 2 CPU cores train in minutes. The trunk (before cooldown) is what
vit_glyphs_upcycled.py starts from.
"""

from configs.common import shrink, words
from moejax.models import vit
from moejax.train import config as run_config


def get_config(arg=None):
  config = run_config.default(vit.config('mini', num_classes=4096))
  config.steps = 24_000
  config.eval_every = config.checkpoint_every = 2_000
  config.log_every = 200

  config.data.source = 'glyphs'
  config.data.image.classes = 4096
  config.data.batch_size = 64
  config.data.eval_batch_size = 256
  config.data.eval_examples = 4096

  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 4e-3
  config.optimizer.b2 = 0.99
  config.schedule.name = 'rsqrt'
  config.schedule.warmup_steps = 200
  config.schedule.timescale = 1000
  config.schedule.cooldown_steps = 1_920
  config.schedule.cooldown_to = 0.02

  if words(arg):
    shrink(config)
  return config
