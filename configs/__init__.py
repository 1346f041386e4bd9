"""Run configs: one file is one run, get_config(arg) its ConfigDict; ':runlocal' makes it tiny."""

from ml_collections import ConfigDict

from moejax.config import check_choice


def is_runlocal(arg: str | None) -> bool:
  """True for ':runlocal'. Raises ConfigError on any other argument but none."""
  check_choice('config argument', arg or 'runlocal', ['runlocal'])
  return arg == 'runlocal'


def shrink(config: ConfigDict) -> None:
  """The same run over a handful of steps, to see that it works."""
  config.steps = 8
  config.schedule.warmup_steps = 2
  config.schedule.cooldown_steps = 4
  config.log_every = 2
  config.eval_every = config.checkpoint_every = 4
  config.data.batch_size = config.data.eval_batch_size = 8
  config.data.eval_examples = 16
