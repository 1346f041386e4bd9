"""How the experts of a new MoE layer start, as a rule table for one layer.

The choices (`ExpertInit.experts`), all from the MLP the layer replaces:

- 'copy': every expert is the MLP (Komatsuzaki et al. 2023, section 3). Where the experts have G
  times fewer hidden units, every G of them in a row are the MLP cut into G (virtual groups;
  He et al. 2024, 2410.07524): see below.
- 'random': every expert is fresh, as the new model initialises it, each from a key of its own
  (the baseline of Komatsuzaki et al., B.5).
- 'subset': the first `copied_experts` are copies, the others fresh (B.5).
- 'noise': copies with Gaussian noise, `noise_std` times the standard deviation of each of the
  parent's matrices (the paper's own amounts are not known to us; this unit is our choice).
- 'drop': Drop-Upcycling (Nakamura et al. 2025, 2502.19261): each expert is a copy in which the
  fraction r of the hidden units is drawn anew from N(mean, std) of the replaced entries of each
  matrix. A unit is a column of wi_gate and wi_up (or wi, and an entry of its bias) and a row of wo:
  one set of units per expert serves all of them. (The public code draws a set per matrix.)

Virtual groups. With N experts in groups of G, expert e is shard e mod G of the MLP, and the new
router's columns are those of N/G groups, each repeated G times: all shards of a group tie, and a
token whose number of experts is a multiple of G gets whole groups. A group sums up to the MLP, so
the layer's output is the MLP's times T / G, T the sum of a token's expert weights; `scaling` undoes
the factor with c = G / T. T is 1 where weights are renormalised or a softmax over the chosen.
Otherwise it is taken for a router that has no preference yet: k / N for a softmax over all
experts (which gives c = N G / k, the paper's E G^2 / T), k / 2 for sigmoids; there the scale is
right on average only.

- scaling 'none': the layer's output is T / G times the MLP's at step 0.
- scaling 'output': wo times c. Equal to the MLP at step 0 for any activation.
- scaling 'all' (the paper's, which trains better there): wi_gate, wi_up (or wi) and wo times the
  same factor, the cube root of c if gated or with squared ReLU, else the square root; gated squared
  ReLU, which the paper has not, takes the fourth root. Exact for activations with
  act(s x) = s^n act(x), relu and squared_relu. For gelu and silu only approximately the MLP.

In either case wo_bias, which all N experts have, is multiplied by 1 / T (1 / G without scaling): a
whole group, or a token's experts together, then count it once, as the MLP does. Noise on the logits
breaks ties, so that a token may meet parts of groups while training.

Shared experts (moe/shared) start as the first hidden units of the MLP, as many as they have, with
that share of wo_bias. They come on top of the routed experts: the function at step 0 is then not
the parent's.

Optimizer state that is carried follows copies (tiled), noisy copies, and the copies of a subset,
whose fresh experts start with zero slots and their own count 0. It does not follow what has no
moments of its own, and exactly these leaves start from zero: re-initialised experts (a leaf has one
count per expert, and a count carried over units without moments makes their first update many
times too large), shards and scaled leaves (their gradients are scaled by the inverse factors, and
Adafactor's factored moments, sums over hidden units, cannot be cut), shared experts.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

from moejax.config import check, check_choice, fail
from moejax.trees import rules
from moejax.trees.rules import Rule
from moejax.trees.transforms import Noise, Reinit, Repeat, Shard, Slice, Subset, Tile, Transform

EXPERTS = ('copy', 'random', 'subset', 'noise', 'drop')
SCALINGS = ('none', 'output', 'all')
OPT_STATE = 'opt_state/'


@dataclasses.dataclass(frozen=True)
class Gate:
  """What a token's expert weights sum to at step 0, when the router prefers no expert.

  Attributes:
    k: experts per token; expert choice: its capacity factor, the average.
    multiple: whether k is the number for every token and must be a multiple of G.
    score, renormalize, weight_scale: of MoEConfig.
    key: what sets k, for messages.
  """
  k: float
  multiple: bool = True
  score: str = 'softmax'
  renormalize: bool = False
  weight_scale: float = 1.0
  key: str = 'moe.k'

  def total(self, num_experts: int) -> float:
    """T, the sum of the weights."""
    if self.renormalize or self.score == 'softmax_of_chosen':
      return self.weight_scale
    each = 0.5 if self.score == 'sigmoid' else 1 / num_experts
    return self.weight_scale * each * self.k


@dataclasses.dataclass(frozen=True)
class ExpertInit:
  """How new experts start; see the module's docstring.

  Attributes:
    experts: 'copy', 'random', 'subset', 'noise' or 'drop'.
    copied_experts: 'subset': how many are copies, from 1 to E - 1.
    noise_std: 'noise': relative to the standard deviation of each of the parent's leaves.
    reinit_fraction: 'drop': r.
    scaling: 'none', 'output' or 'all'; with 'copy'.
    seed: of all that is drawn here; per layer and expert.
    gates: {stack: Gate}, for scaling.
    squared: whether the activation is squared, for scaling 'all'.
  """
  experts: str = 'copy'
  copied_experts: int = 0
  noise_std: float = 0.0
  reinit_fraction: float = 0.5
  scaling: str = 'none'
  seed: int = 0
  gates: Mapping[str, Gate] = dataclasses.field(default_factory=dict)
  squared: bool = False

  def __post_init__(self):
    check_choice('config.init.experts', self.experts, EXPERTS)
    check_choice('config.init.scaling', self.scaling, SCALINGS)
    for key, of, given in (('copied_experts', 'subset', self.copied_experts),
                           ('noise_std', 'noise', self.noise_std)):
      check((given > 0) == (self.experts == of) and given >= 0, f'config.init.{key}', given,
            f"above 0 with experts='{of}', 0 otherwise", f'It is a setting of {of!r} only.')
    check(0 <= self.reinit_fraction <= 1, 'config.init.reinit_fraction', self.reinit_fraction,
          '0 <= x <= 1', 'It is a fraction of the hidden units.')
    check(self.experts == 'drop' or self.reinit_fraction == 0.5, 'config.init.reinit_fraction',
          self.reinit_fraction, "0.5, its default, unless experts='drop'",
          "Set config.init.experts to 'drop'.")
    check(self.experts == 'copy' or self.scaling == 'none', 'config.init.scaling', self.scaling,
          f"'none' with experts={self.experts!r}", 'Only copies of the MLP keep its function.')


def layer_rules(source: Mapping[str, Any], target: Mapping[str, Any], layer: str, carry: bool,
                init: ExpertInit) -> list[Rule]:
  """The rules that turn the MLP of one layer into its experts, shared experts and router.

  Args:
    source, target: {path: anything with shape} of both states.
    layer: path of the layer among the parameters.
    carry: whether the MLP's optimizer slots become those of the experts.
    init: how.

  Returns:
    Rules that take every leaf under LAYER/mlp/ and make every leaf under LAYER/moe/.

  Raises:
    ConfigError: the experts' sizes do not fit the way they are to start.
  """
  mlp, moe = f'{layer}/mlp/', f'{layer}/moe/'
  names = [p.removeprefix(mlp) for p in source if p.startswith(mlp)]
  size = _Size.of(source, target, layer, names)
  size.check(layer, init)
  slots = OPT_STATE + layer.removeprefix('params/') if carry else ''
  table = []
  for name in names:
    how = _expert(init, size, layer, name)
    targets = {f'{moe}experts/{name}': how} if how else {}
    if size.shared:
      targets[f'{moe}shared/{name}'] = _shared(size, name)
    source_path = re.escape(mlp + name)
    table.append(rules.derive(source_path, targets) if targets else rules.drop(source_path))
    if how is None:
      table.append(rules.fresh(re.escape(f'{moe}experts/{name}')))
    if slots:
      table += _slot_rules(slots, name, how, bool(size.shared))
  for path in (p for p in target if p.startswith(f'{moe}router/')):
    grouped = size.groups > 1 and init.experts == 'copy' and len(target[path].shape) > 1
    table.append(rules.fresh(re.escape(path), *([Repeat(size.groups)] if grouped else [])))
    if slots:
      table.append(rules.fresh(re.escape(f'{slots}/moe/{path.removeprefix(moe)}') + '/.+'))
  return table


def _slot_rules(slots: str, name: str, how: Transform | None, shared: bool) -> list[Rule]:
  """Rules for the optimizer state of one leaf: slots is the layer's path there."""
  source, experts = f'{re.escape(slots)}/mlp/{name}/(.+)', f'{slots}/moe/experts/{name}'
  if isinstance(how, Tile | Noise | Subset):
    slot_how = how if isinstance(how, Subset) else Tile()
    table = [rules.derive(source, {rf'{experts}/\1': slot_how})]
  else:
    table = [rules.drop(source), rules.fresh(f'{re.escape(experts)}/.+')]
  return table + ([rules.fresh(f'{re.escape(slots)}/moe/shared/{name}/.+')] if shared else [])


