"""Surgeries measured without training: against the receipts of real runs, and after a cut."""

import dataclasses
import functools
import json

import jax
import pytest

from experiments import untrained
from experiments.suite import Run
from experiments.untrained import EvaluationJob, UntrainedRun
from moejax.config import ConfigError
from moejax.train import loop, metrics, parallel
from moejax.train.workdir import Workdir

TINY = {'steps': 4, 'schedule.cooldown_steps': 2, 'model.num_layers': 1, 'model.d_model': 16,
        'model.d_ff': 24, 'model.num_heads': 2, 'data.batch_size': 32, 'data.eval_batch_size': 32,
        'data.eval_examples': 40, 'parallel': 'pmap', 'log_every': 4, 'eval_every': 4,
        'checkpoint_every': 4}


def parent() -> Run:
  # Far enough from its first weights that it matters which of its checkpoints is taken.
  return Run('parent', 'vit_glyphs', {**TINY, 'schedule.warmup_steps': 0,
                                      'optimizer.learning_rate': 0.02}, arg='runlocal')


def cell(label='cell', kind=UntrainedRun, **changes):
  return kind(label, 'vit_glyphs_upcycled', {
      **TINY, 'model.moe.layers': 'last_1', 'model.moe.num_experts': 4,
      'model.moe.group_size': 64, **changes},
      parent(), arg='runlocal')


CELLS = {
    'expert choice': {},
    'random experts, from the end': {'init.experts': 'random', 'init.step': -2, 'seed': 3,
                                     'model.moe.renormalize': False},
    'all tokens chosen': {'model.moe.capacity_factor': 4.0, 'model.moe.eval_capacity_factor': 4.0},
    'other data': {'data.eval_examples': 16},
}


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  """Fewer virtual ones than there are: eight would mostly wait for each other."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, 'make', functools.partial(parallel.make, devices=jax.devices()[:2]))
    yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A folder with the parent in it."""
  folder = tmp_path_factory.mktemp('runs')
  loop.run(parent().settings, str(folder / parent().name))
  return folder


@pytest.fixture(scope='module')
def job():
  return EvaluationJob(parent(), tuple(cell(label, **CELLS[label]) for label in CELLS))


@pytest.fixture(scope='module')
def measured(trained, job):
  """The same folder, all cells measured by the job's own command."""
  assert untrained.main(job.command(trained)[2:]) == 0
  return trained


def collected(measured, label, **changes):
  return untrained.facts(cell(label, **CELLS[label], **changes), measured)


def test_a_cell_measures_what_the_run_that_trains_from_it_starts_with(measured, tmp_path):
  label = 'random experts, from the end'
  run = cell(label, Run, **CELLS[label])
  config = run.resolved(run.parent_path(measured))
  loop.run(config, str(tmp_path))
  row, first = collected(measured, label), metrics.read_lines(tmp_path / 'metrics.jsonl')[0]
  receipt = Workdir(tmp_path).read('receipt.json')
  assert abs(receipt['measured']['step0_gap']) > 1e-3
  assert receipt['measured'].items() <= row['step0'].items()
  assert {f'validation/{k}': v for k, v in row['final']['validation'].items()}.items() <= (
      first.items())
  assert row['start_step'] == row['end_step'] == first['step']
  assert row['seconds'] == 0 and [line['step'] for line in row['history']] == [first['step']]
  facts = Workdir(tmp_path).read('run.json')
  for here, there in untrained.FACTS.items():
    assert row[there] == facts[here]


def test_the_gap_closes_where_every_expert_takes_every_token_with_weights_that_sum_to_one(measured):
  # C = E: S tokens each. Copies of one MLP, mixed with weights that sum to 1, are that MLP.
  row = collected(measured, 'all tokens chosen')
  assert abs(row['step0']['step0_gap']) < 1e-5 and abs(row['step0']['test_gap']) < 1e-5
  assert row['final']['test']['moe/encoder/00/unchosen'] == 0
  unlike = collected(measured, 'random experts, from the end')
  assert abs(unlike['step0']['step0_gap']) > 1e-3 and abs(unlike['step0']['test_gap']) > 1e-3


