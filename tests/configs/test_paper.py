"""The paper's real runs: sizes, surgery, and the train step at the real batch size, by shapes."""

import dataclasses
import functools
import math
import pathlib
import types

import jax
import pytest

from configs import common, paper
from configs.pretrain import t5_stdlib, vit_glyphs
from moejax import data, models, trees
from moejax.aot import chips, report
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import initialize, optimizer, parallel, validate
from moejax.train.schedule import schedule
from moejax.trees import stacking

EVERY = sorted(p.stem for p in pathlib.Path('configs/paper').glob('*.py') if p.stem != '__init__')
NAMES = [name for name in EVERY if name.startswith(('t5_base', 'vit_b16'))]   # others follow them
UPCYCLED = [(name, 'upcycled') for name in NAMES if name.endswith('superglue')]
RUNS = [(name, '') for name in NAMES] + UPCYCLED


def get_config(name, *words):
  return common.load(f'paper/{name}', ','.join(filter(None, words)) or None)


def resolved(name, *words):
  return run_config.resolve(get_config(name, *words))


@functools.cache
def built(name, *words):
  """(run, its model)."""
  run = resolved(name, *words)
  return run, models.build(run.model, run.execution)


def devices():
  """A mesh of eight, four of them for experts."""
  return parallel.make('mesh', MeshConfig(expert=4))


@pytest.mark.parametrize('name, word', RUNS)
def test_runlocal_is_the_same_kind_of_run(name, word):
  whole, local = resolved(name, word), resolved(name, word, 'runlocal')
  assert (local.optimizer, local.task, local.init) == (whole.optimizer, whole.task, whole.init)
  for key in ('name', 'start', 'timescale'):
    assert getattr(local.schedule, key) == getattr(whole.schedule, key)
  assert not local.data.source.startswith('tfds:') and local.data.source != 'super_glue'
  assert local.steps <= 10
  for stack in stacks(whole):
    assert bool(local.model.sparse_layers(*stack)) == bool(whole.model.sparse_layers(*stack))
    for key in ('router', 'k', 'capacity_factor', 'renormalize', 'balance_weight'):
      assert getattr(moe(local, *stack), key) == getattr(moe(whole, *stack), key)


def stacks(run):
  return [()] if run.model.family == 'vit' else [('encoder',), ('decoder',)]


def moe(run, stack=''):
  return getattr(run.model, f'{stack}_moe' if stack else 'moe')


@functools.cache
def dataset_of(config):
  return data.build(config, seed=0)


@pytest.mark.parametrize('name, word', RUNS)
def test_runlocal_fits_its_data(name, word):
  run = resolved(name, word, 'runlocal')
  one = parallel.make('mesh', MeshConfig(), jax.devices()[:1])
  assert validate.check_fit(run, dataset_of(run.data), models.build(run.model), one) == 1


@pytest.mark.parametrize('name', ['t5_base_upcycled', 't5_large_upcycled', 'vit_b16_upcycled'])
@pytest.mark.parametrize('word', paper.ABLATIONS)
def test_what_the_paper_varies(name, word):
  """A word changes its settings in every sparse stack, and nothing else but the mesh."""
  plain, varied = resolved(name), resolved(name, word)
  for stack in stacks(plain):
    assert moe(varied, *stack) == dataclasses.replace(moe(plain, *stack), **paper.ABLATIONS[word])
  kept = {name: getattr(plain.model, name) for name in ('moe', 'encoder_moe', 'decoder_moe')
          if hasattr(plain.model, name)}
  assert dataclasses.replace(varied.model, **kept) == plain.model
  same = {'model': plain.model, 'mesh': plain.mesh, 'microbatches': plain.microbatches}
  assert dataclasses.replace(varied, **same) == plain
  assert varied.mesh.expert == min(plain.mesh.expert, paper.ABLATIONS[word].get('num_experts', 32))
  run_config.resolve(get_config(name, word, 'runlocal'))


@pytest.mark.parametrize('config', [vit_glyphs, t5_stdlib])
def test_the_shapes_of_a_batch_are_those_that_the_data_has(config):
  run = run_config.resolve(config.get_config('runlocal'))
  batch = dataset_of(run.data).train_batch(0)
  shapes = report.batch_shapes(run)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
      k: (v.shape, v.dtype) for k, v in shapes.items()}


def millions(model):
  return trees.count(model.shapes) / 1e6


