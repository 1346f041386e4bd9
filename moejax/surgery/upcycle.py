"""The rule tables of surgery: sparse upcycling, continuing, and depth tiling.

Sparse upcycling (Komatsuzaki et al. 2023, section 3): each expert of a new MoE layer is a copy of
the MLP that it replaces (or starts from it in another way: expert_init), the router is new, and
everything else is carried over. T5 and ViT share the tables: the MLP of a layer is at
LAYER/mlp/NAME, its experts at LAYER/moe/experts/NAME. The optimizer state of a parameter is at the
parameter's path under 'opt_state/', and that of one expert has the shapes of the MLP's, so the same
rules tile it.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moejax.config import ConfigError, fail
from moejax.surgery import depth_tile, expert_init
from moejax.surgery.config import ExpertInit
from moejax.surgery.expert_init import OPT_STATE
from moejax.trees import rules
from moejax.trees.rules import Rule
from moejax.trees.transforms import Mean

Shapes = Mapping[str, Any]   # path -> anything with a shape
COPIES = ExpertInit()


def upcycle_rules(source: Shapes, target: Shapes, optimizer: str,
                  experts: ExpertInit = COPIES, *, new_head: bool = False) -> list[Rule]:
  """The table that turns a dense (or otherwise sparse) state into a sparse one.

  A layer that is MoE in the target only is upcycled. A layer that is MoE in both is copied. A layer
  that is MoE in the parent only becomes the experts' average w0 + mean(w_i - w0), its router is
  dropped, and its optimizer state starts from zero (each expert's moments are of the gradients of
  its own tokens alone, and counts may differ).

  Args:
    source: the parent's state, {path: anything with shape}.
    target: the new state, {path: anything with shape}.
    optimizer: 'carry' the parent's optimizer state (new leaves start from zero; see expert_init),
      or 'reset' all of it.
    experts: how new experts start.
    new_head: leave the parent's head/ and start a fresh one, with fresh optimizer state.

  Returns:
    Rules for `rules.plan`.

  Raises:
    ConfigError: an MoE layer of the target has neither an MLP nor experts in the source, or another
      number of experts there; no layer changes; new experts do not fit; or optimizer state is to
      be carried and there is none.
  """
  table, rest, carry = _optimizer_rules(source, target, optimizer)
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
    raise ConfigError("surgery: config.init.mode is 'upcycle', but no layer of the model is a new "
                      'MoE layer; set moe_layers, or continue the parent as it is.')
  changed += [OPT_STATE + path.removeprefix('params/') for path in changed]
  head, rest_but_head = _head_rules(carry, rest) if new_head else ([], rest)
  skipped = '|'.join(map(re.escape, changed))
  return [*table, *head, rules.copy(f'(?!{skipped}){rest_but_head}')]


def continue_rules(source: Shapes, target: Shapes, optimizer: str, *,
                   new_head: bool = False) -> list[Rule]:
  """The table that copies all leaves but a 'reset' optimizer's and a new head."""
  table, rest, carry = _optimizer_rules(source, target, optimizer)
  _check_experts(source, target)
  head, rest = _head_rules(carry, rest) if new_head else ([], rest)
  return [*table, *head, rules.copy(rest)]


def depth_tile_rules(source: Shapes, target: Shapes, optimizer: str, tiling: str) -> list[Rule]:
  """The table of depth tiling; see depth_tile."""
  table, rest, carry = _optimizer_rules(source, target, optimizer)
  tiled, taken = depth_tile.block_rules(source, target, tiling, carry)
  return [*table, *tiled, rules.copy(f'(?!{taken}){rest}')]


def fresh_values(target_shapes: Shapes, make_param: Callable[[str], Any]) -> Callable[[str], Any]:
  """The `make_fresh` of rules.apply: optimizer state is zero, parameters are make_param(path)."""
  def make_fresh(path):
    if not path.startswith(OPT_STATE):
      return make_param(path)
    return np.zeros(target_shapes[path].shape, target_shapes[path].dtype)
  return make_fresh


def _average_rules(source: Shapes, layer: str, carry: bool) -> list[Rule]:
  """Rules that make an MoE layer dense: its MLP is the experts' average."""
  if any(p.startswith(f'{layer}/moe/shared/') for p in source):
    fail(f'{layer}', 'an MoE layer with shared experts', 'one without, to be made dense',
         'Shared and routed experts add up; no single MLP of this size is both. Keep it sparse.')
  moe = re.escape(f'{layer}/moe')
  table = [rules.derive(f'{moe}/experts/(.+)', {rf'{layer}/mlp/\1': Mean()})]
  state = OPT_STATE + layer.removeprefix('params/')
  if any(p.startswith(f'{layer}/moe/router/') for p in source):
    table.append(rules.drop(f'{moe}/router/.+'))
  if carry:
    table += [rules.drop(f'{re.escape(state)}/moe/.+'), rules.fresh(f'{re.escape(state)}/mlp/.+')]
  return table


def _head_rules(carry: bool, rest: str) -> tuple[list[Rule], str]:
  """(rules for a new head, the regular expression `rest` without the paths that they take)."""
  head = f'(?:params/{f"|{OPT_STATE}" if carry else ""})?head/.+'
  return [rules.drop(head), rules.fresh(head)], f'(?!{head}){rest}'


def _optimizer_rules(source: Shapes, target: Shapes,
                     optimizer: str) -> tuple[list[Rule], str, bool]:
  """(rules that reset optimizer state, expression for other paths, whether it is carried)."""
  in_source, in_target = (any(p.startswith(OPT_STATE) for p in state) for state in (source, target))
  if optimizer == 'carry':
    if in_target and not in_source:
      raise ConfigError("config.init.optimizer: got 'carry', but the parent has no optimizer "
                        "state; set config.init.optimizer to 'reset'.")
    return [], '.+', in_source
  table = [rules.drop(f'{OPT_STATE}.+')] if in_source else []
  table += [rules.fresh(f'{OPT_STATE}.+')] if in_target else []
  return table, f'(?!{OPT_STATE}).+', False


def _check_experts(source: Shapes, target: Shapes) -> None:
  """Raises ConfigError if the number of experts of an MoE layer changes."""
  for path in source:
    m = re.fullmatch(r'(?!opt_state/)(.+)/moe/experts/.+', path)
    if m and path in target:
      given, parents = (tuple(tree[path].shape)[0] for tree in (target, source))
      if given != parents:
        fail(f'experts of {m[1]}', given, f"the parent's {parents}",
             'Experts are made from a dense MLP only, not from other experts: set num_experts '
             '(or experts_per_layer) as the parent has it.')


def _layers(state: Shapes, kind: str) -> set[str]:
  """Parameter paths of the layers of a kind: 'mlp' or 'moe'."""
  below = 'moe/experts' if kind == 'moe' else kind
  return {m[1] for p in state if (m := re.match(rf'(?!{OPT_STATE})(.+)/{below}/', p))}
