"""Small MoE runs for tests that train whole runs, in this process or in others."""

import dataclasses
import pathlib
from typing import Any

from configs.pretrain import vit_glyphs
from moejax.models import vit
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config

STEPS = 20
AT_STEP = 13   # between two checkpoints and inside a window of train metrics
AT_EVAL = 10   # an evaluation, and then a checkpoint


def write(path: pathlib.Path, moe: dict[str, Any], **changes: Any) -> pathlib.Path:
  """config.json of a ViT with dropout, a dense block, a sparse one and a cooldown: its path."""
  config = vit_glyphs.get_config('runlocal')
  config.steps = STEPS
  config.schedule.cooldown_steps = 5
  config.log_every, config.eval_every, config.checkpoint_every = 5, AT_EVAL, 5
  config.model.update(d_model=16, d_ff=32, num_layers=2, dropout_rate=0.1)
  config.model.moe.update(layers='last_1', num_experts=4, **moe)
  config.update_from_flattened_dict(changes)
  path.write_text(run_config.to_json(run_config.resolve(config)))
  return path


def digits(moe: MoEConfig, **changes: Any) -> run_config.RunConfig:
  """A run of one block on 8 x 8 digits, the cheapest there is, with some settings changed."""
  config = run_config.default(vit.config('tiny', num_layers=1))
  config.data.source, config.data.image.size = 'digits', 8
  config.data.batch_size = config.data.eval_batch_size = config.data.eval_examples = 16
  config.schedule.warmup_steps, config.eval_splits = 2, ()
  config.model.moe.update(dataclasses.asdict(moe))
  config.update_from_flattened_dict(changes)
  return run_config.resolve(config)