# Millions of parameters: T5 v1.1 Base has 247.6 and ViT-B/16 86.6, as published. An upcycled one
# has 31 more copies of each sparse layer's MLP (768 x 2048 x 3; 768 x 3072 x 2 and biases of 3840),
# 12 of them in T5, 6 in ViT, and a router of 768 x 32 for each.
T5, VIT = 247.6, 86.6
T5_MOE = T5 + 12 * (31 * 768 * 2048 * 3 + 768 * 32) / 1e6
VIT_MOE = VIT + 6 * (31 * (768 * 3072 * 2 + 3840) + 768 * 32) / 1e6
MILLIONS = {'t5_base': T5, 't5_base_upcycled': T5_MOE, 'vit_b16': VIT, 'vit_b16_upcycled': VIT_MOE}
# T5 v1.1 Large has 783 and XL 2,850 million, ViT-B/32, L/32 and L/16 88, 306 and 304.
SIZES = {
    't5_large': (783.2, 1024, 2816, 3, 24), 't5_xl': (2849.8, 2048, 5120, 3, 24),
    'vit_b32': (88.2, 768, 3072, 2, 6), 'vit_l32': (306.5, 1024, 4096, 2, 12),
    'vit_l16': (304.3, 1024, 4096, 2, 12)}


@pytest.mark.parametrize('name', SIZES)
def test_the_other_sizes(name):
  dense, D, F, matrices, sparse = SIZES[name]
  experts = sparse * (31 * (matrices * D * F + (D + F if name.startswith('vit') else 0)) + 32 * D)
  for suffix, expected in (('', dense), ('_upcycled', dense + experts / 1e6)):
    (run, model), local = built(name + suffix), resolved(name + suffix, 'runlocal')
    assert millions(model) == pytest.approx(expected, rel=2e-3)
    assert run.execution.scan and local.model.d_model == 32 and local.mesh == MeshConfig()
    assert (pathlib.PurePath(run.init.parent).name == name) == bool(suffix)


