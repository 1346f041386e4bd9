"""The rules of one new MoE layer: how its experts, shared experts and router start.

The experts start from the MLP that the layer replaces (`ExpertInit.experts`):

- 'copy': every expert is the MLP (Komatsuzaki et al. 2023, section 3). Where experts have G times
  fewer hidden units, every G successive experts are the MLP cut into G shards (He et al. 2024,
  2410.07524, call these a virtual group): see below.
- 'random': every expert is fresh, as the new model initialises it, each from its own key (the
  baseline of Komatsuzaki et al., B.5).
- 'subset': the first `copied_experts` are copies, the others fresh (B.5).
- 'noise': copies with Gaussian noise, `noise_std` times the standard deviation of each of the
  parent's matrices. (We do not know the paper's amounts; the unit is our choice.)
- 'drop': Drop-Upcycling (Nakamura et al. 2025, 2502.19261): each expert is a copy in which the
  fraction r of the hidden units is drawn anew from N(mean, std) of the replaced entries of each
  matrix. A unit is a column of wi_gate and wi_up (or wi, and an entry of its bias) and a row of wo:
  one set of units per expert serves all of them. (The public code draws a set per matrix.)

Shards. Expert e of N is shard e mod G of the MLP. The new router has the columns of a router of N/G
MLPs, each repeated G times: the G shards of one MLP tie, and a token whose number of experts is a
multiple of G gets whole MLPs. The shards sum up to the MLP, so the layer's output is T / G times
that of the MLP, T the sum of a token's expert weights; `scaling` undoes it with c = G / T. T is 1
where weights are renormalised or a softmax over the chosen. Otherwise it is computed for a router
without preferences: k / N for a softmax over all experts (which gives c = N G / k, the paper's
E G^2 / T), k / 2 for sigmoids; the scale is then right on average only.

- scaling 'none': the layer's output is T / G times the MLP's at step 0.
- scaling 'output': wo times c. Equal to the MLP at step 0 for any activation.
- scaling 'all' (the paper's, which trains better there): wi_gate, wi_up (or wi) and wo times one
  factor, the cube root of c if gated or with squared ReLU, else the square root. For gated squared
  ReLU, which the paper does not have, it is the fourth root. Exact for activations with
  act(s x) = s^n act(x), relu and squared_relu; approximate for gelu and silu.

In either case wo_bias, which all N experts have, is multiplied by 1 / T (1 / G without scaling), so
that the G shards, or a token's experts together, count it once, as the MLP does. Noise on logits
breaks ties, so that in training a token may get some shards of an MLP without the others.

Shared experts (moe/shared) start as the first hidden units of the MLP, as many as they have, with
that share of wo_bias. They add to the routed experts: the function at step 0 is then not the
parent's.

Optimizer state. Where the parent's is carried, experts that are copies or noisy copies get it,
tiled; fresh experts of a subset start with zero moments and their own count 0. It is not carried,
and starts from zero, where its moments are not those of the new leaf's gradient: re-initialised
experts (a leaf has one count per expert, and a count carried over units without moments makes their
first update many times too large), shards and scaled leaves (their gradients are scaled by the
inverse factors, and Adafactor's factored moments, sums over hidden units, cannot be cut), shared
experts.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

from moejax.config import check, fail
from moejax.surgery.config import ExpertInit, Gate
from moejax.trees import rules
from moejax.trees.rules import Rule
from moejax.trees.transforms import Noise, Reinit, Repeat, Shard, Slice, Subset, Tile, Transform

OPT_STATE = 'opt_state/'


def layer_rules(source: Mapping[str, Any], target: Mapping[str, Any], layer: str, carry: bool,
                init: ExpertInit) -> list[Rule]:
  """The rules that turn the MLP of one layer into its experts, shared experts and router.

  Args:
    source, target: {path: anything with shape} of both states.
    layer: path of the layer among the parameters.
    carry: whether the MLP's optimizer state becomes that of the experts.
    init: how experts start.

  Returns:
    Rules that take every leaf under LAYER/mlp/ and make every leaf under LAYER/moe/.

  Raises:
    ConfigError: experts of these sizes cannot start so.
  """
  mlp, moe = f'{layer}/mlp/', f'{layer}/moe/'
  names = [p.removeprefix(mlp) for p in source if p.startswith(mlp)]
  size = _Size.of(source, target, layer, names)
  size.check(layer, init)
  moments = OPT_STATE + layer.removeprefix('params/') if carry else ''
  table = []
  for name in names:
    how = _expert(init, size, layer, name)
    targets = {f'{moe}experts/{name}': how} if how else {}
    if size.shared:
      share = size.shared / size.hidden if name == 'wo_bias' else 1.0
      targets[f'{moe}shared/{name}'] = Slice(_hidden_axis(name), share)
    source_path = re.escape(mlp + name)
    table.append(rules.derive(source_path, targets) if targets else rules.drop(source_path))
    if how is None:
      table.append(rules.fresh(re.escape(f'{moe}experts/{name}')))
    if moments:
      table += _moment_rules(moments, name, how, bool(size.shared))
  for path in (p for p in target if p.startswith(f'{moe}router/')):
    repeated = size.shards > 1 and init.experts == 'copy' and len(target[path].shape) > 1
    table.append(rules.fresh(re.escape(path), Repeat(size.shards) if repeated else None))
    if moments:
      table.append(rules.fresh(re.escape(f'{moments}/moe/{path.removeprefix(moe)}') + '/.+'))
  return table


def _moment_rules(layer: str, name: str, how: Transform | None, shared: bool) -> list[Rule]:
  """The rules for the optimizer state of one leaf; `layer` is its path there.

  how: how the experts' leaf is made; None: fresh.
  """
  source, experts = f'{re.escape(layer)}/mlp/{name}/(.+)', f'{layer}/moe/experts/{name}'
  if isinstance(how, Tile | Noise | Subset):
    tiled = how if isinstance(how, Subset) else Tile()
    table = [rules.derive(source, {rf'{experts}/\1': tiled})]
  else:
    table = [rules.drop(source), rules.fresh(f'{re.escape(experts)}/.+')]
  return table + ([rules.fresh(f'{re.escape(layer)}/moe/shared/{name}/.+')] if shared else [])


@dataclasses.dataclass(frozen=True)
class _Size:
  """The sizes of a new MoE layer.

  Attributes:
    experts: E.
    hidden: F, hidden units of the MLP.
    shards: G; an expert has F / G hidden units.
    shared: hidden units of the shared experts; 0: there are none.
    gated: whether the MLP has a wi_gate.
  """
  experts: int
  hidden: int
  shards: int
  shared: int
  gated: bool

  @classmethod
  def of(cls, source, target, layer, names) -> '_Size':
    width = lambda tree, path: (tuple(tree[path].shape) or (0,))[-1] if path in tree else 0
    first = next((n for n in names if n in ('wi', 'wi_gate')), '')
    expert = next((tuple(leaf.shape) for path, leaf in target.items()
                   if path.startswith(f'{layer}/moe/experts/')), (0,))
    F, narrow = width(source, f'{layer}/mlp/{first}'), width(target, f'{layer}/moe/experts/{first}')
    # The rules themselves refuse a width that does not divide F.
    shards = F // narrow if narrow and F % narrow == 0 else 1
    return cls(expert[0], F, shards, width(target, f'{layer}/moe/shared/{first}'),
               first == 'wi_gate')

  def check(self, layer: str, init: ExpertInit) -> None:
    """Raises ConfigError unless experts of these sizes can start as `init` describes."""
    check(init.experts in ('copy', 'random') or self.shards == 1, 'config.init.experts',
          init.experts, f'copy or random where experts are {self.shards} times narrower than the '
          f'MLP ({layer})', 'Set granularity to 1, or use copies.')
    if init.experts == 'copy':
      check(self.experts % self.shards == 0, f'experts of {layer}', self.experts,
            f'a multiple of their granularity, {self.shards}', 'Every MLP needs all its shards.')
    check(init.experts != 'subset' or init.copied_experts < self.experts,
          'config.init.copied_experts', init.copied_experts,
          f'fewer than the {self.experts} experts of {layer}', "To copy all, use experts='copy'.")
    check(self.shared <= self.hidden, f'hidden units of the shared experts of {layer}', self.shared,
          f'at most the {self.hidden} of the MLP they are made from',
          'Lower shared_experts or raise granularity.')


def _expert(init: ExpertInit, size: _Size, layer: str, name: str) -> Transform | None:
  """The transform that makes the experts' leaf `name`; None: it is fresh."""
  axis = _hidden_axis(name)
  layer = layer.removeprefix('params/')
  seed = (init.seed % 2**64, zlib.crc32(layer.encode()))
  own_seed = (*seed, zlib.crc32(name.encode()))
  if init.experts == 'random':
    return None
  if init.experts == 'subset':
    return Subset(init.copied_experts)
  if init.experts == 'noise':
    return Noise(init.noise_std, own_seed)
  if init.experts == 'drop':
    redrawn = axis is not None and round(init.reinit_fraction * size.hidden) > 0
    return Reinit(init.reinit_fraction, axis, seed, own_seed) if redrawn else Tile()
  scale = _scale(init, size, layer, name)
  same = scale == 1 and (size.shards == 1 or axis is None)
  return Tile() if same else Shard(size.shards, axis, scale)


