"""A distillation's memory, known before it is allocated: the teacher's parameters and answers."""

import dataclasses
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
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import initialize, loop, memory, metrics, remedies
from moejax.train.plan import Plan
from tests.train import small
from tests.train.test_memory import ROOM, parsed, step_of, with_flags
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


def found(config, devices=None, available=ROOM):
  return memory.compile_step(step_of(config, devices), available)[1]


@pytest.fixture
def teacher(monkeypatch):
  """Sets the model of the run 'runs/x', of which there is nothing but a config."""
  def set_model(model):
    its = json.loads(run_config.to_json(run_config.RunConfig(model=model)))
    monkeypatch.setattr(initialize, 'open_run', lambda *args: types.SimpleNamespace(config=its))
  set_model(TEACHER)
  return set_model


@pytest.mark.parametrize('changes, split', [
    ({}, 1), ({'mesh': MeshConfig(fsdp=4)}, 4), ({'parallel': 'pmap'}, 1)])
def test_its_parameters_are_those_worked_out_by_hand(changes, split, teacher):
  said, alone = found(run(**changes)), found(plain(**changes))
  assert said.teacher == 4 * (SPLIT // split + WHOLE)
  assert (said.params, said.optimizer) == (alone.params, alone.optimizer)
  assert said.resident == said.params + said.optimizer + said.teacher
  assert said.needed == said.resident + max(said.gradients + said.activations, said.teaching)
  assert alone.teacher == alone.teaching == 0 and alone.needed < said.needed - said.teacher + 2**14


def test_what_it_asks_for_is_what_the_compiler_says(teacher):
  """The batch, the logits and at least what one MLP has inside, 16 x 4 tokens of 256."""
  step = step_of(run(), jax.devices()[:1])
  said = memory.compile_step(step, ROOM)[1]
  batch, logits, inside = 16 * (64 + 3) * 4, 16 * 10 * 4, 16 * 4 * 256 * 4
  assert batch + logits + inside < said.teaching < batch + logits + 8 * inside
  stats = step.teacher.logits.memory_analysis()
  assert said.teaching == (stats.argument_size_in_bytes + stats.output_size_in_bytes
                           + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
                           - said.teacher)
  twice = found(run(steps_per_call=2, log_every=2), jax.devices()[:1])   # at once
  assert twice.teaching == pytest.approx(2 * said.teaching, rel=0.05)


def test_it_is_said_if_there_is_one(teacher):
  said = memory.Forecast(2**30, 2**31, 2**30, 2**30, teacher=3 * 2**30, teaching=2**30,
                           compiled=True)
  assert str(said) == ('params 1.0 GiB, optimizer 2.0, teacher 3.0, gradients 1.0, activations 1.0 '
                       '= 8.0 GiB')
  assert said.as_dict().items() >= {'teacher': 3 * 2**30, 'needed': 2**33}.items()
  asking = dataclasses.replace(said, teaching=4 * 2**30, available=2**34)
  assert str(asking).endswith('= 8.0 GiB, 10.0 while the teacher answers of 16.0 GiB')
  assert not {'teacher', 'teaching'} & found(plain()).as_dict().keys()


def test_a_run_that_fits_without_its_teacher_alone_is_refused_with_what_helps(teacher):
  config, alone = run(1024), found(plain(1024))
  before, limit = found(config), alone.needed + 2**16
  assert limit < before.needed - 2**16
  with pytest.raises(ConfigError, match=r'optimizer 0\.0, teacher 0\.4, .* of 1\.\d MiB') as error:
    found(config, available=limit)
  named = parsed(str(error.value))
  assert any('microbatches' in flags for flags, _ in named)
  for flags, mib in named:
    after = found(with_flags(config, flags))
    assert after.needed < before.needed and mib == pytest.approx(after.needed / 2**20, abs=0.051)


def test_a_state_that_is_too_large_with_the_teacher_is_refused_without_compiling(
    teacher, monkeypatch):
  monkeypatch.setattr(jax.stages.Lowered, 'compile', None)
  step = step_of(run())
  state = memory.per_device(step.shapes.params) + memory.per_device(step.shapes.opt_state)
  with pytest.raises(ConfigError, match=r'teacher 0\.4 = .*before gradients and activations'):
    memory.compile_step(step, state)


def test_a_teacher_that_asks_for_too_much_is_refused_with_a_batch_that_fits(teacher):
  """Its MLP has 64 times what the student's has; the student's step works through it in parts."""
  teacher(vit.config('tiny', d_ff=2048))
  config = run(2048, microbatches=8, steps_per_call=2, log_every=2)
  before = found(config)
  assert before.needed == before.resident + before.teaching
  with pytest.raises(ConfigError, match='while the teacher answers of') as error:
    found(config, available=before.resident + before.teaching // 8)
  named = parsed(str(error.value))
  flags, mib = next(x for x in named if 'data.batch_size' in x[0])
  assert mib * 2**20 < before.resident + before.teaching // 8
  with pytest.raises(ConfigError, match='teacher answers') as error:
    found(config, available=before.resident + int(0.6 * before.teaching))
  assert parsed(str(error.value))[0][0] == {'steps_per_call': '1'}


def test_a_compiler_without_room_for_the_teacher_is_a_refusal(teacher, monkeypatch):
  class Refusing:
    def compile(self):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 200.82G) exceeds available HBM (4G).')
  monkeypatch.setattr(remedies, 'WANTED', 0)
  step = step_of(run())
  monkeypatch.setattr(step.devices, 'lower_rows', lambda *args: Refusing())
  with pytest.raises(ConfigError, match=r'200\.8 while the teacher answers of 4\.0 GiB'):
    memory.compile_step(step, 4 * 2**30)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A teacher's workdir and its config.json."""
  folder = tmp_path_factory.mktemp('teacher')
  path = small.write(folder / 'config.json', {'router': 'expert_choice', 'group_size': 32},
                     **{'steps': 10, 'schedule.cooldown_steps': 0, 'log_every': 10,
                        'eval_every': 10, 'data.eval_examples': 64})
  assert loop.run(run_config.from_dict(json.loads(path.read_text())), str(folder / 'run')) == 0
  return folder / 'run', path


def student(finished, **changes):
  workdir, path = finished
  config = run_config.from_dict(json.loads(path.read_text()))
  return dataclasses.replace(config, task=TaskConfig(teacher=str(workdir), distill_weight=0.5),
                             **changes)


def test_a_distillation_that_does_not_fit_reads_nothing(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(remedies, 'WANTED', 0)
  monkeypatch.setattr(initialize, 'parent_params', None)
  program = loop.Program(student(finished), Plan.make(student(finished), 0))   # nor does this
  state = memory.per_device(program.shapes.params) + memory.per_device(program.shapes.opt_state)
  monkeypatch.setattr(memory, 'free', lambda devices: state + 1000)
  with pytest.raises(ConfigError, match='memory: does not fit .* teacher '):
    loop.run(student(finished), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('changes', [
    {}, {'parallel': 'pmap', 'steps_per_call': 5}], ids=['mesh', 'pmap, 5 steps at once'])
def test_it_is_read_once_the_step_is_compiled_and_answers_every_batch(
    changes, finished, tmp_path, monkeypatch, capsys):
  order = []

  def noted(name, fn):
    return lambda *args: (order.append(name), fn(*args))[1]
  for module, name in ((memory, 'compile_step'), (initialize, 'parent_params')):
    monkeypatch.setattr(module, name, noted(name, getattr(module, name)))
  config = student(finished, **changes)
  program = loop.Program(config, Plan.make(config, 0))
  program.compile()
  assert order == ['compile_step', 'parent_params']
  model = models.build(config.model)
  batch = program.dataset.train_batch(0)
  expected = model.apply(program.step.teacher.params, jax.tree.map(jnp.asarray, batch))[0]
  told = np.asarray(program.put(next(program.train_batches(0)))['teacher_logits'])
  told = told.reshape(len(jax.devices()), program.step.steps, -1, told.shape[-1])[:, 0]
  np.testing.assert_allclose(told.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)

  assert loop.run(config, str(tmp_path / 'run')) == 0
  assert ', teacher ' in capsys.readouterr().err
  said = json.loads((tmp_path / 'run/run.json').read_text())['memory']
  assert said['teacher'] == memory.per_device(program.step.teacher.shapes)
  assert said['teaching'] > 0
  lines = metrics.read_lines(tmp_path / 'run/metrics.jsonl')
  assert sum('train/teacher_kl' in line for line in lines) == 1