def test_each_split_has_its_own_gap_and_each_checkpoint_and_data_its_own_parent(measured):
  lines = {label: cell(label, **CELLS[label]).line(measured) for label in CELLS}
  for line in lines.values():
    for split, gap in (('validation', 'step0_gap'), ('test', 'test_gap')):
      assert line['step0'][gap] == line['final'][split]['loss'] - line['parent'][split]['loss']
  trunk, end, other = (lines[label]['parent']['validation']['loss'] for label in (
      'expert choice', 'random experts, from the end', 'other data'))
  assert len({trunk, end, other}) == 3
  assert lines['all tokens chosen']['parent']['validation']['loss'] == trunk


def test_what_is_measured_is_found_and_what_a_kill_cut_off_is_measured_again(
    measured, job, tmp_path, monkeypatch):
  assert job.finished(measured) and job.done(measured) == job.work == len(CELLS)
  file = measured / job.name / untrained.FILE
  text = file.read_text()
  copy = tmp_path / job.name
  copy.mkdir()
  lines = text.splitlines(keepends=True)
  (copy / untrained.FILE).write_text(''.join(lines[:2]) + lines[2][:100])
  assert job.done(tmp_path) == 2 and not job.finished(tmp_path)

  took = []
  line = untrained.evaluate_run
  monkeypatch.setattr(untrained, 'evaluate_run', lambda config: took.append(config) or line(config))
  untrained.evaluate_missing(str(measured / parent().name), [c.spec for c in job.runs], copy)
  assert (copy / untrained.FILE).read_text() == text
  assert [config.model.moe.capacity_factor for config in took] == [4.0, 2.0]
  untrained.evaluate_missing(str(measured / parent().name), [c.spec for c in job.runs], copy)
  assert len(took) == 2 and (copy / untrained.FILE).read_text() == text


def test_a_line_of_other_settings_is_not_taken_for_a_cell(measured, job, tmp_path):
  # As after a default was changed, which no key shows.
  (tmp_path / job.name).mkdir()
  found = dict(job.runs[0].line(measured), settings='0' * 64)
  (tmp_path / job.name / untrained.FILE).write_text(json.dumps(found) + '\n')
  assert not job.runs[0].finished(tmp_path)
  with pytest.raises(ConfigError, match="'expert choice' is measured"):
    untrained.facts(job.runs[0], tmp_path)


def test_the_command_of_a_cell_measures_it_alone(measured, job, tmp_path):
  (tmp_path / parent().name).symlink_to(measured / parent().name)
  one = job.runs[1]
  assert untrained.main(one.command(tmp_path)[2:]) == 0
  assert one.finished(tmp_path) and one.line(tmp_path) == one.line(measured)
  assert job.done(tmp_path) == 1


def test_a_cell_is_not_the_run_of_the_same_config_and_jobs_gather_cells_by_parent():
  run, one, two = cell(kind=Run), cell(), cell(seed=1)
  assert run.key != one.key and one.settings == run.settings
  other = dataclasses.replace(one, parent=dataclasses.replace(parent(), changes={
      **parent().changes, 'seed': 1}))
  trained, first, second = untrained.jobs([one, run, other, two])
  assert trained is run
  assert first.runs == (one, two) and second.runs == (other,)
  assert first.parent is one.parent and first.name != second.name and first.key != second.key
  assert first.cost == 2 * second.cost == 2 * one.cost
  # Two splits of 40 examples, forward only; a step is three forward passes of 32.
  assert one.cost == pytest.approx(2 * 40 / 32 / 3 * run.step_flops)


@pytest.mark.parametrize('changes, words', [
    ({'init.new_head': True}, 'config.init: got .*head is kept'),
    ({'data.eval_batch_size': 7}, 'config.data.eval_batch_size: got 7'),
    ({'model.d_ff': 32}, 'surgery: the rules do not account'),
])
def test_what_cannot_be_measured_is_said_and_leaves_no_line(measured, tmp_path, changes, words):
  with pytest.raises(ConfigError, match=words):
    untrained.evaluate_missing(str(measured / parent().name), [cell(**changes).spec], tmp_path)
  assert metrics.read_lines(tmp_path / untrained.FILE) == []


def test_a_surgery_without_a_parent_and_cells_that_are_no_json_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='a run with a parent'):
    UntrainedRun('s', 'vit_glyphs')
  main = functools.partial(untrained.main, [f'--parent={tmp_path}', f'--workdir={tmp_path}',
                                            f'--runs={tmp_path / "none"}'])
  with pytest.raises(ConfigError, match='--runs: .*No such file'):
    main()
