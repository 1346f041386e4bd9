"""What is due when, where a run starts, and what does not fit together."""

import dataclasses
import json
import types

import jax.numpy as jnp
import pytest

from moejax import models
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.evaluation.few_shot import ProbeConfig
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig, make_mesh
from moejax.train import config as run_config
from moejax.train import loop, plan
from moejax.train.initialize import InitConfig
from moejax.train.optimizer import OptimizerConfig
from moejax.train.schedule import ScheduleConfig
from tests.train.test_files import DAMAGED

MOE = MoEConfig(layers='1', num_experts=4)
SPLITS = dict.fromkeys(('train', 'validation', 'test'), 9)
IMAGES = types.SimpleNamespace(kind='classification', num_classes=10, image_shape=(8, 8, 1),
                               encoder_length=0, decoder_length=0, fingerprint='f', examples=SPLITS)
TEXT = types.SimpleNamespace(kind='seq2seq', vocab_size=64, num_classes=0, image_shape=(),
                             encoder_length=12, decoder_length=6,
                             fingerprint='f', examples=SPLITS)


def run(model, batch_size=8, eval_batch_size=16, **changes):
  data = run_config.DataConfig(batch_size=batch_size, eval_batch_size=eval_batch_size)
  return run_config.RunConfig(model=model, data=data, **changes)


def fit(config, dataset, shards=1):
  return plan.check_fit(config, dataset, models.build(config.model), shards)


def due(method):
  return [step for step in range(8, 18) if method(step)]


def test_due_dates_are_in_global_steps():
  """A run of 10 steps after a parent's 7, cooling down over the last 4."""
  config = run_config.RunConfig(steps=10, log_every=3, eval_every=6, checkpoint_every=6,
                              schedule=ScheduleConfig(cooldown_steps=4))
  made = plan.Plan.make(config, first=7)
  assert (made.first, made.trunk, made.end) == (7, 13, 17)
  assert due(made.log_due) == [9, 12, 15, 17]
  assert due(made.eval_due) == [12, 17]
  assert due(made.save_due) == [12, 13, 17]    # 13 is the trunk


def test_without_a_cooldown_the_end_is_the_trunk():
  made = plan.Plan.make(run_config.RunConfig(steps=10), first=0)
  assert made.trunk == made.end == 10


def test_branch_points_are_kept_beside_trunk_and_end():
  """Steps 3 and 5 of a run of 10 after a parent's 7 whose last 4 cool down."""
  config = run_config.RunConfig(steps=10, branch_steps=(3, 5), log_every=4, eval_every=8,
                              checkpoint_every=8, schedule=ScheduleConfig(cooldown_steps=4))
  made = plan.Plan.make(config, first=7)
  assert made.branches == (10, 12)
  assert made.kept == {10, 12, 13, 17}
  assert due(made.save_due) == [8, 10, 12, 13, 16, 17]
  assert due(made.log_due) == [8, 12, 16, 17]   # a window is not cut off for a branch
  assert plan.Plan.make(dataclasses.replace(config, branch_steps=(6,)), 7).kept == {13, 17}


@pytest.mark.parametrize('step', [0, -1, 7, 10, 2.5])
def test_branches_leave_the_trunk_before_its_cooldown(step):
  with pytest.raises(ConfigError, match=r'branch_steps: got \(3, .*, allowed: .* from 1 to 6,'):
    run_config.RunConfig(steps=10, branch_steps=(3, step),
                       schedule=ScheduleConfig(cooldown_steps=4))


def test_a_cosine_does_not_go_on_with_a_parents():
  config = run_config.RunConfig(schedule=ScheduleConfig('cosine'))
  plan.Plan.make(config, first=0)
  with pytest.raises(ConfigError, match=r'schedule\.start: got .continue.*step 7'):
    plan.Plan.make(config, first=7)


