"""What benchmarks share: turns on a made-up clock, bounds of made-up ratios, lines and pages."""

import importlib

import numpy as np
import pytest

from experiments.benchmarks import __main__ as listing
from experiments.benchmarks import common
from moejax.config import ConfigError
from moejax.train import metrics


def work(clock, name, seconds):
  """A work that takes seconds(number of works done so far, itself included)."""
  def work():
    clock.calls.append(name)
    clock.now += seconds(len(clock.calls))
  return work


def test_ratios_are_of_one_round_whatever_the_machine_does(clock):
  # Three works warm up, then every three works are a round, each slower than the one before.
  slower = lambda base: lambda calls: base * (1 + (calls - 4) // 3)
  works = {name: work(clock, name, slower(base))
           for name, base in (('floor', 0.1), ('double', 0.2), ('half', 0.05))}
  ticks = []
  took = common.in_turns(works, 3, ticks.append)
  assert common.ratios(took['double'], took['floor']) == pytest.approx([2.0] * 3)
  assert common.ratios(took['half'], took['floor']) == pytest.approx([0.5] * 3)
  assert took['floor'] == pytest.approx([0.1, 0.2, 0.3])
  assert clock.calls[3:] == ['floor', 'double', 'half', 'double', 'half', 'floor', 'half', 'floor',
                             'double']
  assert ticks == clock.calls


def test_a_work_of_fewer_rounds_takes_part_in_the_first_ones(clock):
  works = {name: work(clock, name, lambda calls: 1.0) for name in 'abc'}
  took = common.in_turns(works, {'a': 4, 'b': 2, 'c': 4})
  assert {name: len(times) for name, times in took.items()} == {'a': 4, 'b': 2, 'c': 4}
  assert clock.calls[3:9] == ['a', 'b', 'c', 'b', 'c', 'a']
  assert sorted(clock.calls[9:11]) == sorted(clock.calls[11:]) == ['a', 'c']


def test_the_bound_is_an_order_statistic():
  # n = 5: all five are below the median with probability 1/32 < 5 %, so the largest bounds it;
  # n = 4: 1/16 > 5 %. n = 8: at most 6 below: 1 - 9/256 = 96.5 %, the 7th; n = 30: the 20th.
  values = [float(i) for i in range(1, 31)]
  assert common.upper_bound(values[:4]) is None
  assert common.upper_bound(values[:5][::-1]) == 5.0
  assert common.upper_bound(values[:8]) == 7.0
  assert common.upper_bound(values) == 20.0
  assert common.upper_bound([*values[:20], *[1e9] * 10]) == 20.0   # whatever the slow rounds were


def test_the_bound_holds_as_often_as_it_promises():
  draws = np.random.default_rng(0).lognormal(size=(2000, 30))
  held = np.mean([common.upper_bound(row) >= 1.0 for row in draws])
  assert 0.93 < held < 0.97   # 95.1 % by the binomial


class Case:
  def __init__(self, name):
    self.name = name


def measurements(folder):
  return common.Measurements(folder / 'lines.jsonl', ('name', 'device'),
                             lambda lines: ' '.join(str(line['n']) for line in lines) + '\n',
                             folder / 'page.md')


def test_a_new_line_replaces_those_of_its_identity_and_failures_are_counted(tmp_path, capsys):
  def measure(case):
    if case.name == 'bad':
      raise ConfigError('out of memory')
    return {'name': case.name, 'device': 'A', 'n': n}
  output = measurements(tmp_path)
  output.add([{'name': 'a', 'device': 'B', 'n': 0}, {'name': 'a', 'device': 'A', 'n': 1}])
  n = 2
  assert output.measure([Case('b'), Case('bad'), Case('a')], measure, 'case') == 1
  assert 'bad: out of memory' in capsys.readouterr().err
  assert [(x['name'], x['device'], x['n']) for x in output.lines()] == [
      ('a', 'B', 0), ('b', 'A', 2), ('a', 'A', 2)]


def test_the_page_is_written_and_shown_and_ctrl_c_keeps_what_is_measured(tmp_path, capsys):
  def stopped():
    output.add([{'name': 'a', 'device': 'A', 'n': 1}])
    raise KeyboardInterrupt
  output = measurements(tmp_path)
  assert output.finish(lambda: 0, show=False) == 0 and not (tmp_path / 'page.md').exists()
  assert output.finish(stopped, show=False) == 130
  assert 'the same command goes on' in capsys.readouterr().err
  assert output.finish(stopped, show=True) == 0 and capsys.readouterr().out == '1\n'
  assert not (tmp_path / 'page.md').exists()
  assert output.finish(lambda: 2, show=False) == 1 and capsys.readouterr().out == '1\n'
  assert (tmp_path / 'page.md').read_text() == '1\n'


@pytest.mark.parametrize('name, file, page', [
    ('tpu', 'scale/ahead.jsonl', 'scale/README.md'), ('gpu_step', 'gpu/gpu.jsonl', 'gpu/README.md'),
    ('steps_per_call', 'gpu/steps_per_call.jsonl', 'gpu/steps_per_call.md'),
    ('moe_layer', 'moe_layer.jsonl', 'moe_layer.md')])
def test_the_committed_page_is_that_of_the_committed_lines(name, file, page):
  module = importlib.import_module(f'experiments.benchmarks.{name}')
  assert module.page(metrics.read_lines(common.RESULTS / file)) == (
      common.RESULTS / page).read_text()


def test_the_list_names_every_benchmark_and_what_it_asks(capsys):
  assert listing.main() == 0
  lines = capsys.readouterr().out.splitlines()
  names = [line.rpartition('.')[2] for line in lines[::2]]
  assert names == ['gpu_step', 'grouped_matmul', 'loader', 'moe_layer', 'steps_per_call', 'tpu',
                   'train_step']
  assert all(line.startswith('    ') and line.strip() for line in lines[1::2])


@pytest.mark.parametrize('name, argv, words', [
    ('moe_layer', ['--rounds=0'], '--rounds: got 0'),
    ('moe_layer', ['--cores=-1'], '--cores: got -1'),
    ('moe_layer', ['--sizes=32x409'], "--sizes: got '32x409'.*Did you mean '32x4096'"),
    ('steps_per_call', ['--models=bert'], "--models: got 'bert'.*vit_glyphs_upcycled"),
    ('tpu', ['--only=vit_x'], "--only: got 'vit_x'.*t5_base"),
    ('tpu', ['--table=weak', '--only=t5_xl'], "--only: got 't5_xl', allowed: 1 chip, 2 chips"),
    ('train_step', [], '--suite: got None'),
    ('train_step', ['--suite=quickstrt'], "--suite: got 'quickstrt'"),
    ('train_step', ['--suite=quickstart', '--rounds=1'], '--rounds: got 1'),
    ('train_step', ['--suite=quickstart', '--cores=-1'], '--cores: got -1')])
def test_what_cannot_be_measured_is_refused(name, argv, words, tmp_path, monkeypatch):
  monkeypatch.setattr(common, 'use_cores', lambda number: None)   # not for the other tests
  module = importlib.import_module(f'experiments.benchmarks.{name}')
  with pytest.raises(ConfigError, match=words):
    module.main([*argv, f'--results={tmp_path / "results"}'])
  assert not list(tmp_path.iterdir())
