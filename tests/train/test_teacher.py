"""The teacher of a distillation: its memory, known before it is read, and its logits."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models
from moejax.config import ConfigError
from moejax.losses import TaskConfig
from moejax.models import vit
from moejax.moe.config import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import initialize, loop, memory, metrics, parallel
from moejax.train.plan import Plan
from moejax.train.validate import validate
from tests.train import small
from tests.train.test_memory import ROOM, beside, programs_of, refused, state_of
from tests.train.test_memory import run as plain

# D 64, F 256, 2 blocks: matrices 2 x (4 of 64 x 64, 2 of 64 x 256), head 64 x 10.
SPLIT = 2 * (4 * 4096 + 2 * 16384) + 640
# Patches 16 x 64 and 64, positions 4 x 64, 2 blocks x (biases 4 x 64 + 256 + 64, norms 2 x 128),
# final norm 128, head's bias 10.
WHOLE = 1088 + 256 + 2 * (576 + 256) + 128 + 10
TEACHER = vit.config('tiny', d_model=64, d_ff=256)
TAUGHT = TaskConfig(teacher='runs/x', distill_weight=0.5)


def run(*sizes, **changes):
  return plain(*sizes, task=TAUGHT, **changes)


@pytest.fixture
def teacher(monkeypatch):
  """Sets the model of the run 'runs/x', of which there is only a config."""
  def set_model(model):
    its = json.loads(run_config.to_json(run_config.RunConfig(model=model)))
    monkeypatch.setattr(initialize, 'open_run', lambda *args: types.SimpleNamespace(config=its))
  set_model(TEACHER)
  return set_model


@pytest.mark.parametrize('changes, split', [
    ({}, 1), ({'mesh': MeshConfig(fsdp=4)}, 4), ({'parallel': 'pmap'}, 1)])
def test_its_parameters_are_those_worked_out_by_hand(changes, split, teacher):
  said, alone = state_of(run(**changes), 4), state_of(plain(**changes), 4)
  assert said.teacher == 4 * (SPLIT // split + WHOLE) and alone.teacher == 0
  assert (said.params, said.optimizer) == (alone.params, alone.optimizer)
  assert said.needed == said.resident == said.params + said.optimizer + said.teacher


def test_what_it_takes_is_what_the_compiler_reports(teacher):
  """The batch, the logits and at least what one MLP has inside, 16 x 4 tokens of 256."""
  programs = programs_of(run())
  said = memory.measure(programs, ROOM)
  batch, logits, inside = 16 * (64 + 3) * 4, 16 * 10 * 4, 16 * 4 * 256 * 4
  assert batch + logits + inside < said.teaching < batch + logits + 8 * inside
  assert said.teaching == beside(programs.teacher.logits, programs.teacher.shapes)
  assert said.needed == said.resident + max(said.gradients + said.activations, said.teaching)
  twice = memory.measure(programs_of(run(steps_per_call=2, log_every=2)), ROOM)   # at once
  assert twice.teaching == pytest.approx(2 * said.teaching, rel=0.05)


def test_a_state_that_is_too_large_with_the_teacher_is_refused(teacher, monkeypatch):
  monkeypatch.setattr(memory, 'candidates', lambda *args: [])
  programs = programs_of(run())
  state = sum(map(memory.per_device, (programs.shapes.params, programs.shapes.opt_state)))
  with pytest.raises(ConfigError, match=r'teacher 0\.4 = .*before gradients and activations'):
    memory.check(programs, state)


def test_a_teacher_that_takes_too_much_is_refused_with_fewer_examples_at_once(teacher):
  """Its MLP has 64 times what the student's has; the student's step works through it in parts."""
  teacher(vit.config('tiny', d_ff=2048))
  programs = programs_of(run(512, microbatches=8, steps_per_call=2, log_every=2))
  before = memory.measure(programs, ROOM)
  assert before.needed == before.resident + before.teaching
  assert 'while the teacher answers' in str(before)
  little = dataclasses.replace(before, available=before.resident + before.teaching // 8)
  first, *_, last = memory.candidates(programs, little)
  assert first.changes == {'steps_per_call': 1} and last.changes.keys() == {'data.batch_size'}
  for remedy in (first, last):
    after = memory.measure(memory.changed(programs, remedy.changes), ROOM)
    assert after.needed < before.needed
  assert after.needed < little.available


def test_a_compiler_without_room_for_the_teacher_is_a_refusal(teacher):
  message = refused(4 * 2**30, phase='logits', config=run())
  assert '200.8 while the teacher answers of 4.0 GiB' in message


@pytest.fixture
def four_devices(monkeypatch):
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:4]))


def student(workdir='', **changes):
  task = {'task.teacher': str(workdir), 'task.distill_weight': 0.5} if workdir else {}
  moe = MoEConfig(layers='0', num_experts=2, group_size=16)
  return small.digits(moe, **{
      'steps': 10, 'log_every': 10, 'eval_every': 10, 'checkpoint_every': 10, **task, **changes})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The workdir of a teacher."""
  path = tmp_path_factory.mktemp('teacher') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, 'make', functools.partial(parallel.make, devices=jax.devices()[:4]))
    assert loop.run(student(), str(path)) == 0
  return path


def test_a_distillation_that_does_not_fit_reads_nothing(finished, tmp_path, monkeypatch,
                                                        four_devices):
  monkeypatch.setattr(memory, 'candidates', lambda *args: [])
  monkeypatch.setattr(initialize, 'parent_params', None)
  programs = loop.Trainer(validate(student(finished), Plan.make(student(finished), 0))).programs
  state = memory.per_device(programs.shapes.params) + memory.per_device(programs.shapes.opt_state)
  monkeypatch.setattr(memory, 'free', lambda devices: state + 1000)
  with pytest.raises(ConfigError, match='memory: does not fit .* teacher '):
    loop.run(student(finished), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('changes', [
    {}, {'parallel': 'pmap', 'steps_per_call': 5}], ids=['mesh', 'pmap, 5 steps at once'])
def test_it_is_read_once_all_is_compiled_and_answers_every_batch(
    changes, finished, tmp_path, monkeypatch, capsys, four_devices):
  order = []

  def noted(name, fn):
    return lambda *args: (order.append(name), fn(*args))[1]
  for module, name in ((memory, 'check'), (initialize, 'parent_params')):
    monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
  config = student(finished, **changes)
  trainer = loop.Trainer(validate(config, Plan.make(config, 0)))
  trainer.compile()
  assert order == ['check', 'parent_params']
  programs, batch = trainer.programs, trainer.dataset.train_batch(0)
  apply = jax.jit(models.build(config.model).apply)
  expected, _ = apply(jax.device_get(programs.teacher.params), jax.tree.map(jnp.asarray, batch))
  logits = np.asarray(trainer.put(next(trainer.train_batches(0)))['teacher_logits'])
  logits = logits.reshape(4, programs.steps, -1, logits.shape[-1])[:, 0]
  np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)

  assert loop.run(config, str(tmp_path / 'run')) == 0
  assert ', teacher ' in capsys.readouterr().err
  said = json.loads((tmp_path / 'run/run.json').read_text())['memory']
  assert said['teacher'] == memory.per_device(programs.teacher.shapes) and said['teaching'] > 0
  lines = metrics.read_lines(tmp_path / 'run/metrics.jsonl')
  assert sum('train/teacher_kl' in line for line in lines) == 1
