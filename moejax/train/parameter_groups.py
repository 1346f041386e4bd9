"""Parameter groups: leaves that share a learning rate and a weight decay, or are frozen.

A group is a regular expression on the paths of leaves ('encoder/layers/01/moe/experts/wi'), as in
big_vision's lr_mults and wd_mults; the usual sets to freeze have names.
"""

import dataclasses
import difflib
import heapq
import re
from collections.abc import Collection

from moejax.config import check, fail, nearest
from moejax.trees import stacking

NO_GRAD = re.compile(r'/no_grad/')  # state among the parameters that the train step itself writes

# Parts of a model that `freeze` takes by name: regular expression, description. all_but_NAME is all
# others. The subsets that ST-MoE fine-tunes (Zoph et al. 2022, section 4.2) are among them.
PARTS = {
    'experts': (r'/experts/', 'routed experts (not shared ones)'),
    'router': (r'/router/', 'routers'),
    'moe': (r'/moe/', 'MoE layers whole: routed and shared experts, routers'),
    'mlp': (r'/mlp/', 'MLPs of the dense layers'),
    'attention': (r'attention/|relative_bias/', 'attention projections and relative biases'),
    'norm': (r'norm/', 'norms'),
    'embedding': (r'embed/', 'token, patch and position embeddings'),
    'head': (r'^head/', 'output head'),
}
ALL_BUT = 'all_but_'
REGEX = 're:'


@dataclasses.dataclass(frozen=True)
class Group:
  """Multipliers of the learning rate and the weight decay of a leaf."""
  learning_rate: float = 1.0
  weight_decay: float = 1.0


def check_settings(groups: tuple, freeze: str) -> tuple:
  """Returns groups as ((regex, rate multiplier, decay multiplier), ...) of plain types.

  Raises:
    ConfigError: an entry of another form, a multiplier below 0, a regular expression that does not
      compile, or a `freeze` that is neither '', a name in PARTS, all_but_NAME, nor 're:...'.
  """
  form = "(regex, learning rate multiplier, weight decay multiplier), as in (('^head/', 10, 1),)"
  number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  for i, entry in enumerate(groups):
    ok = (isinstance(entry, list | tuple) and len(entry) == 3 and isinstance(entry[0], str)
          and all(map(number, entry[1:])))
    check(ok, f'optimizer.groups[{i}]', entry, form, 'Every group is one such triple.')
    check(min(entry[1:]) >= 0, f'optimizer.groups[{i}]', entry, 'multipliers of 0 or more',
          'A multiplier of 0 freezes the leaves.')
    _check_regex(f'optimizer.groups[{i}]', entry[0])
  if freeze.startswith(REGEX):
    _check_regex('optimizer.freeze', freeze.removeprefix(REGEX))
  elif freeze and freeze.removeprefix(ALL_BUT) not in PARTS:
    known = ', '.join(f'{name} ({meaning})' for name, (_, meaning) in PARTS.items())
    near = nearest(freeze, [*PARTS, *(ALL_BUT + name for name in PARTS)])
    fail('optimizer.freeze', freeze,
         f"'' (nothing), '{REGEX}REGEX', or NAME or {ALL_BUT}NAME with NAME one of {known}",
         f'Did you mean {near!r}?' if near else 'Choose one of these.')
  return tuple((regex, float(rate), float(decay)) for regex, rate, decay in groups)


def _check_regex(key: str, pattern: str) -> None:
  try:
    re.compile(pattern)
  except re.error as error:
    fail(key, pattern, 'a regular expression', f'It does not compile: {error}.')


def group(config, path: str) -> Group:
  """Returns the first of config.groups whose regular expression is found in path, else 1 and 1.

  path: of a parameter; for a stacked one (trees/stacking.py) that of its first block counts, here
    and in `frozen`: `check_stacked` makes sure that all its blocks agree.
  """
  path = stacking.members(path)[0]
  for regex, learning_rate, weight_decay in config.groups:
    if re.search(regex, path):
      return Group(learning_rate, weight_decay)
  return Group()