def _scale(init: ExpertInit, size: _Size, layer: str, name: str) -> float:
  """The factor of leaf `name` of a shard: see the module's docstring."""
  c = 1.0
  if init.scaling != 'none':
    c = size.shards / _gate(init, size, layer).total(size.experts)
  if name == 'wo_bias':
    return c / size.shards
  if init.scaling == 'all':
    degree = 2 if init.squared else 1
    return c ** (1 / (degree + size.gated + 1))
  return c if name == 'wo' else 1.0


def _gate(init: ExpertInit, size: _Size, layer: str) -> Gate:
  """The gate of the layer's stack. Raises ConfigError if its k leaves MLPs without some shards."""
  stack = layer.removeprefix('params/').split('/layers/')[0]
  if stack not in init.gates:
    fail('config.init.scaling', init.scaling, f"'none' in {stack}",
         'Only for the routers top_k and expert_choice is it known what weights sum to.')
  gate = init.gates[stack]
  check(not gate.multiple or gate.k % size.shards == 0, gate.key, gate.k,
        f'a multiple of the granularity, {size.shards}, with scaling={init.scaling!r}',
        'A token would get some shards of the MLP without the others.')
  return gate


def _hidden_axis(name: str) -> int | None:
  """The axis of hidden units in the MLP's leaf `name`; None if it has none."""
  if name == 'wo_bias':
    return None
  return 0 if name == 'wo' else -1
