"""The tables of surgery: sparse upcycling, continuing, and depth tiling.

Sparse upcycling (Komatsuzaki et al. 2023, section 3): each expert of a new MoE layer is a copy of
the MLP it replaces (or made from it in another way: expert_init), the router is new, and everything
else is carried over. T5 and ViT share this: the MLP of a layer is at LAYER/mlp/NAME and its experts
at LAYER/moe/experts/NAME. Optimizer state lies under 'opt_state/' at the same paths with the slots
below them, one expert's slots being those of the dense leaf, so the same rules tile it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.config import ConfigError, check_choice, fail
from moejax.surgery import depth_tile, expert_init
from moejax.surgery.expert_init import OPT_STATE, ExpertInit
from moejax.trees import rules
from moejax.trees.rules import Rule

Shapes = Mapping[str, Any]   # path -> anything with a shape
COPIES = ExpertInit()


def upcycle_rules(source: Shapes, target: Shapes, optimizer: str,
                  experts: ExpertInit = COPIES, *, new_head: bool = False) -> list[Rule]:
  """The table that turns a dense (or otherwise sparse) state into a sparse one.

  A layer that is MoE in the target only is upcycled; one that is MoE in both is copied; one that is
  MoE in the parent only becomes the experts' average w0 + mean(w_i - w0), its router is dropped,
  and its optimizer slots start from zero (experts' moments are of gradients of their own tokens
  alone, and their counts may differ).

  Args:
    source: the parent's state, {path: anything with shape}.
    target: the wanted state, likewise.
    optimizer: 'carry' the parent's slots (what starts afresh starts at zero; see expert_init), or
      'reset' all of them.
    experts: how new experts start.
    new_head: leave the parent's head/ and start a fresh one, slots included.

  Returns:
    Rules for `rules.apply`.

  Raises:
    ConfigError: an MoE layer of the target has neither an MLP nor experts in the source, or another
      number of experts there; no layer changes; new experts do not fit; or optimizer state is to
      be carried and there is none.
  """
  table, rest = _optimizer_rules(source, target, optimizer)
  carry = optimizer == 'carry' and any(p.startswith(OPT_STATE) for p in source)
  _check_experts(source, target)
  old, new = _layers(source, 'moe'), _layers(target, 'moe')
  changed = []
  for layer in sorted(new - old):
    if layer not in _layers(source, 'mlp'):
      raise ConfigError(f'{layer}: the parent has neither {layer}/mlp/... to upcycle nor '
                        f'{layer}/moe/... to copy. Its layers: '
                        f'{", ".join(sorted(old | _layers(source, "mlp"))) or "none"}. Make the '
                        "model's depth, or moe_layers, fit the parent's.")
    changed.append(f'{layer}/mlp/')
    table += expert_init.layer_rules(source, target, layer, carry, experts)
  for layer in sorted((old - new) & _layers(target, 'mlp')):
    changed.append(f'{layer}/moe/')
    table += _average_rules(source, layer, carry)
  if not changed:
    raise ConfigError('surgery: upcycling was asked for, but no layer of the wanted model is a new '
                      'MoE layer; set moe_layers, or continue the parent as it is.')
  changed += [OPT_STATE + path.removeprefix('params/') for path in changed]
  head, rest_but_head = _head_rules(carry, rest) if new_head else ([], rest)
  skipped = '|'.join(map(re.escape, changed))
  return [*table, *head, rules.copy(f'(?!{skipped}){rest_but_head}')]


def continue_rules(source: Shapes, target: Shapes, optimizer: str, *,
                   new_head: bool = False) -> list[Rule]:
  """The table that continues the same model: all copied but a 'reset' optimizer and a new head."""
  table, rest = _optimizer_rules(source, target, optimizer)
  _check_experts(source, target)
  carry = optimizer == 'carry' and any(p.startswith(OPT_STATE) for p in source)
  head, rest = _head_rules(carry, rest) if new_head else ([], rest)
  return [*table, *head, rules.copy(rest)]


def depth_tile_rules(source: Shapes, target: Shapes, optimizer: str, tiling: str) -> list[Rule]:
  """The table of depth tiling; see depth_tile."""
  table, rest = _optimizer_rules(source, target, optimizer)
  carry = optimizer == 'carry' and any(p.startswith(OPT_STATE) for p in source)
  tiled, taken = depth_tile.block_rules(source, target, tiling, carry)
  return [*table, *tiled, rules.copy(f'(?!{taken}){rest}')]


def fresh_values(target_shapes: Shapes, make_param: Callable[[str], Any]) -> Callable[[str], Any]:
  """The `make_fresh` of rules.apply: zero slots and counts; parameters from make_param(path)."""
  def make_fresh(path):
    if not path.startswith(OPT_STATE):
      return make_param(path)
    return np.zeros(target_shapes[path].shape, target_shapes[path].dtype)
  return make_fresh


def _average_rules(source: Shapes, layer: str, carry: bool) -> list[Rule]:
  """Rules that make an MoE layer dense: the experts' average."""
  if any(p.startswith(f'{layer}/moe/shared/') for p in source):
    fail(f'{layer}', 'an MoE layer with shared experts', 'one without, to be made dense',
         'Shared and routed experts add up; no single MLP of this size is both. Keep it sparse.')
  moe = re.escape(f'{layer}/moe')
  table = [rules.mean(f'{moe}/experts/(.+)', rf'{layer}/mlp/\1')]
  slots = OPT_STATE + layer.removeprefix('params/')
  if any(p.startswith(f'{layer}/moe/router/') for p in source):
    table.append(rules.drop(f'{moe}/router/.+'))
  if carry:
    table += [rules.drop(f'{re.escape(slots)}/moe/.+'), rules.fresh(f'{re.escape(slots)}/mlp/.+')]
  return table


