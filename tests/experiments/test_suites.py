"""Every suite at every scale: its runs can work, its controls cost what they say."""

import functools
import itertools
import math

import pytest

from configs import paper
from experiments import protocol, suites
from experiments import suite as suite_lib
from experiments.untrained import UntrainedRun
from moejax.aot import chips
from moejax.config import ConfigError

NAMES = [name for name in suite_lib.names() if name != 'quickstart']
SCALES = suite_lib.SCALES
STACKS = {'t5': ('encoder', 'decoder'), 'vit': ('',)}
load = functools.cache(suite_lib.load)


def test_all_suites_have_their_place_in_the_order():
  assert sorted(suites.ORDER) == sorted(NAMES)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', NAMES)
def test_a_suite_loads_and_every_arm_stands_in_each_of_its_pairs(name, scale):
  suite = load(name, scale)
  assert suite.claims
  pairs = {}
  for arm in suite.arms:
    pairs.setdefault((arm.domain, arm.name), []).append(arm.pair)
  for domain in {domain for domain, _ in pairs}:
    assert len({tuple(p) for (d, _), p in pairs.items() if d == domain}) == 1
  numbers = max(len(p) for p in pairs.values())
  assert numbers == {'smoke': 1, 'paper': 1, 'colab': 3}.get(scale, numbers)
  assert scale != 'mini' or numbers in (3, 5)


@pytest.mark.parametrize('name', NAMES)
def test_a_suite_says_its_claim_its_source_and_what_would_refute_it(name):
  text = suite_lib.module(name).__doc__
  assert 'refuted' in text.lower() and '20' in text   # a year
  for claim in load(name, 'mini').claims:
    assert claim.source and claim.paper and any(c.isdigit() for c in claim.source)


@pytest.mark.parametrize('name', NAMES)
def test_a_dense_control_stands_in_every_domain(name):
  suite = load(name, 'mini')
  for domain in {arm.domain for arm in suite.arms}:
    arms = [arm for arm in suite.arms if arm.domain == domain]
    if not all(isinstance(arm.run, UntrainedRun) for arm in arms):   # these measure the gap to it
      assert any('dense' in arm.name for arm in arms)


@pytest.mark.parametrize('name', NAMES)
def test_the_paper_scale_fits_its_slices(name):
  """As `sharding` and `dispatch.grouped` ask for; batches and steps are tested in test_paper."""
  for run in load(name, 'paper').runs():
    config, slice_name = run.settings, paper.SLICES[run.config.split('/')[1].removesuffix(
        '_upcycled')]
    count = chips.parse(slice_name)[1]
    assert config.mesh.data == -1 and not count % math.prod(
        (config.mesh.fsdp, config.mesh.expert, config.mesh.model))
    for stack in STACKS[config.model.family]:
      moe = getattr(config.model, f'{stack}_moe'.lstrip('_'))
      experts = config.model.sparse_layers(*([stack] if stack else [])).values()
      assert all(E % config.mesh.expert == 0 for E in experts), run.label
      assert not experts or moe.dispatch != 'grouped' or config.mesh.expert == 1, run.label


def test_experts_lie_on_as_many_devices_as_divide_them():
  t5, vit = protocol.text('paper'), protocol.vision('paper')
  assert (t5.expert_axis, vit.expert_axis) == (16, 8)
  axis = lambda regime, **how: protocol.moe_changes(regime, **how).get('mesh.expert')
  assert axis(t5, moe={'num_experts': 8}) == 8 and axis(vit, moe={'num_experts': 8}) is None
  assert axis(t5) is None and axis(t5, moe={'num_experts': 128}) is None
  assert axis(vit, moe={'experts_per_layer': (2, 4, 12, 14)}) == 2
  assert axis(t5, encoder={'num_experts': 8}, decoder={'num_experts': 4}) == 4
  assert axis(vit, encoder={'dispatch': 'grouped'}) == 1
  assert axis(protocol.vision('mini'), moe={'num_experts': 3}) is None


