"""Sparse upcycling (Komatsuzaki et al. 2023, section 3) as a rule table.

Each expert of a new MoE layer is a copy of the MLP it replaces, the router is new, and everything
else is carried over. T5 and ViT share this: the MLP of a layer is at LAYER/mlp/NAME and its experts
at LAYER/moe/experts/NAME. Optimizer state lies under 'opt_state/' at the same paths with the slots
below them, one expert's slots being those of the dense leaf, so the same rules tile it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from moejax.config import ConfigError, check_choice
from moejax.surgery import rules
from moejax.surgery.rules import Rule

OPT_STATE = 'opt_state/'


def upcycle_rules(source_paths: Collection[str], target_paths: Collection[str],
                  optimizer: str) -> list[Rule]:
  """The table that turns a dense (or partly sparse) state into a sparser one.

  Args:
    source_paths: paths of the parent's state.
    target_paths: paths of the wanted state.
    optimizer: 'carry' the parent's slots, tiled over experts (the new router's start at zero), or
      'reset' all of them.

  Returns:
    Rules for `rules.apply`: a layer that is MoE in the target only is upcycled; a layer that is MoE
    in both is copied.

  Raises:
    ConfigError: an MoE layer of the target has neither an MLP nor experts in the source, no layer
      is new, or optimizer state is to be carried and there is none.
  """
  source_paths, target_paths = set(source_paths), set(target_paths)
  table, rest = _optimizer_rules(source_paths, target_paths, optimizer)
  upcycled = []
  for layer in sorted({m[1] for p in target_paths if (m := re.match(r'(.+)/moe/experts/', p))}):
    if optimizer == 'reset' and layer.startswith(OPT_STATE):
      continue
    if any(p.startswith(f'{layer}/moe/') for p in source_paths):
      continue
    if not any(p.startswith(f'{layer}/mlp/') for p in source_paths):
      raise ConfigError(f'{layer}: the parent has neither {layer}/mlp/... to upcycle nor '
                        f'{layer}/moe/... to copy. Its layers: {_layers(source_paths)}. Make the '
                        "model's depth, or moe_layers, fit the parent's.")
    upcycled.append(layer)
    table.append(rules.tile(rf'({re.escape(layer)})/mlp/(.+)', r'\1/moe/experts/\2'))
    if any(p.startswith(f'{layer}/moe/router/') for p in target_paths):
      table.append(rules.fresh(rf'{re.escape(layer)}/moe/router/.+'))
  if not upcycled:
    raise ConfigError('surgery: upcycling was asked for, but no layer of the wanted model is a new '
                      'MoE layer; set moe_layers, or continue the parent as it is.')
  skipped = '|'.join(f'{re.escape(layer)}/mlp/' for layer in upcycled)
  return [*table, rules.copy(f'(?!{skipped}){rest}')]


def continue_rules(source_paths: Collection[str], target_paths: Collection[str],
                   optimizer: str) -> list[Rule]:
  """The table that continues the same model: all copied, or all but a 'reset' optimizer."""
  table, rest = _optimizer_rules(set(source_paths), set(target_paths), optimizer)
  return [*table, rules.copy(rest)]


def fresh_values(target_shapes: Mapping[str, Any],
                 make_param: Callable[[str], Any]) -> Callable[[str], Any]:
  """The `make_fresh` of rules.apply: zero slots and counts; parameters from make_param(path)."""
  def make_fresh(path):
    if not path.startswith(OPT_STATE):
      return make_param(path)
    return np.zeros(target_shapes[path].shape, target_shapes[path].dtype)
  return make_fresh


def _optimizer_rules(source_paths: set[str], target_paths: set[str],
                     optimizer: str) -> tuple[list[Rule], str]:
  """(rules for resetting optimizer state, regular expression of the paths they leave)."""
  check_choice('surgery.optimizer', optimizer, ('carry', 'reset'))
  has = any(p.startswith(OPT_STATE) for p in source_paths)
  wants = any(p.startswith(OPT_STATE) for p in target_paths)
  if optimizer == 'carry':
    if wants and not has:
      raise ConfigError("surgery.optimizer: got 'carry', but the parent has no optimizer state; "
                        "set surgery.optimizer to 'reset'.")
    return [], '.+'
  table = [rules.drop(f'{OPT_STATE}.+')] if has else []
  table += [rules.fresh(f'{OPT_STATE}.+')] if wants else []
  return table, f'(?!{OPT_STATE}).+'


def _layers(paths: set[str]) -> str:
  """The layers of a state, for messages."""
  found = {m[1] for p in paths if (m := re.match(r'(.+)/(?:mlp|moe)/', p))}
  return ', '.join(sorted(found)) or 'none'
