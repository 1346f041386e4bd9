"""Small MoE runs, states and batches for tests that train, in this process or in others."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.pretrain import vit_glyphs
from moejax.models import vit
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import optimizer
from moejax.train.step import TrainState

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


def images(size: int, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of 8 x 8 images of 10 classes."""
  rng = np.random.default_rng(seed)
  return {'image': rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
          'label': rng.integers(0, 10, size).astype(np.int32),
          'weight': np.ones(size, np.float32), 'index': np.arange(size, dtype=np.int32)}


def state(config: optimizer.OptimizerConfig, params: dict, step: int = 0) -> TrainState:
  """The state of given parameters, with fresh optimizer state and an empty window."""
  return TrainState(jnp.int32(step), params, optimizer.init(config, params),
                    jax.random.key_data(jax.random.key(0)), {})
