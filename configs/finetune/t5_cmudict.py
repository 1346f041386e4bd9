"""Fine-tunes a run of t5_stdlib.py on cmudict: from the spelling of a word to its pronunciation.

Everything else, the argument included, is as in t5_stdlib_tasks.py. Outputs are scored by phoneme
and word error rate.
"""

from configs.finetune import t5_stdlib_tasks


def get_config(arg=None):
  config = t5_stdlib_tasks.get_config(arg, 'cmudict', encoder_length=40, decoder_length=72)
  config.data.eval_examples = config.data.eval_examples or 1_024   # 16 in :runlocal
  return config
