"""ViT on glyphs: classifies 4,096 characters from the fonts inside matplotlib, at 24 x 24 pixels.

2 CPU cores train this size in minutes. vit_glyphs_upcycled.py starts from the trunk, the last
checkpoint before the cooldown.
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