def test_evaluations_find_the_window_of_their_step():
  for eval_every in (4, 6, 8):
    config = run_config.RunConfig(steps=13, log_every=2, eval_every=eval_every, checkpoint_every=2)
    made = plan.Plan.make(config, first=5)
    assert all(made.log_due(s) for s in range(6, 19) if made.eval_due(s))


def test_first_step_of_a_run_from_scratch_is_0(tmp_path):
  assert plan.first_step(run_config.RunConfig(), tmp_path / 'run') == 0


def test_first_step_is_the_parents_trunk_and_later_what_run_json_says(tmp_path):
  parent, child = tmp_path / 'parent', tmp_path / 'child'
  for directory in (parent, child):
    directory.mkdir()
  (parent / 'config.json').write_text('{}')
  (parent / 'run.json').write_text(json.dumps({'trunk_step': 5, 'first_step': 0}))
  writer = orbax.Writer(parent, 2, {5, 8})
  for step in (5, 8):
    writer.save(step, {'params': {'w': jnp.zeros(2)}}, {})
  writer.close()
  config = run_config.RunConfig(init=InitConfig('continue', parent=str(parent)))
  assert plan.first_step(config, child) == 5
  at_8 = dataclasses.replace(config, init=InitConfig('continue', parent=str(parent), step=8))
  assert plan.first_step(at_8, child) == 8
  (child / 'run.json').write_text(json.dumps({'first_step': 3}))
  assert plan.first_step(config, child) == 3
  (parent / 'run.json').unlink()
  assert plan.first_step(config, child) == 3   # a run that has begun needs its parent no more


@pytest.mark.parametrize('content', [*DAMAGED.values(), b'{}'], ids=[*DAMAGED, 'no first_step'])
def test_a_damaged_run_json_is_said_to_be_so(tmp_path, content):
  (tmp_path / 'run.json').write_bytes(content)
  with pytest.raises(ConfigError, match='^workdir: .*whose run.json can be read. It is damaged: '):
    plan.first_step(run_config.RunConfig(), tmp_path)


def test_a_parent_that_is_not_there(tmp_path):
  config = run_config.RunConfig(init=InitConfig('continue', parent=str(tmp_path / 'none')))
  with pytest.raises(ConfigError, match=r'config\.init\.parent: .*config\.json in it'):
    plan.first_step(config, tmp_path / 'child')


def test_devices_have_whole_heads():
  config = run(vit.config('tiny'), mesh=MeshConfig(data=2, model=4))
  assert config.model.num_heads == 2
  with pytest.raises(ConfigError, match="config.mesh.model: got 4, allowed: a divisor of the 2 h"):
    plan.check_heads(config, make_mesh(config.mesh))
  plan.check_heads(config, make_mesh(MeshConfig(data=4, model=2)))


def test_rows_per_group_of_what_fits():
  assert fit(run(vit.config('tiny')), IMAGES, shards=8) == 1
  # 8 x 8 pixels in patches of 4: 4 tokens an image, so groups of 16 tokens are 4 images.
  grouped = vit.config('tiny', moe=dataclasses.replace(MOE, group_size=16))
  assert fit(run(grouped), IMAGES, shards=2) == 4
  # 24 tokens are 2 inputs of 12; 24 tokens are 4 targets of 6; both: 4.
  both = t5.config('tiny', encoder_moe=dataclasses.replace(MOE, group_size=24),
                   decoder_moe=dataclasses.replace(MOE, router='top_k', group_size=24))
  assert fit(run(both), TEXT, shards=2) == 4


GROUPED = vit.config('tiny', moe=dataclasses.replace(MOE, group_size=16))


