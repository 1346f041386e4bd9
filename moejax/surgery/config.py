"""The settings of surgery: how the experts of a new MoE layer start."""

import dataclasses
from collections.abc import Mapping

from moejax.config import check, check_choice

EXPERT_KINDS = ('copy', 'random', 'subset', 'noise', 'drop')
SCALINGS = ('none', 'output', 'all')


@dataclasses.dataclass(frozen=True)
class Gate:
  """What a token's expert weights sum to at step 0, when the router prefers no expert.

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
    experts: 'copy', 'random', 'subset', 'noise' or 'drop'.
    copied_experts: 'subset': number of experts that are copies, from 1 to E - 1.
    noise_std: 'noise': relative to the standard deviation of each of the parent's leaves.
    reinit_fraction: 'drop': r, of the hidden units.
    scaling: 'none', 'output' or 'all'; with 'copy'.
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
