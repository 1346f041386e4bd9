"""Fine-tunes a run of t5_base.py on all SuperGLUE tasks (data/datasets/superglue.py).

--config.init.parent=DIR names the run; with :upcycled it is a run of t5_base_upcycled.py, with
:switch of t5_base_upcycled.py:switch, and so for its other words. From t5x's fine-tuning config:
batch 128, a constant rate of 1e-3, dropout 0.1, also in experts, a checkpoint every 2,000 steps.
512 and 64 tokens are those of public fine-tuning configs, 2**18 steps are T5's; we do not know the
paper's own steps, batch and expert dropout. Outputs are decoded greedily and scored at the end, on
each task and on average; superglue.py lists how these scores differ from the benchmark's.
"""

from configs.common import of_parent, t5_stacks
from configs.paper import ABLATIONS, place, shrink_t5, t5_base, t5_base_upcycled


def get_config(arg=None, size='base'):
  parents_arg, runlocal = of_parent(arg, *ABLATIONS)
  upcycled = parents_arg is not None
  config = (t5_base_upcycled if upcycled else t5_base).get_config(parents_arg, size)
  config.init.mode = 'continue'
  config.init.parent = f'runs/t5_{size}' + ('_upcycled' if upcycled else '')
  config.init.step = -2   # its end: cooled, if it has a cooldown
  config.init.optimizer = 'reset'
  config.steps = 2**18
  config.eval_every = config.checkpoint_every = 2_000

  config.data.source = 'super_glue'
  config.data.text.decoder_length = 64
  config.data.batch_size = 128
  config.data.eval_batch_size = 128
  config.data.eval_examples = 0   # all: of fewer, small tasks would have none
  for moe, length in t5_stacks(config):
    moe.group_size = moe.group_size and 8 * length   # 8 sequences, as before

  experts = config.model.encoder_moe.num_experts if upcycled else 0
  place(config, 't5_base_superglue', experts=experts)   # one routing group a chip
  config.model.dropout_rate = 0.1
  config.optimizer.learning_rate = 1e-3
  config.schedule.name = 'constant'
  config.schedule.start = 'restart'

  if runlocal:
    shrink_t5(config, 'stdlib_tasks', 256, 32)
  return config