@pytest.mark.parametrize('config, dataset, shards, expected', [
    (run(t5.config('tiny')), IMAGES, 1, r"config\.data\.source: got 'glyphs'.*source for 't5'"),
    (run(vit.config('tiny')), TEXT, 1, r"config\.data\.source: got 'glyphs'.*source for 'vit'"),
    (run(vit.config('tiny', num_classes=9)), IMAGES, 1,
     r'config\.model\.num_classes: got 9, allowed: at least 10.*num_classes=10'),
    (run(t5.config('tiny', vocab_size=63)), TEXT, 1,
     r'config\.model\.vocab_size: got 63, allowed: at least 64.*vocab_size=64'),
    (run(vit.config('tiny', image_size=12)), IMAGES, 1, r'got \(12, 12, 1\).*\(8, 8, 1\)'),
    (run(vit.config('tiny', channels=3)), IMAGES, 1, r'got \(8, 8, 3\).*\(8, 8, 1\)'),
    (run(vit.config('tiny'), batch_size=12), IMAGES, 8,
     r'config\.data\.batch_size: got 12, allowed: a multiple of 8 = 1 examples.*8 devices\. '
     r'Nearest: (8|16)\.'),
    (run(GROUPED, batch_size=9), IMAGES, 1, r'batch_size: got 9, .* 4 = 4 examples.*Nearest: 8\.'),
    (run(GROUPED, batch_size=8, microbatches=4), IMAGES, 1,
     r'batch_size: got 8, .* 16 = 4 examples .* 1 devices x 4 microbatches'),
    (run(GROUPED, batch_size=1), IMAGES, 1, r'batch_size: got 1, .*Nearest: 4\.'),
    (run(GROUPED, eval_batch_size=6), IMAGES, 1,
     r'config\.data\.eval_batch_size: got 6, allowed: a multiple of 4 '),
    (run(vit.config('tiny', moe=dataclasses.replace(MOE, group_size=6))), IMAGES, 1,
     r'model\.moe\.group_size: got 6'),
    (run(vit.config('tiny'), eval_splits=('tset',)), IMAGES, 1,
     r"config\.eval_splits: got 'tset', allowed: train, validation, test\. Did you mean 'test'"),
    (run(vit.config('tiny'), eval_splits=(3,)), IMAGES, 1, r'config\.eval_splits: got 3'),
])
def test_what_does_not_fit(config, dataset, shards, expected):
  with pytest.raises(ConfigError, match=expected):
    fit(config, dataset, shards)


@pytest.mark.parametrize('probe_data, expected', [
    (TEXT, 'images with a class each'),
    (types.SimpleNamespace(**vars(IMAGES) | {'image_shape': (8, 8, 3)}),
     r"\(8, 8, 1\)\. Those are \(8, 8, 3\)"),
    (types.SimpleNamespace(**vars(IMAGES) | {'examples': {'train': 9}}),
     "data with a 'test' split. It has train")])
def test_a_probe_that_the_model_cannot_take(probe_data, expected):
  config = run(vit.config('tiny'), probe=ProbeConfig(source='digits'))
  plan.check_probe(config, IMAGES)
  with pytest.raises(ConfigError, match=f"config.probe.source: got 'digits'.*{expected}"):
    plan.check_probe(config, probe_data)


def test_what_a_run_is_resumed_at_begins_a_dispatch_too():
  config = run_config.RunConfig(steps=200, log_every=50, eval_every=50, checkpoint_every=50)
  assert plan.Plan.make(config, 0).whole == plan.Plan.make(config, 0, 150).whole == 50
  assert plan.Plan.make(config, 0, 25).whole == 25
  assert plan.Plan.make(config, 0, 7).whole == 1


def test_more_classes_than_the_data_has_and_evaluation_without_microbatches_fit():
  fit(run(vit.config('tiny', num_classes=11)), IMAGES)
  fit(run(GROUPED, batch_size=16, eval_batch_size=4, microbatches=4), IMAGES)


