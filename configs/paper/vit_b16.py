"""ViT-B/16 on ImageNet-1k, in place of the dense parent of the paper's vision runs, on JFT-300M.

JFT-300M is not public. ImageNet has 1/240 of its images, and the paper's figures cannot be expected
here. From the paper: global average pooling; a 10-shot least-squares probe on ImageNet, 5 draws.
From the same research group's published Soft MoE config, the nearest there is: batch 4,096, Adam,
rate 1e-3 warmed up over 10,000 steps and falling as 1 / sqrt(step), weight decay 3.0 for the head
and 0.03 for other kernels, clipping at 1. (By a summary, the paper's runs use Adafactor with
momentum, which moejax does not have.) Our choices: 112,000 steps to the trunk (about 380 epochs),
then a cooldown of 22,400; bfloat16; flips and shifted crops, and no mixup.
"""

from configs.common import words
from configs.paper import place, shrink_vit
from moejax.models import vit
from moejax.train import config as run_config


def short_name(size: str) -> str:
  """'B/16' -> 'vit_b16'."""
  return 'vit_' + size.lower().replace('/', '')


def get_config(arg=None, size='B/16'):
  config = run_config.default(vit.config(size, dtype='bfloat16'))
  config.steps = 134_400
  config.log_every = 100
  config.eval_every = config.checkpoint_every = 5_600

  config.data.source = 'tfds:imagenet2012'
  config.data.batch_size = 4096
  config.data.eval_batch_size = 1024
  config.data.threads = 16
  config.data.image.size = 224
  config.data.image.channels = 3
  config.data.image.augment = 'flip_crop'
  config.data.image.mean = config.data.image.std = 0.5   # pixels from -1 to 1

  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.03
  config.optimizer.weight_decay_mask = '(kernel|wi|wo)$'
  config.optimizer.groups = (('^head/', 1.0, 100.0),)   # decayed by 3.0
  config.schedule.name = 'rsqrt'
  config.schedule.warmup_steps = 10_000
  config.schedule.timescale = 10_000
  config.schedule.cooldown_steps = 22_400

  config.probe.source = 'tfds:imagenet2012'
  config.probe.shots = (10,)
  config.probe.examples = 51_200   # about 50 of each class

  place(config, short_name(size))
  if words(arg):
    shrink_vit(config)
  return config