@dataclasses.dataclass(frozen=True)
class _Size:
  """Of a new MoE layer: E experts; F hidden units of the MLP and F / groups of an expert; hidden
  units of the shared MLP (0: none); whether there is a wi_gate."""
  experts: int
  hidden: int
  groups: int
  shared: int
  gated: bool

  @classmethod
  def of(cls, source, target, layer, names) -> '_Size':
    width = lambda tree, path: (tuple(tree[path].shape) or (0,))[-1] if path in tree else 0
    first = next((n for n in names if n in ('wi', 'wi_gate')), '')
    expert = next((tuple(leaf.shape) for path, leaf in target.items()
                   if path.startswith(f'{layer}/moe/experts/')), (0,))
    F, narrow = width(source, f'{layer}/mlp/{first}'), width(target, f'{layer}/moe/experts/{first}')
    # A width that does not divide is left to the strictness of the rules.
    groups = F // narrow if narrow and F % narrow == 0 else 1
    return cls(expert[0], F, groups, width(target, f'{layer}/moe/shared/{first}'),
               first == 'wi_gate')

  def check(self, layer: str, init: ExpertInit) -> None:
    """ConfigError unless the experts can start as `init` says."""
    check(init.experts in ('copy', 'random') or self.groups == 1, 'config.init.experts',
          init.experts, f'copy or random where experts are {self.groups} times narrower than the '
          f'MLP ({layer})', 'Set granularity to 1, or use virtual groups (copy).')
    if init.experts == 'copy':
      check(self.experts % self.groups == 0, f'experts of {layer}', self.experts,
            f'a multiple of their granularity, {self.groups}', 'Virtual groups must be whole.')
    check(init.experts != 'subset' or init.copied_experts < self.experts,
          'config.init.copied_experts', init.copied_experts,
          f'fewer than the {self.experts} experts of {layer}', "To copy all, use experts='copy'.")
    check(self.shared <= self.hidden, f'hidden units of the shared experts of {layer}', self.shared,
          f'at most the {self.hidden} of the MLP they are made from',
          'Lower shared_experts or raise granularity.')


