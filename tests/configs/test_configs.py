"""Every config file resolves and builds, and six of them really train, tiny, one after another."""

import dataclasses
import json
import math
import os
import pathlib
import sys

import jax
import pytest

from configs import common
from moejax import config as config_lib
from moejax import data, models, trees
from moejax.config import ConfigError
from moejax.moe import presets
from moejax.train import config as run_config
from moejax.train import validate
from tests import fork_server

ROOT = pathlib.Path(__file__).parent.parent.parent
NAMES = sorted(p.stem for room in ('pretrain', 'upcycle', 'finetune')
               for p in (ROOT / 'configs' / room).glob('*.py') if p.stem != '__init__')
PAPER = [f'paper/{name}' for name in ('t5_base', 't5_base_upcycled', 't5_base_superglue', 'vit_b16',
                                      'vit_b16_upcycled')]   # the other sizes follow them
TELEMETRY = ('load_max_over_mean', 'dropped', 'unchosen', 'entropy', 'router_grad_norm',
             'dead_experts')


def get_config(name, arg=None):
  return common.load(name, arg)


@pytest.mark.parametrize('arg', ['', 'runlocal'])
@pytest.mark.parametrize('name', NAMES + PAPER)
def test_resolves_builds_and_survives_json(name, arg):
  edited = get_config(name, arg)
  run = run_config.resolve(edited)
  assert run_config.from_dict(json.loads(run_config.to_json(run))) == run
  assert edited.to_dict() == config_lib.as_config_dict(run).to_dict()   # no key lost, none added
  model = models.build(run.model)
  key = jax.eval_shape(lambda: jax.random.key(0))
  assert trees.diff(jax.eval_shape(model.init, key), model.shapes) == []
  group = model.examples_per_group(run.data.text.encoder_length, run.data.text.decoder_length)
  assert run.data.batch_size % (group * run.microbatches) == 0    # on one device
  assert run.data.eval_batch_size % group == 0


@pytest.mark.parametrize('name', NAMES)
def test_runlocal_is_the_same_model_in_a_few_steps(name):
  whole, local = (run_config.resolve(get_config(name, arg)) for arg in (None, 'runlocal'))
  assert local.model == whole.model and local.optimizer == whole.optimizer
  assert local.init == whole.init
  assert local.steps <= 10 < whole.steps
  assert 0 < local.schedule.cooldown_steps < local.steps         # it leaves a trunk, too


@pytest.mark.parametrize('name', NAMES + PAPER)
def test_another_argument_is_refused(name):
  with pytest.raises(ConfigError, match="config argument: got 'runlocl'.*Did you mean 'runlocal'"):
    get_config(name, 'runlocl')


# The config that fine-tunes, the one whose runs it starts from with a preset's name, its stacks.
TUNED = [('vit_digits', 'vit_glyphs_upcycled', ('moe',)),
         ('vit_glyphs_new', 'vit_glyphs_upcycled', ('moe',)),
         ('t5_stdlib_tasks', 't5_stdlib_upcycled', ('encoder_moe', 'decoder_moe')),
         ('t5_cmudict', 't5_stdlib_upcycled', ('encoder_moe', 'decoder_moe'))]


@pytest.mark.parametrize('tuned, upcycled, stacks', TUNED, ids=[case[0] for case in TUNED])
@pytest.mark.parametrize('name', presets.BY_NAME)
def test_a_preset_of_the_upcycled_parent_is_its_fine_tunings(tuned, upcycled, stacks, name):
  parent, child = (run_config.resolve(get_config(n, name)) for n in (upcycled, tuned))
  assert child.init.mode == 'continue' and child.init.parent == f'runs/{upcycled}'
  for stack in stacks:
    theirs, ours = getattr(parent.model, stack), getattr(child.model, stack)
    assert ours == dataclasses.replace(theirs, group_size=ours.group_size)
  assert child == run_config.resolve(get_config(tuned, f'upcycled,{name}'))
  local = run_config.resolve(get_config(tuned, f'{name},runlocal'))
  assert local.model == child.model and local.steps <= 10 < child.steps


def test_two_presets_are_refused():
  with pytest.raises(ConfigError, match="config argument: got 'switch,glam', allowed: one preset"):
    get_config('vit_digits', 'switch,glam,runlocal')


def test_new_glyphs_are_all_new_to_the_parent(monkeypatch):
  """Trained on and probed: what is left of the permutation of which the parent has the first."""
  run, tuned = (run_config.resolve(get_config(name)) for name in ('vit_glyphs', 'vit_glyphs_new'))
  # As for a probe of what pretraining made of the features.
  run = dataclasses.replace(run, probe=tuned.probe,
                            data=dataclasses.replace(run.data, eval_repeats=2))
  monkeypatch.setattr(validate, 'open_data', lambda run, source, devices: source)
  monkeypatch.setattr(validate, 'check_probe', lambda run, source: None)
  probed = validate.open_probe(run, None)
  assert (run.data.image.classes, run.data.image.skip_classes) == (4096, 0)
  for config in (probed, tuned.data):
    assert (config.source, config.image.classes) == ('glyphs', 0)
    assert config.image.skip_classes == 4096
  assert probed.image.augment == 'none' and (probed.eval_examples, probed.eval_repeats) == (0, 1)
  assert tuned.model.num_classes == data.build(tuned.data, seed=0).num_classes == 284


