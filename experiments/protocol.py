"""The protocol of all suites: sizes of each scale, and runs of one (dense parent, seed) pair.

It is the paper's protocol (Komatsuzaki et al. 2023). A dense model is pretrained with a
reciprocal-square-root rate. Its trunk is the checkpoint before any cooldown. Continuations branch
from the trunk and keep the parent's step, rate and data. Each ends with a cooldown over the same
fraction of its own steps. A pair is a dense parent and a seed: all arms of a pair start from one
trunk and see equal batches, so their differences are paired. Pairs differ in everything random:
initial weights, order of the data, routers' initial weights, noise.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.paper import EXPERT_AXIS
from experiments.suite import SCALES, Arm, Claim, Run
from experiments.untrained import UntrainedRun
from moejax.config import check_choice

COOLDOWN = 0.4   # of a continuation's steps
MARGIN = 0.005   # nats; a smaller difference counts as no difference


@dataclasses.dataclass(frozen=True)
class Regime:
  """Sizes of the runs of one domain at one scale.

  Attributes:
    domain: its name in tables; the first word is `family`.
    config: the dense config file; the name of the one that upcycles it ends in _upcycled.
    trunk: steps of dense pretraining.
    extra: steps of a continuation.
    evaluations: number in a continuation, without the one at its start.
    core, other: number of pairs of the core suites and a few more, and of the others.
    stacks: config keys of the MoE settings; the first is the encoder's or the ViT's.
    metric: of claims that name no other.
    margin: the difference in it that counts as none, see MARGIN.
    early: further steps of pretraining where the suites about its amount branch.
    changes: of every run: config keys -> values.
    arg: of the config files.
    experts: E, unless a suite varies it.
    depth: blocks of a stack.
    expert_axis: config.mesh.expert of the upcycled config, or 1.
  """
  domain: str
  config: str
  trunk: int
  extra: int
  evaluations: int
  core: int
  other: int
  stacks: tuple[str, ...]
  metric: str
  margin: float
  early: tuple[int, ...] = ()
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  arg: str = ''
  experts: int = 8
  depth: int = 2
  expert_axis: int = 1

  @property
  def family(self) -> str:
    """'T5' or 'ViT'."""
    return self.domain.split()[0]

  @property
  def every(self) -> int:
    """Steps between evaluations of a continuation."""
    return max(1, self.extra // self.evaluations)

  def pairs(self, core: bool = False) -> list['Pair']:
    """The pairs of a suite."""
    return [Pair(self, number) for number in range(self.core if core else self.other)]

  def claim(self, says: str, source: str, paper: str, a: str, relation: str, b: str,
            metric: str = '', domain: str = '', than: tuple[str, ...] = ()) -> Claim:
    """A claim about arms of this domain.

    Many parameters: they are the fields of Claim, most of which every suite gives.
    """
    return Claim(says, source, paper, domain or self.domain, a, relation, b, metric or self.metric,
                 self.margin if relation == '~' else None, than)


ENCODER_DECODER, VIT = ('model.encoder_moe', 'model.decoder_moe'), ('model.moe',)

MINI = {'parallel': 'pmap', 'log_every': 100}   # of every run but the paper's


def text(scale: str) -> Regime:
  """The regime of T5 at a scale. Raises ConfigError on an unknown one."""
  changes = {**MINI, 'data.eval_batch_size': 32, 'data.eval_examples': 1024}
  regime = Regime('T5 on stdlib_text', 't5_stdlib', 24_000, 6_000, 2, 5, 3, ENCODER_DECODER,
                  'test/loss', MARGIN, (4_000, 12_000), changes)
  return _scaled(regime, scale, config='paper/t5_base', domain='T5 Base on C4', trunk=1_000_000,
                 extra=200_000)


def vision(scale: str) -> Regime:
  """The regime of ViT at a scale. Raises ConfigError on an unknown one."""
  changes = {**MINI, 'data.eval_repeats': 2, 'eval_splits': ('test_seen', 'test'),
             'probe.source': 'glyphs', 'probe.skip_classes': 4096, 'probe.drop_rare': True,
             'probe.shots': (1, 5)}   # of the classes that pretraining leaves out
  regime = Regime('ViT on glyphs', 'vit_glyphs', 24_000, 4_800, 2, 5, 3, VIT,
                  'test_seen/loss', MARGIN, (4_000, 12_000), changes, depth=4)
  return _scaled(regime, scale, config='paper/vit_b16', domain='ViT B/16 on ImageNet',
                 trunk=112_000, extra=56_000)


def _scaled(regime: Regime, scale: str, *, trunk: int, extra: int, **paper) -> Regime:
  """The mini regime at another scale; trunk, extra and `paper` are fields at scale 'paper'."""
  check_choice('--scale', scale, SCALES)
  if scale == 'smoke':   # a few steps, only to show that everything runs
    return dataclasses.replace(
        regime, trunk=16, extra=2, evaluations=1, early=(10, 12), core=1, other=1, arg='runlocal',
        changes={**regime.changes, 'log_every': 1, 'data.eval_examples': 8, 'data.eval_repeats': 1,
                 'data.eval_batch_size': 64})   # the probe's are many
  if scale == 'colab':
    return dataclasses.replace(regime, core=3)
  if scale == 'paper':
    return dataclasses.replace(
        regime, trunk=trunk, extra=extra, evaluations=20, core=1, other=1, metric='test/loss',
        early=(trunk // 4, trunk // 2), changes={}, experts=32, depth=12,
        expert_axis=EXPERT_AXIS[paper['config'].removeprefix('paper/')], **paper)
  return regime


class Pair:
  """The runs of one dense parent and one seed; 0 steps are the regime's."""

  def __init__(self, regime: Regime, number: int):
    self.regime, self.number = regime, number

  @functools.cached_property
  def parent(self) -> Run:
    """Dense pretraining to the trunk, then a cooldown as long as that of an equal-steps
    continuation."""
    regime = self.regime
    cooldown = round(COOLDOWN * regime.extra)
    every = 2 * regime.extra
    return self._run('dense pretraining', regime.config, regime.trunk + cooldown, {
        'schedule.cooldown_steps': cooldown, 'branch_steps': regime.early, 'eval_every': every,
        'checkpoint_every': every})

  def dense(self, steps: int = 0, **how) -> Run:
    """The dense model, trained on. `how`: see `branch`."""
    return self.branch('dense', self.regime.config, steps, {'init.mode': 'continue'}, **how)

  def upcycled(self, steps: int = 0, *, init: Mapping[str, Any] | None = None, **how) -> Run:
    """The parent upcycled, and trained on.

    Args:
      steps: of the continuation; 0: the regime's.
      init: changes to config.init, as {'experts': 'random'}.
      how: moe, encoder, decoder: see `moe_changes`; start, changes: see `branch`.
    """
    how, moe = self._moe(how)
    changes = {'init.mode': 'upcycle', **{f'init.{k}': v for k, v in (init or {}).items()}, **moe}
    return self.branch('upcycled', f'{self.regime.config}_upcycled', steps, changes, **how)

  def scratch(self, steps: int = 0, **how) -> Run:
    """The sparse model of `upcycled`, trained from scratch."""
    how, moe = self._moe(how)
    return self.branch('MoE from scratch', f'{self.regime.config}_upcycled', steps,
                       {'init.mode': 'scratch', **moe}, parent=None, **how)

  def matched_dense(self, run: Run, **how) -> Run:
    """The dense model, trained on for as many steps as cost the FLOPs of `run`."""
    return self.equal_flops(run, lambda steps: self.dense(steps, **how))

  def tiled(self, like: Run, tiling: str) -> Run:
    """The parent made twice as deep, trained on for as many steps as cost the FLOPs of `like`.

    tiling: 'stack' (A B A B) or 'layer' (A A B B).
    """
    stacks = self.parent.settings.model.stacks().values()
    changes = {'init.mode': 'depth_tile', 'init.tiling': tiling,
               **{f'model.{stack.depth_key}': 2 * stack.depth for stack in stacks}}
    return self.equal_flops(like, lambda steps: self.branch(
        'depth tiled', self.regime.config, steps, changes))

  def equal_flops(self, like: Run, make: Callable[[int], Run]) -> Run:
    """make(steps), with as many steps as cost the FLOPs of `like`."""
    total = like.settings.steps * like.step_flops
    return make(round(total / make(like.settings.steps).step_flops))

  def cooldown(self, run: Run, step: int, steps: int) -> Run:
    """The cooldown of `run` from its global step `step` on, over `steps` steps."""
    kept = {key: value for key, value in run.changes.items()
            if not key.startswith(('init.', 'branch_steps'))}
    changes = {**kept, 'init.mode': 'continue', 'init.step': step, 'init.optimizer': 'carry',
               'steps': steps, 'schedule.cooldown_steps': steps}
    return dataclasses.replace(run, label=f'{run.label}, cooled from {step:,}', parent=run,
                               changes=changes)

  def finetuned(self, config: str, parent: Run, steps: int = 0) -> Run:
    """The end of `parent` (after its cooldown), fine-tuned by config file `config`.

    steps: 0: the config's own; else a fifth of them is the cooldown, and evaluation comes last.
    """
    sparse = parent.config.endswith('_upcycled')
    model = {key: value for key, value in parent.changes.items()
             if key.startswith('model.') and not key.endswith('group_size')}
    words = [*(['upcycled'] if sparse else []), *([self.regime.arg] if self.regime.arg else [])]
    changes = {key: self.regime.changes[key] for key in ('parallel',) if key in self.regime.changes}
    if steps:
      changes |= {'steps': steps, 'eval_every': steps, 'checkpoint_every': steps,
                  'schedule.cooldown_steps': steps // 5}
    return Run(f'{parent.label}, {config}', config, {**changes, 'seed': self.number, **model},
               parent, ','.join(words))

  def frozen(self, config: str, parent: Run) -> Run:
    """The end of `parent`, probed by config file `config`: fine-tuned for one step, in which only
    the new head is trained."""
    run = self.finetuned(config, parent, 1)
    return dataclasses.replace(run, label=f'{run.label}, frozen', changes={
        **run.changes, 'log_every': 1, 'optimizer.freeze': 'all_but_head',
        'schedule.warmup_steps': 0})

  def untrained(self, *, init: Mapping[str, Any] | None = None, **how) -> UntrainedRun:
    """The first state of `upcycled`, evaluated and never trained."""
    run = self.upcycled(init=init, **how)
    return UntrainedRun(run.label, run.config, run.changes, run.parent, run.arg)

  def branch(self, label: str, config: str, steps: int, own: Mapping[str, Any], *,
             parent: Run | None | str = 'trunk', start: int = 0,
             changes: Mapping[str, Any] | None = None) -> Run:
    """A continuation with its own cooldown.

    Args:
      label: its name in messages.
      config: config file.
      steps: 0: the regime's.
      own: changes to the config that distinguish it.
      parent: the run it starts from; 'trunk': the pair's dense parent; None: from scratch.
      start: step of the parent to branch from; 0: its trunk.
      changes: further changes, which override the others.
    """
    steps = steps or self.regime.extra
    every = self.regime.every
    shared = {'schedule.cooldown_steps': round(COOLDOWN * steps), 'eval_every': every,
              'checkpoint_every': every}
    if start:
      shared['init.step'] = start
    parent = self.parent if parent == 'trunk' else parent
    return self._run(label, config, steps, {**shared, **own, **(changes or {})}, parent)

  def arm(self, name: str, run: Run, *, domain: str = '', **fields) -> Arm:
    """An arm of this pair; fields: see Arm."""
    return Arm(domain or self.regime.domain, name, run, self.parent, self.number, **fields)

  def _moe(self, how: dict) -> tuple[dict, dict]:
    """(`how` without MoE settings, these as config changes)."""
    rest = {k: v for k, v in how.items() if k not in ('moe', 'encoder', 'decoder')}
    return rest, moe_changes(self.regime, **{k: v for k, v in how.items() if k not in rest})

  def _run(self, label: str, config: str, steps: int, changes: Mapping[str, Any],
           parent: Run | None = None) -> Run:
    regime = self.regime
    changes = {**regime.changes, 'seed': self.number, 'steps': steps, **changes}
    if parent is None:
      changes.setdefault('init.mode', 'scratch')
    return Run(f'{regime.family} {label} #{self.number}', config, changes, parent,
               regime.arg)


def moe_changes(regime: Regime, moe: Mapping[str, Any] | None = None,
                encoder: Mapping[str, Any] | None = None,
                decoder: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Changes to MoEConfigs as config changes.

  Where the config spreads experts over devices, mesh.expert is reduced to divide their numbers.

  Args:
    regime: has the stacks.
    moe: of all stacks; capacity_factor is that of evaluation too.
    encoder: of T5's encoder, or of the ViT.
    decoder: of T5's decoder; ignored for a ViT.
  """
  stacks = dict(zip(('encoder', 'decoder'), regime.stacks))
  changes = {}
  for stack, own in (('encoder', encoder), ('decoder', decoder)):
    if stack in stacks:
      for key, value in {**(moe or {}), **(own or {})}.items():
        changes[f'{stacks[stack]}.{key}'] = value
        if key == 'capacity_factor':
          changes[f'{stacks[stack]}.eval_capacity_factor'] = value
  axis = _expert_axis(regime, [{**(moe or {}), **(own or {})} for own in (encoder, decoder)])
  return changes if axis == regime.expert_axis else {**changes, 'mesh.expert': axis}


def _expert_axis(regime: Regime, stacks: Sequence[Mapping[str, Any]]) -> int:
  """The largest config.mesh.expert, up to the config's, over which each stack's experts divide."""
  if any(changes.get('dispatch') == 'grouped' for changes in stacks):
    return 1   # dropless dispatch has all experts on each device
  counts = [n for changes in stacks for n in (
      changes.get('experts_per_layer') or [changes.get('num_experts', regime.experts)])]
  return math.gcd(regime.expert_axis, *counts)