def frozen(config, path: str) -> bool:
  """Whether a leaf is frozen, by `freeze` or by a learning rate multiplier of 0.

  A frozen leaf keeps its value and its optimizer state bit for bit, is not decayed, and is not in
  the global gradient norm; its state is there to be carried, or thawed, later.

  Args:
    config: OptimizerConfig.
    path: of a parameter.
  """
  path = stacking.members(path)[0]
  return _matches(config.freeze, path) or group(config, path).learning_rate == 0


def untouched(config, path: str) -> bool:
  """Whether the optimizer does not change a leaf: it is frozen, or state without gradient."""
  return bool(NO_GRAD.search(path)) or frozen(config, path)


def _matches(freeze: str, path: str) -> bool:
  """Whether path is in the set that `freeze` names."""
  if not freeze:
    return False
  if freeze.startswith(REGEX):
    return bool(re.search(freeze.removeprefix(REGEX), path))
  regex, _ = PARTS[freeze.removeprefix(ALL_BUT)]
  return bool(re.search(regex, path)) != freeze.startswith(ALL_BUT)


def check_groups(config, paths: Collection[str]) -> None:
  """Checks that every group, and the frozen set, has leaves.

  Args:
    config: OptimizerConfig.
    paths: of all parameters.

  Raises:
    ConfigError: a pattern that no leaf matches, naming the nearest leaves; a group all of whose
      leaves belong to earlier groups; or nothing left to train.
  """
  trainable = [path for path in paths if not NO_GRAD.search(path)]
  if config.freeze:
    part = config.freeze.removeprefix(ALL_BUT)
    regex = PARTS[part][0] if part in PARTS else part.removeprefix(REGEX)
    _check_found('optimizer.freeze', config.freeze, regex, trainable)
  taken = set()
  for i, (regex, *_) in enumerate(config.groups):
    found = _check_found(f'optimizer.groups[{i}]', regex, regex, trainable)
    check(not found <= taken, f'optimizer.groups[{i}]', regex,
          'a pattern with leaves that no earlier group has',
          'The first match wins: put the narrower pattern first.')
    taken |= found
  check(any(not frozen(config, path) for path in trainable), 'optimizer.freeze', config.freeze,
        'a set that leaves something to train', 'With optimizer.groups, every leaf is frozen.')


def check_stacked(config, param_paths: Collection[str]) -> None:
  """Checks that the optimizer treats all blocks of a scan equally.

  Args:
    config: OptimizerConfig.
    param_paths: paths of all parameters, some of them stacked.

  Raises:
    ConfigError: a group, the frozen set or the decay mask tells blocks of one scan apart.
  """
  treated = lambda path: (group(config, path), untouched(config, path),
                          bool(re.search(config.weight_decay_mask, path)))
  for path in param_paths:
    first, *others = stacking.members(path)
    for other in others:
      check(treated(other) == treated(first), 'config.execution.scan', True,
            f'False, since the optimizer treats {first} and {other} differently',
            'Blocks that run in one scan share groups, freeze and weight_decay_mask.')


def _check_found(key: str, given: str, regex: str, paths: Collection[str]) -> set[str]:
  """Returns the paths in which regex is found. Raises ConfigError if there is none."""
  found = {path for path in paths if re.search(regex, path)}
  check(bool(found), key, given, f'what matches a leaf ({regex!r} matches none)',
        'Nearest leaves: ' + ', '.join(nearest_leaves(regex, paths)) + '.')
  return found


def nearest_leaves(regex: str, paths: Collection[str], number: int = 3) -> list[str]:
  """Returns the paths of which some part ('moe/router') is most similar to the expression."""
  word = re.sub(r'[^\w/]', '', regex).strip('/')

  def likeness(path):
    names = path.split('/')
    stretches = ('/'.join(names[i:j]) for i in range(len(names)) for j in range(i, len(names) + 1))
    return max(difflib.SequenceMatcher(None, word, s).ratio() for s in stretches)

  return heapq.nlargest(number, paths, key=likeness)