def test_every_run_has_a_slice_that_its_mesh_and_batches_fill():
  assert {name.removesuffix('_upcycled') for name in EVERY} == set(paper.SLICES)
  for name, word in [(name, '') for name in EVERY] + UPCYCLED:
    run, model = built(name, word)
    _, count = chips.parse(paper.SLICES[name.removesuffix('_upcycled')])
    sizes = [run.mesh.fsdp, run.mesh.expert, run.mesh.model]
    assert run.mesh.data == -1 and count % math.prod(sizes) == 0
    examples = model.examples_per_group(run.data.text.encoder_length, run.data.text.decoder_length)
    validate.check_batches(run, examples, count // run.mesh.model)
    assert (run.mesh.expert > 1) == ('upcycled' in name + word)
    assert any(stacking.is_stacked(path) for path in model.param_paths)


@functools.cache
def leaves(name, word):
  """{path: shape} of the parameters and optimizer state of a run, and these as its state."""
  state = initialize.state_shapes(*built(name, word), devices())
  return trees.flatten({'params': state.params, 'opt_state': state.opt_state}), state


@pytest.mark.parametrize('name', MILLIONS)
def test_the_train_step_at_the_real_batch_size(name):
  """Real depth, widths, lengths and batch on eight devices, with the checks that a run makes."""
  programs = report.programs_of(resolved(name), devices())
  run, model = programs.run.config, programs.run.model
  assert millions(model) == pytest.approx(MILLIONS[name], rel=2e-3)
  experts = [s for p, s in trees.flatten(programs.single.params).items() if '/experts/' in p]
  assert all(s.sharding.shard_shape(s.shape)[0] == 32 // 4 for s in experts)
  assert bool(experts) == ('upcycled' in name)
  after, objective = programs.train.lower().out_info
  assert objective.shape == ()
  assert jax.tree.leaves(programs.batch)[0].shape[0] == run.data.batch_size
  for part in ('params', 'opt_state', 'window'):
    before, new = (trees.flatten(getattr(state, part)) for state in (programs.shapes, after))
    assert {p: (s.shape, s.dtype) for p, s in before.items()} == {
        p: (s.shape, s.dtype) for p, s in new.items()}
  sparse = {layer for path in trees.flatten(after.window) if '/router_grad' in path
            for layer in stacking.members(path.rpartition('/')[0])}
  assert len(sparse) == sum(len(run.model.sparse_layers(*stack)) for stack in stacks(run))


@pytest.mark.parametrize('name, word, parent', [
    ('t5_base_upcycled', '', ('t5_base', '')), ('vit_b16_upcycled', '', ('vit_b16', '')),
    ('t5_base_superglue', '', ('t5_base', '')),
    ('t5_base_superglue', 'upcycled', ('t5_base_upcycled', '')),
    ('t5_base_superglue', 'experts_8', ('t5_base_upcycled', 'experts_8'))])
def test_surgery_at_the_real_sizes(name, word, parent):
  """Every leaf of the parent and of the child is accounted for, optimizer state too."""
  run, (source, _), (target, state) = resolved(name, word), leaves(*parent), leaves(name, word)
  opened = initialize.Parent(types.SimpleNamespace(shapes=source), {}, {})
  planned = initialize.plan_surgery(run, state, opened)
  assert {move.target for move in planned.moves} >= set(target)
  fresh = {path for path in planned.fresh if path.startswith('params/')}
  assert fresh == {p for p in target if p.startswith('params/') and '/router/' in p
                   and 'upcycled' in name}
  assert pathlib.PurePath(run.init.parent).name == parent[0]


def rate(run, step):
  return float(schedule(run.schedule, run.optimizer.learning_rate, start_step=0,
                        end_step=run.steps)(step))


def test_t5_is_as_its_sources_describe():
  run = resolved('t5_base')
  assert run.optimizer.name == 'adafactor' and not run.optimizer.clip_norm
  for step in (0, 1, 9_999, 10_000, 40_000, 999_999):
    assert rate(run, step) == pytest.approx(max(step, 10_000) ** -0.5)
  upcycled = resolved('t5_base_upcycled')
  assert rate(upcycled, 40_000) == pytest.approx(0.005)   # goes on, without a jump
  for stack, router in (('encoder', 'expert_choice'), ('decoder', 'top_k')):
    assert upcycled.model.sparse_layers(stack) == dict.fromkeys((1, 3, 5, 7, 9, 11), 32)
    settings_of = moe(upcycled, stack)
    assert (settings_of.router, settings_of.capacity_factor) == (router, 2.0)
    assert not settings_of.renormalize and settings_of.router_init_std == 0.02
  assert moe(upcycled, 'encoder').group_size == 4096
  assert (moe(upcycled, 'decoder').k, moe(upcycled, 'decoder').balance_weight) == (2, 0.02)
  assert (upcycled.init.experts, upcycled.init.optimizer) == ('copy', 'reset')
  tuned = resolved('t5_base_superglue', 'upcycled')
  assert all(rate(tuned, step) == pytest.approx(1e-3) for step in (0, 1, 100_000))
  assert tuned.model.dropout_rate == 0.1 and moe(tuned, 'encoder').dropout_rate < 0   # as well
  assert moe(tuned, 'encoder').group_size == 4096 and moe(tuned, 'decoder').group_size == 512
  assert moe(resolved('t5_base_superglue'), 'encoder').group_size == 0


@pytest.mark.parametrize('word', ['switch', 'expert_choice', *paper.ABLATIONS])
def test_a_word_of_the_upcycled_parent_is_one_of_its_fine_tuning(word):
  parent, tuned = resolved('t5_base_upcycled', word), resolved('t5_base_superglue', word)
  assert tuned == resolved('t5_base_superglue', 'upcycled', word)
  for stack in ('encoder', 'decoder'):
    theirs = dataclasses.replace(moe(parent, stack), group_size=moe(tuned, stack).group_size)
    assert moe(tuned, stack) == theirs


def test_vit_is_as_its_sources_describe():
  run, upcycled = resolved('vit_b16'), resolved('vit_b16_upcycled')
  assert run.model.head == 'gap' and run.data.batch_size == 4096
  decay = {path: run.optimizer.weight_decay
           * optimizer.group(run.optimizer, path).weight_decay
           for path in ('head/kernel', 'encoder/layers/00/attention/q/kernel')}
  assert list(decay.values()) == [pytest.approx(3.0), pytest.approx(0.03)]
  assert rate(run, 5_000) == pytest.approx(5e-4) and rate(run, 40_000) == pytest.approx(5e-4)
  assert (run.probe.source, run.probe.shots, run.probe.draws) == ('tfds:imagenet2012', (10,), 5)
  assert upcycled.model.sparse_layers() == dict.fromkeys(range(6, 12), 32)
  assert upcycled.model.moe.router == 'expert_choice' and upcycled.model.moe.renormalize
  assert upcycled.model.moe.capacity_factor == 2.0 and upcycled.init.optimizer == 'carry'
  assert upcycled.steps == (run.steps - run.schedule.cooldown_steps) // 2


def test_a_preset_replaces_the_routing():
  run = resolved('vit_b16_upcycled', 'switch')
  assert (run.model.moe.router, run.model.moe.k) == ('top_k', 1)
  assert run.model.sparse_layers() == dict.fromkeys(range(6, 12), 32)
  run = resolved('t5_base_upcycled', 'expert_choice')   # not causal: stays out of the decoder
  assert (moe(run, 'encoder').router, moe(run, 'decoder').router) == ('expert_choice', 'top_k')
