"""Step times: which runs share a step, interleaved rounds under a made-up clock, one for real."""

import dataclasses
import functools
import json

import jax
import pytest

from experiments.benchmarks import train_step
from experiments.suite import Arm, Run, Suite
from experiments.untrained import UntrainedRun
from moejax.train import parallel, workdir
from tests.experiments import made_up


def dense(label='dense', **changes):
  return Run(label, 'vit_glyphs', {'model.num_layers': 1, 'data.batch_size': 64,
                                   'data.eval_batch_size': 64, **changes}, arg='runlocal')


def sparse(label='sparse', parent=None, **changes):
  changes = {'model.moe.layers': 'last_1', 'model.moe.group_size': 64, 'data.batch_size': 64,
             'data.eval_batch_size': 64, **changes}
  if parent is None:
    changes['init.mode'] = 'scratch'
  return Run(label, 'vit_glyphs_upcycled', changes, parent, arg='runlocal')


def suite(*runs, base=None):
  base = base or dense()
  arms = [Arm('d', run.label, run, base) for run in (base, *runs)]
  return Suite('made up', 'mini', tuple(arms))


class Step:
  """Stands for a TimedStep on a made-up clock: `calls` are the names of the steps taken."""

  def __init__(self, clock, per_step, name=None, steps=1):
    self.clock, self.per_step, self.name, self.steps = clock, per_step, name, steps

  def advance(self, calls):
    self.clock.calls.append(self.name)
    self.clock.now += calls * self.steps * self.per_step(len(self.clock.calls))


@pytest.fixture
def made(clock, monkeypatch):
  """The configs that were compiled, to steps of 10 ms an expert on the made-up clock."""
  configs = []

  def timed_step(config, tick):
    configs.append(config)
    tick(None)
    experts = config.model.moe.num_experts if config.model.moe.layers != 'none' else 1
    return Step(clock, lambda _: 0.01 * experts)
  monkeypatch.setattr(train_step, 'TimedStep', timed_step)
  return configs


SHARED = {
    'seed': {'seed': 3},
    'steps': {'steps': 20, 'log_every': 1, 'eval_every': 2, 'checkpoint_every': 2},
    'schedule': {'schedule.cooldown_steps': 1, 'optimizer.learning_rate': 0.1},
    'evaluation': {'data.eval_examples': 64, 'data.eval_batch_size': 128,
                   'model.moe.eval_capacity_factor': 1.0},
    'first weights': {'model.moe.router_init_std': 0.5},
}
OWN = {
    'experts': {'model.moe.num_experts': 4}, 'capacity': {'model.moe.capacity_factor': 1.0},
    'dispatch': {'model.moe.dispatch': 'einsum'}, 'batch': {'data.batch_size': 128},
    'optimizer': {'optimizer.name': 'sgd'}, 'devices': {'parallel': 'pmap'},
    'normalisation': {'model.moe.renormalize': False}, 'microbatches': {'microbatches': 2},
    'where': {'model.num_layers': 2}, 'smoothing': {'task.label_smoothing': 0.1},
}


@pytest.mark.parametrize('changes', SHARED.values(), ids=SHARED)
def test_what_does_not_move_a_steps_time_is_not_in_its_key(changes):
  assert train_step.step_key(sparse(**changes)) == train_step.step_key(sparse())
  assert sparse(**changes).key != sparse().key


@pytest.mark.parametrize('changes', OWN.values(), ids=OWN)
def test_what_moves_a_steps_time_is_in_its_key(changes):
  assert train_step.step_key(sparse(**changes)) != train_step.step_key(sparse())


def test_a_step_has_no_past_and_a_dense_one_no_experts():
  for how in ('copy', 'random'):
    upcycled = sparse(parent=dense(), **{'init.experts': how, 'init.optimizer': 'reset'})
    assert train_step.step_key(upcycled) == train_step.step_key(sparse())
  unread = dense(**{'model.moe.num_experts': 4, 'model.moe.group_size': 64})
  assert train_step.step_key(unread) == train_step.step_key(dense())
  assert train_step.step_key(dense()) != train_step.step_key(sparse())


def test_ratios_are_per_step_and_of_one_round(clock):
  # Every round the machine is slower than before; one arm takes twice the base's time, one a half.
  slower = lambda factor: lambda calls: factor * (1 + (calls - 7) // 3)
  steps = [Step(clock, slower(t), name, per_call) for name, t, per_call in (
      ('base', 0.1, 1), ('double', 0.2, 4), ('half', 0.05, 1))]
  ticks = []
  found = train_step.interleaved(steps, 4, ticks.append)
  assert found == [pytest.approx([2.0] * 4), pytest.approx([0.5] * 4)]
  assert clock.calls[6:12] == ['base', 'double', 'half', 'double', 'half', 'base']
  assert len(ticks) == 3 * 5


def test_each_step_is_timed_once_with_its_base_a_few_at_a_time(made, tmp_path):
  path = tmp_path / 'step_times.jsonl'
  widths = [sparse(f'E={E}', **{'model.moe.num_experts': E}) for E in range(2, 10)]
  untrained = UntrainedRun('s', 'vit_glyphs_upcycled', {}, dense(), arg='runlocal')
  train_step.measure([suite(*widths, sparse('again', seed=1), untrained)], 3, path)
  assert [config.model.moe.layers for config in made].count('none') == 2   # 6 + 2 of them
  assert len(made) == 2 + len(widths)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line['label'] for line in lines] == [f'd, made up: E={E}' for E in range(2, 10)]
  assert [line['ratio'] for line in lines] == pytest.approx(range(2, 10))
  assert lines[0]['flops_ratio'] == round(widths[0].step_flops / dense().step_flops, 4)
  assert lines[0]['settings']['model.moe.num_experts'] == 2
  assert lines[0]['versions'] == workdir.versions() and lines[0]['rounds'] == 3

  table = train_step.known_ratios(path)
  devices = lines[0]['devices']
  for arm in suite(*widths, sparse('again', seed=1)).arms[1:]:
    experts = arm.run.settings.model.moe.num_experts
    assert train_step.ratio_of(arm, devices, table) == pytest.approx(experts)
    assert train_step.ratio_of(arm, 'a TPU', table) is None
  assert train_step.ratio_of(suite().arms[0], 'a TPU', table) == 1.0


