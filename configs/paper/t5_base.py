"""T5 v1.1 Base on C4: the dense parent of the paper's language runs.

From the paper, via summaries of it: T5 1.1 sizes, span corruption of C4, trained by the authors
themselves. From t5x's and flaxformer's configs: Adafactor with T5's settings, no weight decay, no
gradient clipping; rate 1 / sqrt(max(step, 10,000)), without warm-up or cooldown; z-loss 1e-4; no
dropout; bfloat16; 512 input and 114 target tokens, and a batch of 2,048 (that of T5 1.1; we do not
know the paper's own). Our choices: 1,000,000 steps, as in T5 1.1; a window is cut from a single
document, where t5 packs several; how often and on how many examples the run is evaluated.

--config.data.text.vocabulary=PATH names T5's SentencePiece model (cc_all.32000.100extra).
"""

from configs.common import words
from configs.paper import place, shrink_t5
from moejax.models import t5
from moejax.train import config as run_config


def get_config(arg=None, size='base'):
  config = run_config.default(t5.config(size, dtype='bfloat16'))
  config.steps = 1_000_000
  config.log_every = 100
  config.eval_every = config.checkpoint_every = 10_000

  config.data.source = 'tfds:c4/en'
  config.data.batch_size = 2048
  config.data.eval_batch_size = 1024
  config.data.eval_examples = 8192
  config.data.text.encoder_length = 512
  config.data.text.decoder_length = 114
  config.data.text.noise_density = 0.15
  config.data.text.mean_span_length = 3.0
  config.data.text.vocabulary = 'sentencepiece.model'

  config.optimizer.name = 'adafactor'
  config.optimizer.learning_rate = 0.01   # 1 / sqrt(10,000)
  config.optimizer.clip_norm = 0.0
  config.schedule.name = 'rsqrt'
  config.schedule.warmup_steps = 0
  config.schedule.timescale = 10_000
  config.task.z_loss = 1e-4
  place(config, f't5_{size}')

  if words(arg):
    shrink_t5(config, 'stdlib_text', 114, 32)
  return config
