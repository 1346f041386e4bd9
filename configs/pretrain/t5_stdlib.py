"""T5 v1.1 on stdlib_text: span corruption of the bytes of Python's own standard library.

2 CPU cores train this size in minutes. t5_stdlib_upcycled.py starts from the trunk, the last
checkpoint before the cooldown.
"""

from configs.common import shrink, words
from moejax.models import t5
from moejax.train import config as run_config


def get_config(arg=None):
  config = run_config.default(t5.config('mini'))
  config.steps = 24_000
  config.eval_every = config.checkpoint_every = 2_000
  config.log_every = 200

  config.data.source = 'stdlib_text'
  config.data.batch_size = 16
  config.data.eval_batch_size = 128
  config.data.eval_examples = 2048

  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 6e-3
  config.optimizer.b2 = 0.99
  config.schedule.name = 'rsqrt'
  config.schedule.warmup_steps = 200
  config.schedule.timescale = 1000
  config.schedule.cooldown_steps = 1_920
  config.schedule.cooldown_to = 0.02

  if words(arg):
    shrink(config)
  return config