def test_what_is_measured_is_not_measured_again_even_after_half_a_line(made, tmp_path):
  path = tmp_path / 'step_times.jsonl'
  four, two = sparse('four', **{'model.moe.num_experts': 4}), sparse('two', **{
      'model.moe.num_experts': 2})
  train_step.measure([suite(four)], 2, path)
  first = path.read_text()
  train_step.measure([suite(four)], 2, path)
  assert len(made) == 2 and path.read_text() == first
  path.write_text(first + '{"devices": ')
  train_step.measure([suite(four, two)], 2, path)
  assert len(made) == 4 and path.read_text().startswith(first)
  assert sorted(train_step.known_ratios(path).values()) == pytest.approx([2.0, 4.0])


def test_quartiles_and_the_table_sorted_by_label(made, tmp_path, monkeypatch, capsys):
  per_round = [[2.0, 4.0, 3.0, 1.0, 5.0], [1.0] * 5]
  monkeypatch.setattr(train_step, 'interleaved', lambda steps, rounds, tick: per_round)
  path = tmp_path / 'step_times.jsonl'
  other = sparse('a', **{'model.moe.capacity_factor': 1.0})
  train_step.measure([suite(sparse('b'), other)], 5, path)
  line = json.loads(path.read_text().splitlines()[0])
  assert (line['low'], line['ratio'], line['high']) == (2.0, 3.0, 4.0)
  assert train_step.main(['--show', f'--results={path}']) == 0
  rows = capsys.readouterr().out.splitlines()
  assert [row.split('|')[1:4] for row in rows[2:]] == [
      [' d, made up: a ', ' 1.00 ', ' 1.00 to 1.00 '],
      [' d, made up: b ', ' 3.00 ', ' 2.00 to 4.00 ']]
  flops = sparse().step_flops / dense().step_flops
  assert rows[3].split('|')[4:6] == [f' {flops:.2f} ', f' {3 / flops:.2f} ']


def test_a_rows_ratio_is_that_of_its_step_on_the_devices_it_was_trained_on(made, tmp_path):
  path, four = tmp_path / 'step_times.jsonl', sparse('four', **{'model.moe.num_experts': 4})
  train_step.measure([suite(four)], 2, path)
  line = json.loads(path.read_text())
  path.write_text(''.join(json.dumps(line | facts) + '\n' for facts in (
      {}, {'devices': 'a TPU', 'ratio': 1.5})))
  arms = suite(four).arms
  for devices, ratio in (('a TPU', 1.5), (line['devices'], 4.0), ('a GPU', None)):
    records = [{**made_up.record(arm.name), 'key': arm.run.key, 'devices': devices} for arm in arms]
    found = train_step.fill(made_up.results(records), suite(four), path)
    assert [record['time_ratio'] for record in found.records] == [1.0, pytest.approx(ratio)]
  records = [{**made_up.record(arm.name, ratio=2.5), 'devices': line['devices']} for arm in arms]
  # Of other runs: keys differ.
  found = train_step.fill(made_up.results(records), suite(four), path)
  assert [record['time_ratio'] for record in found.records] == [2.5, 2.5]


def test_four_layers_take_longer_than_one(tmp_path, monkeypatch):
  # On one device: virtual ones would mostly wait for each other.
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:1]))
  path = tmp_path / 'step_times.jsonl'
  few = {'model.num_classes': 16, 'data.image.classes': 16}   # a head that costs nothing
  deep = dense('deep', **few, **{'model.num_layers': 4})
  train_step.measure([suite(deep, base=dense(**few))], 3, path)
  [line] = [json.loads(line) for line in path.read_text().splitlines()]
  assert line['low'] <= line['ratio'] <= line['high']
  assert 1.5 < line['ratio'] < 16 and 3 < line['flops_ratio'] < 4


def test_a_run_with_a_teacher_is_left_out():
  arm = suite(sparse()).arms[1]
  task = dataclasses.replace(arm.run.settings.task, teacher='somewhere', distill_weight=0.5)
  arm.run.__dict__['settings'] = dataclasses.replace(arm.run.settings, task=task)
  assert not train_step._can_time(arm)