def _expert(init: ExpertInit, size: _Size, layer: str, name: str) -> Transform | None:
  """How the experts' leaf `name` is made; None: fresh."""
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
  same = scale == 1 and (size.groups == 1 or axis is None)
  return Tile() if same else Shard(size.groups, axis, scale)


def _scale(init: ExpertInit, size: _Size, layer: str, name: str) -> float:
  """The factor of leaf `name` in virtual groups."""
  c = 1.0
  if init.scaling != 'none':
    c = size.groups / _gate(init, size, layer).total(size.experts)
  if name == 'wo_bias':
    return c / size.groups
  if init.scaling == 'all':
    degree = 2 if init.squared else 1
    return c ** (1 / (degree + size.gated + 1))
  return c if name == 'wo' else 1.0


def _gate(init: ExpertInit, size: _Size, layer: str) -> Gate:
  """The gate of the layer's stack, checked against the groups."""
  stack = layer.removeprefix('params/').split('/layers/')[0]
  if stack not in init.gates:
    fail('config.init.scaling', init.scaling, f"'none' in {stack}",
         'What weights sum to is known for the routers top_k and expert_choice.')
  gate = init.gates[stack]
  check(not gate.multiple or gate.k % size.groups == 0, gate.key, gate.k,
        f'a multiple of the granularity, {size.groups}, with scaling={init.scaling!r}',
        'A token would meet some shards of the MLP without the others.')
  return gate


def _shared(size: _Size, name: str) -> Slice:
  """How the shared experts' leaf `name` is made."""
  return Slice(_hidden_axis(name), size.shared / size.hidden if name == 'wo_bias' else 1.0)


def _hidden_axis(name: str) -> int | None:
  """Axis of hidden units in the MLP's leaf `name`; None: it has none."""
  if name == 'wo_bias':
    return None
  return 0 if name == 'wo' else -1