def test_groups_are_about_leaves_of_the_model():
  def config(**changes):
    return run(vit.config('tiny', moe=MOE), optimizer=OptimizerConfig(**changes))
  fit(config(freeze='experts', groups=(('^head/', 10.0, 1.0),)), IMAGES)
  with pytest.raises(ConfigError, match=r"optimizer\.groups\[0\]: got 'haed'.*head/"):
    fit(config(groups=(('haed', 10.0, 1.0),)), IMAGES)
  dense = run(vit.config('tiny'), optimizer=OptimizerConfig(freeze='all_but_experts'))
  with pytest.raises(ConfigError, match=r"optimizer\.freeze: got 'all_but_experts'"):
    fit(dense, IMAGES)


@pytest.fixture(scope='module')
def branches(tmp_path_factory):
  """A trunk of 8 steps, branches at 4 and at its end: (home, {name: {(step, 'train/loss'): x}})."""
  home = tmp_path_factory.mktemp('branches')
  config = run_config.default(vit.config('tiny', num_layers=1))
  config.data.source, config.data.image.size = 'digits', 8
  config.data.batch_size = config.data.eval_batch_size = config.data.eval_examples = 16
  config.log_every, config.eval_every, config.checkpoint_every = 2, 4, 8
  config.schedule.warmup_steps, config.eval_splits = 2, ()
  found = {}
  for name, steps, changes in (('trunk', 8, {'branch_steps': (4,), 'keep_checkpoints': 1}),
                               ('early', 4, {'init.step': 4}), ('late', 4, {'init.step': -1})):
    config.steps = steps
    config.update_from_flattened_dict(changes)
    if name != 'trunk':
      config.schedule.cooldown_steps, config.branch_steps = 2, ()
      config.init.mode, config.init.parent = 'continue', str(home / 'trunk')
    assert loop.run(run_config.resolve(config), str(home / name)) == 0
    lines = map(json.loads, (home / name / 'metrics.jsonl').read_text().splitlines())
    found[name] = {(line['step'], k): v for line in lines for k, v in line.items()
                   if k.endswith('/loss')}
  return home, found


def test_branches_start_where_the_trunk_was(branches):
  """Same parameters, slots, data and rate: bit for bit the trunk until their own cooldown."""
  home, losses = branches
  assert orbax.finished_steps(home / 'trunk' / orbax.SUBDIR) == [4, 8]
  assert json.loads((home / 'trunk' / 'run.json').read_text())['branch_steps'] == [4]
  trunk, early, late = (losses[name] for name in ('trunk', 'early', 'late'))
  assert min(early) == (4, 'validation/loss') and min(late) == (8, 'validation/loss')
  assert early[min(early)] == trunk[min(early)]
  assert late[min(late)] == trunk[min(late)]
  assert early[6, 'train/loss'] == trunk[6, 'train/loss']   # two updates, then it cools down


def test_branches_end_elsewhere(branches):
  """The trunk at 8, the branch that cooled down at 8, and the longer one: three models."""
  _, losses = branches
  ends = {losses['trunk'][8, 'validation/loss'], losses['early'][8, 'validation/loss'],
          losses['late'][12, 'validation/loss']}
  assert len(ends) == 3


def test_facts():
  config = run(vit.config('tiny', moe=MOE), steps=10, schedule=ScheduleConfig(cooldown_steps=4))
  model = models.build(config.model)
  found = plan.facts(config, plan.Plan.make(config, 7), model, IMAGES)
  assert (found['first_step'], found['trunk_step'], found['end_step']) == (7, 13, 17)
  assert found['data_fingerprint'] == 'f'
  # An expert has 16*32 + 32 + 32*16 + 16 = 1072 parameters. Expert choice with capacity factor 2
  # gives a token 2 of the 4 experts on average: the other 2 are not active.
  assert found['parameters'] - found['parameters_active_per_token'] == 2 * 1072
  assert found['train_flops_per_step'] > 0
  # Embeddings 3, last norm 2, head 2; a block 4 (norms) + 8 (attention), its MLP 4, its MoE 5.
  assert found['leaves'] == 7 + 2 * 12 + 4 + 5
