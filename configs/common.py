"""What config files share: their argument, presets, a tiny version of any run.

The argument after a file's name, as in --config=configs/pretrain/vit_glyphs.py:runlocal, is a list
of words. 'runlocal' makes any run tiny. In a config that upcycles, the name of a preset
(moe/presets.py) replaces its routing. In a config that fine-tunes, 'upcycled' chooses an upcycled
parent; it may be followed by the words of the parent's own argument, as in :upcycled,switch.
"""

import importlib
import pathlib

from ml_collections import ConfigDict

from moejax import config as config_lib
from moejax.config import check, check_choice
from moejax.moe import presets

SIZES = ('layers', 'num_experts', 'experts_per_layer', 'group_size')   # keys that presets leave


def load(name: str, arg: str | None = None) -> ConfigDict:
  """get_config(arg) of the config file `name`, such as 'vit_glyphs' or 'paper/t5_base'."""
  return importlib.import_module(f'configs.{path(name).replace("/", ".")}').get_config(arg)


def path(name: str) -> str:
  """The path of a config file below configs/: 'vit_glyphs' -> 'pretrain/vit_glyphs'.

  name: of the file, with or without its folder. Raises ConfigError if there is no such file.
  """
  root = pathlib.Path(__file__).parent
  paths = [str(file.relative_to(root).with_suffix('')) for file in root.glob('*/*.py')
           if file.stem != '__init__']
  by_name = {p.rpartition('/')[2]: p for p in paths} | {p: p for p in paths}
  check_choice('config', name, by_name)
  return by_name[name]


def words(arg: str | None, *others: str) -> list[str]:
  """The words of a config's argument. Raises ConfigError unless all are 'runlocal' or in others."""
  given = [word.strip() for word in arg.split(',')] if arg else []
  for word in given:
    check_choice('config argument', word, ['runlocal', *others])
  return given


def preset(arg: str | None, *others: str) -> tuple[str | None, str | None]:
  """The preset in the argument of a config that upcycles, and the argument of its dense parent.

  others: words that the argument may have besides. Either result is None if there is none.
  """
  given = words(arg, *presets.BY_NAME, *others)
  names = [word for word in given if word in presets.BY_NAME]
  check(len(names) <= 1, 'config argument', arg, 'one preset', 'Drop the others.')
  return names[0] if names else None, 'runlocal' if 'runlocal' in given else None


def of_parent(arg: str | None, *others: str) -> tuple[str | None, bool]:
  """Reads the argument of a config that fine-tunes.

  others: words of an upcycled parent's argument besides presets.

  Returns:
    The argument of the upcycled parent, or None if the parent is dense, and whether this run is
    'runlocal'. A word of an upcycled parent implies 'upcycled'.
  """
  given = words(arg, 'upcycled', *presets.BY_NAME, *others)
  parents = [word for word in given if word not in ('runlocal', 'upcycled')]
  upcycled = 'upcycled' in given or parents
  return ','.join(parents) if upcycled else None, 'runlocal' in given


def t5_stacks(config: ConfigDict) -> list[tuple[ConfigDict, int]]:
  """(MoE settings, tokens per example) of a T5's encoder and decoder."""
  return [(config.model.encoder_moe, config.data.text.encoder_length),
          (config.model.decoder_moe, config.data.text.decoder_length)]


def set_moe(moe: ConfigDict, name: str) -> None:
  """Sets all keys of `moe`, an MoEConfig as ConfigDict, but SIZES to those of a preset."""
  sizes = {key: moe[key] for key in SIZES}
  moe.update(config_lib.as_config_dict(presets.preset(name, **sizes)))


def shrink(config: ConfigDict) -> None:
  """Makes the run a few steps long, to see that it works."""
  config.steps = 8
  config.schedule.warmup_steps = 2
  config.schedule.cooldown_steps = 4
  config.log_every = 2
  config.eval_every = config.checkpoint_every = 4
  config.data.batch_size = config.data.eval_batch_size = 16
  config.data.eval_examples = 16
