"""Fine-tunes a run of t5_stdlib.py on stdlib_tasks, three text-to-text tasks about Python code.

--config.init.parent=DIR names the run; with :upcycled it is a run of t5_stdlib_upcycled.py, with
:switch of t5_stdlib_upcycled.py:switch, and so for each preset. As in T5's fine-tuning the rate is
constant and dropout 0.1, also in experts; the rate 1e-3, there for Adafactor, is our choice for
Adam. Outputs are decoded greedily and scored at the end.
"""

from configs.common import of_parent, shrink, t5_stacks
from configs.pretrain import t5_stdlib
from configs.upcycle import t5_stdlib_upcycled


def get_config(arg=None, source='stdlib_tasks', encoder_length=256, decoder_length=32):
  parents_arg, runlocal = of_parent(arg)
  parent = t5_stdlib if parents_arg is None else t5_stdlib_upcycled
  config = parent.get_config(parents_arg)
  config.init.mode = 'continue'
  config.init.parent = f'runs/{parent.__name__.rpartition(".")[2]}'
  config.init.step = -2   # its end, cooled, not its trunk
  config.init.optimizer = 'reset'
  config.steps = 2_000
  config.log_every = 100
  config.eval_every = config.checkpoint_every = 500

  config.data.source = source
  config.data.text.encoder_length = encoder_length
  config.data.text.decoder_length = decoder_length
  config.data.batch_size = 32
  config.data.eval_examples = 0
  for moe, length in t5_stacks(config):
    moe.group_size = moe.group_size and 8 * length   # 8 sequences, as before

  config.model.dropout_rate = 0.1
  config.optimizer.learning_rate = 1e-3
  config.schedule.name = 'constant'
  config.schedule.start = 'restart'
  config.schedule.warmup_steps = 100
  config.schedule.cooldown_steps = 400

  if runlocal:
    shrink(config)
  return config
