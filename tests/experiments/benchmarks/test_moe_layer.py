"""The layer bench: turns on a made-up clock, bounds of made-up ratios, the page, tiny for real."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import moe_layer as bench
from experiments.benchmarks import moe_layer_ways, public_layers, turns
from experiments.benchmarks.moe_layer_ways import DENSE, FLOOR, PASSES, Cell
from moejax.config import ConfigError

TINY = Cell(experts=4, tokens=32, d_model=8, d_ff=16)


@pytest.fixture
def clock(monkeypatch):
  """A clock that only runs move; `calls` are their names in order."""
  class Clock:
    now, calls = 0.0, []

    def run(self, name, seconds):
      def run():
        self.calls.append(name)
        self.now += seconds(len(self.calls))
      return run
  clock = Clock()
  clock.calls = []
  monkeypatch.setattr(turns.time, 'perf_counter', lambda: clock.now)
  monkeypatch.setattr(turns.time, 'sleep', lambda seconds: None)
  return clock


def test_ratios_are_of_the_same_round_whatever_the_machine_does(clock):
  # Three runs warm up, then every three runs are a round, each slower than the one before.
  slower = lambda base: lambda calls: base * (1 + (calls - 4) // 3)
  runs = {name: clock.run(name, slower(base))
          for name, base in (('floor', 0.1), ('double', 0.2), ('half', 0.05))}
  ticks = []
  took = turns.in_turns(runs, dict.fromkeys(runs, 3), ticks.append)
  assert turns.ratios(took['double'], took['floor']) == pytest.approx([2.0] * 3)
  assert turns.ratios(took['half'], took['floor']) == pytest.approx([0.5] * 3)
  assert took['floor'] == pytest.approx([0.1, 0.2, 0.3])
  assert clock.calls[3:] == ['floor', 'double', 'half', 'double', 'half', 'floor', 'half', 'floor',
                             'double']
  assert ticks == clock.calls


def test_a_way_of_fewer_rounds_takes_part_in_the_first_ones(clock):
  runs = {name: clock.run(name, lambda calls: 1.0) for name in 'abc'}
  took = turns.in_turns(runs, {'a': 4, 'b': 2, 'c': 4})
  assert {name: len(times) for name, times in took.items()} == {'a': 4, 'b': 2, 'c': 4}
  assert clock.calls[3:9] == ['a', 'b', 'c', 'b', 'c', 'a']
  assert sorted(clock.calls[9:11]) == sorted(clock.calls[11:]) == ['a', 'c']


def test_the_bound_is_an_order_statistic():
  # n = 5: all five are below the median with probability 1/32 < 5 %, so the largest bounds it;
  # n = 4: 1/16 > 5 %. n = 8: at most 6 below: 1 - 9/256 = 96.5 %, the 7th; n = 30: the 20th.
  values = [float(i) for i in range(1, 31)]
  assert turns.upper_bound(values[:4]) is None
  assert turns.upper_bound(values[:5][::-1]) == 5.0
  assert turns.upper_bound(values[:8]) == 7.0
  assert turns.upper_bound(values) == 20.0
  assert turns.upper_bound([*values[:20], *[1e9] * 10]) == 20.0   # whatever the slow rounds were


def test_the_bound_holds_as_often_as_it_says():
  draws = np.random.default_rng(0).lognormal(size=(2000, 30))
  held = np.mean([turns.upper_bound(row) >= 1.0 for row in draws])
  assert 0.93 < held < 0.97   # 95.1 % by the binomial


def row(way, ratios, cell=bench.CELLS[4], flops=1.0):
  by_pass = {PASSES[0]: ratios[:1], PASSES[1]: ratios}
  return bench.Row(cell, way, flops, by_pass, by_pass, {PASSES[1]: 8_000_000})


@pytest.mark.parametrize('ratios, held', [
    ([1.0] * 20 + [1.2] * 10, 'yes'), ([1.0] * 19 + [1.2] * 11, 'no'), ([1.0] * 4, 'not known')])
def test_a_limit_is_held_by_the_bound_and_not_by_the_median(ratios, held):
  rows = [row(FLOOR, [1.0] * 30), row('top-2, gather', ratios), row('top-2, grouped', ratios)]
  assert rows[0].cell == Cell(32, 4096) and bench.LIMITS[rows[0].cell] == 1.10
  [line] = bench.limits(rows).splitlines()[2:]
  cells = [cell.strip() for cell in line.split('|')[1:-1]]
  assert cells[2:4] == ['top-2, gather', '1.000'] and cells[-3:] == ['1.10', str(len(ratios)), held]


def test_ratios_per_flop_and_bytes_per_token_are_in_the_table():
  floor = dataclasses.replace(row(FLOOR, [1.0]), temporary={PASSES[1]: 4_096_000})
  _, line = bench.table([floor, row('Mixtral', [3.0, 3.0, 6.0], flops=1.5)]).splitlines()[2:]
  cells = [cell.strip() for cell in line.split('|')[1:-1]]
  assert cells == ['32', '4096', 'Mixtral', '3.00', '3.00', '', '1.50', '2.00', '3.00', '3.00', '8',
                   '953', '1 or 3', '']


def test_only_the_cells_with_a_limit_take_long():
  full_cell = Cell(32, 4096)
  rounds = lambda *key, cell=full_cell, full=False: bench.rounds_of(cell, *key, full, 30)
  assert rounds(FLOOR, PASSES[1]) == rounds('top-2, gather', PASSES[1]) == 30
  assert rounds(DENSE, PASSES[1]) == rounds('top-2, gather', PASSES[0]) == bench.FEW[4096]
  assert rounds(DENSE, PASSES[0], full=True) == 30
  assert rounds(FLOOR, PASSES[1], cell=Cell(8, 4096)) == bench.FEW[4096]
  assert set(bench.LIMITS) <= set(bench.CELLS)


@pytest.fixture
def tiny(monkeypatch):
  """The bench on two tiny cells, without torch."""
  cells = (TINY, Cell(experts=2, tokens=64, d_model=8, d_ff=16))
  monkeypatch.setattr(bench, 'CELLS', cells)
  monkeypatch.setattr(bench, 'FEW', {32: 2, 64: 2})
  monkeypatch.setattr(bench, 'LIMITS', {cells[1]: 1.5})
  monkeypatch.setattr(public_layers, 'installed', lambda: False)
  monkeypatch.setattr(bench.timing, 'use_cores', lambda number: None)   # not for the other tests
  return cells


def test_a_tiny_run_writes_the_page_and_every_ratio(tiny, tmp_path, capsys):
  path = tmp_path / 'moe_layer.md'
  assert bench.main(['moe_layer', '--rounds=6', f'--results={path}']) == 0
  out, err = capsys.readouterr()
  assert out == path.read_text()
  assert 'Made by `python -m experiments.benchmarks.moe_layer' in out
  assert err == public_layers.MISSING + '\n'
  found = [json.loads(line) for line in path.with_suffix('.jsonl').read_text().splitlines()]
  assert [line['way'] for line in found[:8]] == [FLOOR, DENSE, *moe_layer_ways.ALL]
  assert len(found) == 16
  assert found[0]['cell'] == {'experts': 4, 'tokens': 32, 'd_model': 8, 'd_ff': 16}
  assert all(ratio == 1.0 for ratio in found[0]['to_floor'][PASSES[1]])
  limited = found[8 + 2]
  assert {which: len(ratios) for which, ratios in limited['to_floor'].items()} == {
      PASSES[0]: 2, PASSES[1]: 6}
  assert len(limited['to_dense'][PASSES[1]]) == 2
  assert all(ratio > 0 for line in found for ratio in line['to_dense'][PASSES[1]])
  assert out.count('\n| 2 | 64 |') == 8 + len(bench.LIMITED)


def test_ctrl_c_keeps_the_cells_that_are_finished(tiny, tmp_path, monkeypatch, capsys):
  path = tmp_path / 'moe_layer.md'
  before = bench.measure

  def stopped(cell, *args):
    if cell != TINY:
      raise KeyboardInterrupt
    return before(cell, *args)
  monkeypatch.setattr(bench, 'measure', stopped)
  assert bench.main(['moe_layer', '--rounds=2', f'--results={path}']) == 130
  assert 'stopped' in capsys.readouterr().err
  assert {row.cell for row in bench.read(path.with_suffix('.jsonl'))} == {TINY}
  assert '| 4 | 32 | top-2, grouped |' in path.read_text()


def test_a_cell_measured_again_takes_the_place_of_what_stood_there(tmp_path):
  path = tmp_path / 'moe_layer.jsonl'
  at = lambda cell, ratio: [dataclasses.replace(
      row(way, [ratio], cell), facts={'load': 1.0}) for way in (FLOOR, DENSE)]
  large, small = Cell(32, 4096), Cell(128, 1024)
  bench.store(path, at(large, 1.5))
  bench.store(path, at(small, 2.0))
  found = bench.store(path, at(large, 3.0))
  assert found == bench.read(path) == at(small, 2.0) + at(large, 3.0)


@pytest.mark.parametrize('argv, words', [
    (['moe_layr'], "benchmark: got 'moe_layr', allowed: moe_layer. Did you mean 'moe_layer'"),
    ([], 'NAME'),
    (['moe_layer', '--rounds=0'], '--rounds: got 0'),
    (['moe_layer', '--cores=-1'], '--cores: got -1'),
    (['moe_layer', '--cells=32x409'], "--cells: got '32x409'.*Did you mean '32x4096'"),
    (['moe_layer', '--ful'], "'--ful' is no flag.*did you mean '--full'"),
])
def test_a_wrong_command_line_is_one_clear_error(argv, words):
  with pytest.raises(ConfigError, match=words):
    bench.main(argv)


def test_all_ways_do_the_same_work():
  found = {way.name: way for way in moe_layer_ways.ways(TINY, moe_layer_ways.ALL)}
  outputs = {name: way.runs[PASSES[1]]() for name, way in found.items()}
  y, _ = outputs['expert choice, gather'][0]
  for how in ('einsum', 'grouped'):
    other, _ = outputs[f'expert choice, {how}'][0]
    assert jax.numpy.abs(other - y).max() < 1e-5 < jax.numpy.abs(y).max()
  for name in moe_layer_ways.ALL:
    (_, loss), _, ((params, x),) = outputs[name]
    assert x.shape == (1, TINY.tokens, TINY.d_model)
    assert all(jax.numpy.abs(leaf).max() > 0 for leaf in jax.tree.leaves(params))
    assert (loss > 0) == name.startswith('top-2')
  for name, rows in ((FLOOR, (4, 16, 8)), (DENSE, (64, 8))):
    assert outputs[name][0].shape == outputs[name][2][0][1].shape == rows


def temporaries(way, tokens):
  cell = Cell(experts=8, tokens=tokens, d_model=16, d_ff=32)
  return next(found.temporary for found in moe_layer_ways.ways(cell, (way,)) if found.name == way)


@pytest.mark.parametrize('way', [name for name in moe_layer_ways.ALL if 'einsum' not in name])
def test_temporary_memory_is_linear_in_tokens(way):
  less, more = temporaries(way, 1024), temporaries(way, 4096)
  for which in PASSES:
    assert less[which] > 0 and more[which] == pytest.approx(4 * less[which], rel=0.1)


@pytest.mark.parametrize('way, rows', [('expert choice, gather', 5), ('top-2, gather', 9)])
def test_it_stays_so_beside_the_floor_in_the_sizes_that_are_timed(way, rows):
  """Per token no more than so many times its 2 rows of float32, where the floor's own jumps."""
  for tokens in (1024, 4096, 16384):
    cell = Cell(experts=8, tokens=tokens)
    took = {found.name: found.temporary[PASSES[1]] for found in moe_layer_ways.ways(cell, (way,))}
    assert 0 < took[way] - took[FLOOR] <= rows * tokens * 2 * cell.d_model * 4


def test_that_of_one_hot_dispatch_is_not():
  assert (temporaries('top-2, einsum', 1024)[PASSES[1]]
          > 3 * 4 * temporaries('top-2, einsum', 256)[PASSES[1]])