def test_arms_of_a_pair_share_parent_seed_and_batches_and_pairs_share_none():
  arms = load('dense_vs_upcycled', 'mini').arms
  for arm in arms:
    assert arm.run.settings.seed == arm.pair == arm.base.settings.seed
    assert arm.run.parent is None or arm.run.parent.key == arm.base.key
  assert len({arm.base.key for arm in arms}) == 10   # five of each domain


@pytest.mark.parametrize('make', [protocol.text, protocol.vision])
def test_equal_flops_are_equal_to_half_a_step(make):
  pair = make('mini').pairs()[0]
  up = pair.upcycled(moe={'capacity_factor': 1.0})
  for run in (pair.matched_dense(up), pair.tiled(up, 'stack')):
    spent = run.settings.steps * run.step_flops
    assert abs(spent - up.settings.steps * up.step_flops) <= run.step_flops / 2
    assert run.settings.schedule.cooldown_steps == round(0.4 * run.settings.steps)


def test_the_rungs_of_a_ladder_branch_before_their_cooldown():
  base = protocol.text('mini').early[0]
  arms = [arm for arm in load('scratch_vs_upcycled', 'mini').arms if arm.pair == 0]
  for arm in arms:
    run = arm.run.settings
    assert run.init.mode == 'continue' and run.init.optimizer == 'carry'
    assert run.steps == run.schedule.cooldown_steps
    extra = run.init.step + run.steps - arm.start_step
    assert extra == round(arm.x / 100 * base)
    assert run.steps == round(protocol.COOLDOWN * extra)
    long = arm.run.parent.settings
    assert run.init.step - arm.start_step in (*long.branch_steps, long.steps)


def test_moe_changes_reach_both_stacks_and_capacity_both_factors():
  changes = protocol.moe_changes(protocol.text('mini'), {'capacity_factor': 3.0}, {'k': 1},
                                 {'k': 2})
  assert changes == {
      'model.encoder_moe.capacity_factor': 3.0, 'model.encoder_moe.eval_capacity_factor': 3.0,
      'model.encoder_moe.k': 1, 'model.decoder_moe.capacity_factor': 3.0,
      'model.decoder_moe.eval_capacity_factor': 3.0, 'model.decoder_moe.k': 2}
  assert protocol.moe_changes(protocol.vision('mini'), {'k': 1}, None, {'k': 2}) == {
      'model.moe.k': 1}


def test_the_defaults_of_the_upcycled_configs_are_what_suites_call_the_default():
  for make, scale in itertools.product((protocol.text, protocol.vision), ('mini', 'paper')):
    model = make(scale).pairs()[0].upcycled().settings.model
    stacks = [getattr(model, stack) for stack in ('moe', 'encoder_moe', 'decoder_moe')
              if hasattr(model, stack)]
    assert all(moe.num_experts == make(scale).experts and moe.capacity_factor == 2.0
               for moe in stacks)


def test_a_claim_about_an_arm_that_is_not_there_is_refused():
  suite = load('expert_init', 'mini')
  claim = protocol.text('mini').claim('x', 'y', 'z', 'copies', '<', 'nothing')
  with pytest.raises(ConfigError, match="names the arm 'nothing'"):
    suite_lib.Suite('s', 'mini', suite.arms, (claim,))


@pytest.mark.parametrize('name', NAMES)
def test_the_papers_scale_is_about_the_papers_runs(name):
  assert all(run.config.startswith('paper/') for run in load(name, 'paper').runs())


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', NAMES)
def test_what_a_claim_is_about_is_measured(name, scale):
  suite = load(name, scale)
  for claim in suite.claims:
    split, _, metric = claim.metric.partition('/')
    for arm in suite.arms:
      if arm.domain == claim.domain and arm.name in (claim.a, claim.b):
        run = arm.run.settings
        measured = {'step0': isinstance(arm.run, UntrainedRun), 'validation': True,
                    'probe': metric in {f'{n}shot_accuracy' for n in run.probe.shots}
                    and run.probe.source != ''}
        assert measured.get(split, split in run.eval_splits), (claim.says, arm.name)
