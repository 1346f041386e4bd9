"""What config files share: words of their argument, presets, sizes to try a run out.

The argument after a file's name, as in --config=configs/pretrain/vit_glyphs.py:runlocal, holds
words: 'runlocal' makes any run tiny; in a config that upcycles, the name of a preset
(moe/presets.py) replaces its routing. One that fine-tunes takes 'upcycled' to start from such a
run, and with it the words that this run was made with, as in :upcycled,switch.
"""

import importlib
import pathlib

from ml_collections import ConfigDict

from moejax import config as config_lib
from moejax.config import check, check_choice
from moejax.moe import presets

SIZES = ('layers', 'num_experts', 'experts_per_layer', 'group_size')   # a config's, not a preset's


def load(name: str, arg: str | None = None) -> ConfigDict:
  """get_config(arg) of the config file of that name, such as 'vit_glyphs' or 'paper/t5_base'."""
  return importlib.import_module(f'configs.{path(name).replace("/", ".")}').get_config(arg)


def path(name: str) -> str:
  """'vit_glyphs' -> 'pretrain/vit_glyphs', where that file is below configs/. Raises ConfigError.

  name: of one file, whatever its folder, or with its folder.
  """
  root = pathlib.Path(__file__).parent
  files = {file.stem: file for file in root.glob('*/*.py')}
  files |= {str(file.relative_to(root).with_suffix('')): file for file in root.glob('*/*.py')}
  check_choice('config', name, files)
  return str(files[name].relative_to(root).with_suffix(''))


def words(arg: str | None, *others: str) -> list[str]:
  """The words of a config's argument: 'runlocal' or one of others. ConfigError on anything else."""
  found = [word.strip() for word in arg.split(',')] if arg else []
  for word in found:
    check_choice('config argument', word, ['runlocal', *others])
  return found


def preset(arg: str | None, *others: str) -> tuple[str | None, str | None]:
  """(the preset named in a config's argument or None, the argument of its dense parent).

  others: words that may stand there too.
  """
  found = words(arg, *presets.BY_NAME, *others)
  names = [word for word in found if word in presets.BY_NAME]
  check(len(names) <= 1, 'config argument', arg, 'one preset', 'Drop the others.')
  return names[0] if names else None, 'runlocal' if 'runlocal' in found else None


def of_parent(arg: str | None, *others: str) -> tuple[str | None, bool]:
  """What the argument of a config that fine-tunes says of the run that it starts from.

  others: words that the config of an upcycled one takes besides presets.

  Returns:
    The argument of the upcycled parent's config, or None if the parent is dense, and whether this
    run is 'runlocal'. A word of the parent's says 'upcycled' as well.
  """
  found = words(arg, 'upcycled', *presets.BY_NAME, *others)
  theirs = [word for word in found if word not in ('runlocal', 'upcycled')]
  upcycled = 'upcycled' in found or theirs
  return ','.join(theirs) if upcycled else None, 'runlocal' in found


def set_moe(moe: ConfigDict, name: str) -> None:
  """Makes `moe`, an MoEConfig as ConfigDict, the preset's in all but SIZES."""
  sizes = {key: moe[key] for key in SIZES}
  moe.update(config_lib.as_config_dict(presets.preset(name, **sizes)))


def shrink(config: ConfigDict) -> None:
  """The same run over a handful of steps, to see that it works."""
  config.steps = 8
  config.schedule.warmup_steps = 2
  config.schedule.cooldown_steps = 4
  config.log_every = 2
  config.eval_every = config.checkpoint_every = 4
  config.data.batch_size = config.data.eval_batch_size = 16
  config.data.eval_examples = 16