def train(name, workdir, *overrides, arg='runlocal'):
  """Four steps of configs/<name>.py:<arg>, from the command line, on one device."""
  env = os.environ | {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8',
                                                                   'device_count=1')}
  done = fork_server.run(
      [sys.executable, '-m', 'moejax.main', f'--config=configs/{common.path(name)}.py:{arg}',
       f'--workdir={workdir}', '--compilation_cache=', '--config.steps=4',
       '--config.schedule.cooldown_steps=2', *overrides],
      cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def lines_of(lines, split):
  return {line['step']: line for line in lines if f'{split}/loss' in line}


# With fewer blocks, no optimizer state or shorter inputs than the configs have, for the time that
# tracing and compiling take.
@pytest.mark.parametrize('dense, sparse, tuned, fewer, layers', [
    ('vit_glyphs', 'vit_glyphs_upcycled', 'vit_digits', ['--config.model.num_layers=2'],
     {'encoder/00', 'encoder/01'}),                              # the last two
    ('t5_stdlib', 't5_stdlib_upcycled', 't5_stdlib_tasks', ['--config.optimizer.name=sgd'],
     {'encoder/01', 'decoder/01'})],                             # every second
    ids=['vit', 't5'])
def test_a_dense_run_and_the_run_upcycled_from_it(dense, sparse, tuned, fewer, layers, tmp_path):
  """From the command line: a dense run, a run upcycled from it, and that one fine-tuned."""
  parent, child = tmp_path / 'dense', tmp_path / 'sparse'
  lines = train(dense, parent, *fewer)
  assert set(lines_of(lines, 'train')) == {2, 4}
  assert set(lines_of(lines, 'validation')) == {0, 4} and set(lines_of(lines, 'test')) == {4}
  assert not any('/moe/' in key for line in lines for key in line)

  lines = train(sparse, child, f'--config.init.parent={parent}', *fewer)
  # From the parent's trunk at step 2 to step 6; the first evaluation is before the first step.
  assert set(lines_of(lines, 'train')) == {4, 6}
  validation = lines_of(lines, 'validation')
  assert set(validation) == {2, 4, 6} and set(lines_of(lines, 'test')) == {6}
  assert all(math.isfinite(value) for line in lines for value in line.values())
  for layer in layers:
    seen = {k: validation[6][f'validation/moe/{layer}/{k}'] for k in TELEMETRY}
    assert seen['load_max_over_mean'] >= 1 and seen['router_grad_norm'] > 0
    assert 0 <= seen['dropped'] < 1 and 0 <= seen['unchosen'] < 1
    assert 0.9 * math.log(8) < seen['entropy'] <= math.log(8) + 1e-5   # a new router is uniform
  assert {k.split('/moe/')[1].rpartition('/')[0] for k in validation[6] if '/moe/' in k} == layers

  measured = json.loads((child / 'receipt.json').read_text())['measured']
  assert measured['loss'] == validation[2]['validation/loss']
  assert measured['step0_gap'] == measured['loss'] - measured['parent_loss']
  assert abs(measured['step0_gap']) < 0.5 * measured['parent_loss']
  run = json.loads((child / 'run.json').read_text())
  assert (run['first_step'], run['trunk_step'], run['end_step']) == (2, 4, 6)

  taught = [] if tuned == 'vit_digits' else [
      f'--config.task.teacher={child}', '--config.task.distill_weight=0.5',
      '--config.decode.beams=2', '--config.data.text.encoder_length=64',
      '--config.model.encoder_moe.group_size=512']
  lines = train(tuned, tmp_path / 'tuned', f'--config.init.parent={child}', *fewer, *taught,
                arg='upcycled,runlocal')
  assert set(lines_of(lines, 'validation')) == {6, 8, 10}          # from the child's end, cooled
  receipt = json.loads((tmp_path / 'tuned' / 'receipt.json').read_text())
  if tuned == 'vit_digits':
    assert 'step0_gap' not in receipt['measured']                  # another head for other data
    probe = next(line for line in lines if 'probe/1shot_accuracy' in line)
    assert probe['step'] == 10 and 0 < probe['probe/10shot_accuracy'] <= 1
  else:
    assert receipt['measured']['step0_gap'] == 0                   # the same model, dropout off
    assert 'validation/exact_match' not in lines_of(lines, 'validation')[8]
    last = lines_of(lines, 'test')[10]
    assert 0 <= last['test/exact_match'] <= 1 and 0 <= last['test/swap/exact_match'] <= 1
    assert 0 < last['test/commonest/mean_over_tasks'] < 1
    memory = json.loads((tmp_path / 'tuned' / 'run.json').read_text())['memory']
    assert memory['decoding'] > 0   # compiled before the first step, and used after the last
    assert last['test/loss'] > 0 and lines_of(lines, 'train')[8]['train/teacher_kl'] >= 0