def _head_rules(carry: bool, rest: str) -> tuple[list[Rule], str]:
  """(rules for a new head, regular expression of the paths in `rest` that they leave)."""
  head = f'(?:params/{f"|{OPT_STATE}" if carry else ""})?head/.+'
  return [rules.drop(head), rules.fresh(head)], f'(?!{head}){rest}'


def _optimizer_rules(source: Shapes, target: Shapes, optimizer: str) -> tuple[list[Rule], str]:
  """(rules for resetting optimizer state, regular expression of the paths they leave)."""
  check_choice('config.init.optimizer', optimizer, ('carry', 'reset'))
  has = any(p.startswith(OPT_STATE) for p in source)
  wants = any(p.startswith(OPT_STATE) for p in target)
  if optimizer == 'carry':
    if wants and not has:
      raise ConfigError("config.init.optimizer: got 'carry', but the parent has no optimizer "
                        "state; set config.init.optimizer to 'reset'.")
    return [], '.+'
  table = [rules.drop(f'{OPT_STATE}.+')] if has else []
  table += [rules.fresh(f'{OPT_STATE}.+')] if wants else []
  return table, f'(?!{OPT_STATE}).+'


def _check_experts(source: Shapes, target: Shapes) -> None:
  """ConfigError if a layer has another number of experts in the target than in the source."""
  for path in source:
    m = re.fullmatch(r'(?!opt_state/)(.+)/moe/experts/.+', path)
    if m and path in target:
      given, wanted = (tuple(tree[path].shape)[0] for tree in (target, source))
      if given != wanted:
        fail(f'experts of {m[1]}', given, f"the parent's {wanted}",
             'Experts are made from a dense MLP only, not from other experts: set num_experts '
             '(or experts_per_layer) as the parent has it.')


def _layers(state: Shapes, kind: str) -> set[str]:
  """Parameter paths of the layers that have an 'mlp', or are 'moe'."""
  below = 'moe/experts' if kind == 'moe' else kind
  return {m[1] for p in state if (m := re.match(rf'(?!{OPT_STATE})(.+)/{below}/', p))}
