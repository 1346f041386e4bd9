"""The settings of surgery: where a run starts, and how the experts of a new MoE layer start."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config import check, check_choice

EXPERT_KINDS = ('copy', 'random', 'subset', 'noise', 'drop')
SCALINGS = ('none', 'output', 'all')
TILINGS = ('stack', 'layer')
MODES = ('scratch', 'continue', 'upcycle', 'depth_tile')
TRUNK, END = -1, -2   # values of InitConfig.step that are not the number of a step

# Settings that the other modes do not read: there, a value other than the default is a mistake.
EXPERTS = ('experts', 'copied_experts', 'noise_std', 'reinit_fraction', 'scaling')
USED_BY = {**dict.fromkeys(EXPERTS, ('upcycle',)), 'tiling': ('depth_tile',),
           'new_head': ('continue', 'upcycle')}


@dataclasses.dataclass(frozen=True)
class Gate:
  """The sum of a token's expert weights at step 0, when the router prefers no expert.

  Attributes:
    k: experts per token; for expert choice its capacity factor, which is the average.
    multiple: whether k is the number for every token, and so must be a multiple of G.
    score, renormalize, weight_scale: of MoEConfig.
    key: the config key that sets k, for messages.
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
  """How new experts start; expert_init.py describes the choices.

  Attributes:
    experts, copied_experts, noise_std, reinit_fraction, scaling: see InitConfig.
    seed: of all random draws; each layer and expert has its own.
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
    check_choice('config.init.experts', self.experts, EXPERT_KINDS)
    check_choice('config.init.scaling', self.scaling, SCALINGS)
    for key, kind in (('copied_experts', 'subset'), ('noise_std', 'noise')):
      given = getattr(self, key)
      check((given > 0) == (self.experts == kind) and given >= 0, f'config.init.{key}', given,
            f"above 0 with experts='{kind}', 0 otherwise", f'It is a setting of {kind!r} only.')
    check(0 <= self.reinit_fraction <= 1, 'config.init.reinit_fraction', self.reinit_fraction,
          '0 <= x <= 1', 'It is a fraction of the hidden units.')
    check(self.experts == 'drop' or self.reinit_fraction == 0.5, 'config.init.reinit_fraction',
          self.reinit_fraction, "0.5, its default, unless experts='drop'",
          "Set config.init.experts to 'drop'.")
    check(self.experts == 'copy' or self.scaling == 'none', 'config.init.scaling', self.scaling,
          f"'none' with experts={self.experts!r}", 'Only copies of the MLP keep its function.')


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Start of a run.

  Attributes:
    mode: 'scratch'; 'continue' a parent of the same model; 'upcycle' one of the same depth and
      width in which other layers are sparse, or none; 'depth_tile' one with fewer blocks.
    parent: workdir of the parent run.
    step: which of its checkpoints; -1 is its trunk, the last step before its cooldown, and -2 its
      end, for fine-tuning.
    optimizer: 'carry' the parent's optimizer state, except for new leaves where it means nothing
      (see moejax.surgery.expert_init, upcycle), or 'reset' all of it to zero.
    experts: 'upcycle': new experts are each a 'copy' of the MLP, all fresh ('random'), copies of it
      in a 'subset', copies with 'noise', or copies with some hidden units drawn anew ('drop').
    copied_experts: 'subset': how many are copies, from 1 to E - 1.
    noise_std: 'noise': of each leaf, relative to the standard deviation of its entries.
    reinit_fraction: 'drop': r, of the hidden units.
    scaling: 'upcycle' by copies whose weights do not sum to 1, or that are granular: 'none', or
      scale wo ('output') or the matrices alike ('all') so that the layer starts as the MLP did.
    tiling: 'depth_tile': repeat the whole 'stack' (A B A B) or each 'layer' (A A B B).
    new_head: leave the parent's head and start a fresh one, as for fine-tuning on another task.
  """
  mode: str = 'scratch'
  parent: str = ''
  step: int = TRUNK
  optimizer: str = 'carry'
  experts: str = 'copy'
  copied_experts: int = 0
  noise_std: float = 0.0
  reinit_fraction: float = 0.5
  scaling: str = 'none'
  tiling: str = 'stack'
  new_head: bool = False

  def __post_init__(self):
    check_choice('config.init.mode', self.mode, MODES)
    check_choice('config.init.optimizer', self.optimizer, ('carry', 'reset'))
    check(bool(self.parent) == (self.mode != 'scratch'), 'config.init.parent', self.parent,
          'empty for scratch, otherwise the workdir of a finished run',
          'Set --config.init.parent=DIR, or --config.init.mode.')
    check(self.step >= END, 'config.init.step', self.step, 'a step, -1 (trunk) or -2 (end)',
          'The folder checkpoints of the parent lists its steps.')
    check_choice('config.init.tiling', self.tiling, TILINGS)
    self.expert_init()
    for key, modes in USED_BY.items():
      value, default = getattr(self, key), InitConfig.__dataclass_fields__[key].default
      check(self.mode in modes or value == default, f'config.init.{key}', value,
            f'{default!r} with mode={self.mode!r}', f'It is a setting of {" and ".join(modes)}.')

  @property
  def settings(self) -> dict[str, Any]:
    """The settings that this mode reads, for the receipt."""
    return {key: value for key, value in dataclasses.asdict(self).items()
            if self.mode in USED_BY.get(key, MODES)}

  def expert_init(self, **model: Any) -> ExpertInit:
    """Returns how new experts start. Raises ConfigError.

    model: the fields of ExpertInit that depend on the model and the seed.
    """
    return ExpertInit(**{key: getattr(self, key) for key in EXPERTS}, **model)
