"""A run is refused, in one line that names the key, before anything is allocated."""

import dataclasses
import json
import types

import jax.numpy as jnp
import pytest

from moejax import models
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.evaluation.few_shot import ProbeConfig
from moejax.losses import TaskConfig
from moejax.models import t5, vit
from moejax.moe.config import MoEConfig
from moejax.sharding import MeshConfig
from moejax.surgery.config import InitConfig
from moejax.train import config as run_config
from moejax.train import initialize, parallel, validate
from moejax.train.optimizer import OptimizerConfig
from moejax.train.workdir import Workdir

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
  devices = types.SimpleNamespace(shards=shards, mesh=types.SimpleNamespace(shape={}))
  return validate.check_fit(config, dataset, models.build(config.model), devices)


def first(config, path):
  """First step of the run of a workdir, and whether its parent was opened."""
  path.mkdir(exist_ok=True)
  plan, parent = validate.start(config, Workdir(path), orbax.finished_steps(path / orbax.SUBDIR))
  return plan.first, parent is not None


def test_a_run_from_scratch_starts_at_0(tmp_path):
  assert first(run_config.RunConfig(), tmp_path / 'run') == (0, False)


def test_first_step_is_the_parents_trunk_and_later_what_run_json_says(tmp_path):
  parent, child = tmp_path / 'parent', tmp_path / 'child'
  parent.mkdir()
  (parent / 'config.json').write_text('{}')
  (parent / 'run.json').write_text(json.dumps({'trunk_step': 5, 'first_step': 0}))
  for directory, steps in ((parent, (5, 8)), (child, (4,))):
    writer = orbax.Writer(directory, 2, {5, 8})
    for step in steps:
      writer.save(step, {'params': {'w': jnp.zeros(2)}})
    writer.close()
  config = run_config.RunConfig(init=InitConfig('continue', parent=str(parent)))
  at_8 = dataclasses.replace(config, init=InitConfig('continue', parent=str(parent), step=8))
  assert first(config, tmp_path / 'new') == (5, True)
  assert first(at_8, tmp_path / 'new') == (8, True)
  assert first(config, child) == (5, True)      # run.json was lost
  for path in (child, tmp_path / 'new'):
    (path / 'run.json').write_text(json.dumps({'first_step': 3}))
  assert first(config, tmp_path / 'new') == (3, True)   # no state is saved yet
  assert first(config, child) == (3, False)
  (parent / 'run.json').unlink()
  assert first(config, child) == (3, False)   # a run with a checkpoint needs its parent no more


@pytest.mark.parametrize('content', [b'{"first_step": 1', b'{}'])
def test_a_damaged_run_json_is_named(tmp_path, content):
  (tmp_path / 'run.json').write_bytes(content)
  with pytest.raises(ConfigError, match='^workdir: .*whose run.json can be read. It is damaged: '):
    first(run_config.RunConfig(), tmp_path)


def test_devices_have_whole_heads():
  config = run(vit.config('tiny'), mesh=MeshConfig(data=2, model=4))
  model = models.build(config.model)
  assert config.model.num_heads == 2
  devices = lambda mesh: parallel.make('mesh', mesh)
  with pytest.raises(ConfigError, match='config.mesh.model: got 4, allowed: a divisor of the 2 h'):
    validate.check_step(config, model, devices(config.mesh))
  assert validate.check_step(config, model, devices(MeshConfig(data=4, model=2))) == 1


def test_examples_per_group_of_what_fits():
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
  validate.check_probe(config, IMAGES)
  with pytest.raises(ConfigError, match=f"config.probe.source: got 'digits'.*{expected}"):
    validate.check_probe(config, probe_data)


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


STUDENT = run_config.RunConfig(model=vit.config('tiny'),
                               task=TaskConfig(teacher='runs/x', distill_weight=0.5))


@pytest.mark.parametrize('changes, said', [
    ({'image_size': 16}, r"student's images, \(8, 8, 1\)\. That one has \(16, 16, 1\)"),
    ({'channels': 3}, r"\(8, 8, 1\)\. That one has \(8, 8, 3\)"),
    ({'num_classes': 11}, 'a run with num_classes 10. That one has num_classes 11')])
def test_a_teacher_of_other_images_or_classes(changes, said, monkeypatch):
  its = run_config.RunConfig(model=dataclasses.replace(STUDENT.model, **changes))
  run = types.SimpleNamespace(config=json.loads(run_config.to_json(its)))
  monkeypatch.setattr(initialize, 'open_run', lambda *args: run)
  with pytest.raises(ConfigError, match=f"config.task.teacher: got 'runs/x'.*{said}"):
    validate.open_teacher(STUDENT)
