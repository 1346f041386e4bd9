"""The layer benchmark: tables of made-up ratios; equal work and memory of its ways, for real."""

import time

import jax
import pytest

from experiments.benchmarks import common, moe_layer, moe_layer_ways
from experiments.benchmarks.moe_layer_ways import DENSE, FLOOR, PASSES, Size, Way
from moejax.train import metrics

TINY = Size(experts=4, tokens=32, d_model=8, d_ff=16)
LARGE = Size(32, 4096)


def line(way, ratios, size=LARGE, flops=1.0, temporary=8_000_000):
  by_pass = {PASSES[0]: ratios[:1], PASSES[1]: ratios}
  return {'size': vars(size), 'way': way, 'flops': flops, 'to_floor': by_pass, 'to_dense': by_pass,
          'temporary': {PASSES[1]: temporary}, 'facts': {}}


def cells(row):
  return [cell.strip() for cell in row.split('|')[1:-1]]


@pytest.mark.parametrize('ratios, held', [
    ([1.0] * 20 + [1.2] * 10, 'yes'), ([1.0] * 19 + [1.2] * 11, 'no'), ([1.0] * 4, 'not known')])
def test_a_limit_is_held_by_the_bound_and_not_by_the_median(ratios, held):
  assert moe_layer.LIMITS[LARGE] == 1.10
  lines = [line(FLOOR, [1.0] * 30), line('top-2, gather', ratios), line('top-2, grouped', ratios)]
  [row] = moe_layer.limits(lines)[2:]
  assert cells(row)[2:4] == ['top-2, gather', '1.000']
  assert cells(row)[-3:] == ['1.10', str(len(ratios)), held]


def test_ratios_per_flop_and_bytes_per_token_are_in_the_table():
  lines = [line(FLOOR, [1.0], temporary=4_096_000), line('Mixtral', [3.0, 3.0, 6.0], flops=1.5)]
  _, row = moe_layer.everything(lines)[2:]
  assert cells(row) == ['32', '4096', 'Mixtral', '3.00', '3.00', '', '1.50', '2.00', '3.00', '3.00',
                        '8', '953', '1 or 3', '']


def test_only_the_sizes_with_a_limit_take_long():
  rounds = lambda *key, size=LARGE, full=False: moe_layer.rounds_of(size, *key, full, 30)
  assert rounds(FLOOR, PASSES[1]) == rounds('top-2, gather', PASSES[1]) == 30
  assert rounds(DENSE, PASSES[1]) == rounds('top-2, gather', PASSES[0]) == moe_layer.FEW[4096]
  assert rounds(DENSE, PASSES[0], full=True) == 30
  assert rounds(FLOOR, PASSES[1], size=Size(8, 4096)) == moe_layer.FEW[4096]
  assert set(moe_layer.LIMITS) <= set(moe_layer.SIZES)


def made_up_ways(size, names):
  """Ways that take no time worth mentioning."""
  work = dict.fromkeys(PASSES, lambda: time.sleep(1e-4))
  return [Way(name, 1.0, work, dict.fromkeys(PASSES, 8)) for name in (FLOOR, DENSE, *names)]


def test_each_size_is_kept_at_once(tmp_path, monkeypatch, capsys):
  """Two sizes, without torch; stopped in the second, and started again for that one."""
  sizes = (TINY, Size(experts=2, tokens=64, d_model=8, d_ff=16))
  monkeypatch.setattr(moe_layer, 'SIZES', sizes)
  monkeypatch.setattr(moe_layer, 'FEW', {32: 2, 64: 2})
  monkeypatch.setattr(moe_layer, 'LIMITS', {sizes[1]: 1.5})
  monkeypatch.setattr(moe_layer_ways, 'ways', made_up_ways)
  monkeypatch.setattr(moe_layer_ways, 'torch_installed', lambda: False)
  monkeypatch.setattr(common, 'use_cores', lambda number: None)   # not for the other tests
  page = tmp_path / 'moe_layer.md'
  before = moe_layer.measure

  def stopped(size, *args):
    if size != TINY:
      raise KeyboardInterrupt
    return before(size, *args)
  monkeypatch.setattr(moe_layer, 'measure', stopped)
  assert moe_layer.main(['--rounds=6', f'--results={page}']) == 130
  assert moe_layer_ways.NO_TORCH in capsys.readouterr().err
  lines = metrics.read_lines(page.with_suffix('.jsonl'))
  assert [line['way'] for line in lines] == [FLOOR, DENSE, *moe_layer_ways.ALL]
  assert lines[0]['size'] == {'experts': 4, 'tokens': 32, 'd_model': 8, 'd_ff': 16}

  monkeypatch.setattr(moe_layer, 'measure', before)
  assert moe_layer.main(['--rounds=6', '--sizes=2x64', f'--results={page}']) == 0
  assert capsys.readouterr().out == page.read_text()
  assert 'experiments.benchmarks.moe_layer --rounds=6`, `python' in ' '.join(
      page.read_text().split())
  both = metrics.read_lines(page.with_suffix('.jsonl'))
  assert both[:len(lines)] == lines and len(both) == 2 * len(lines)
  assert lines[0]['to_floor'][PASSES[1]] == [1.0] * 2
  limited = next(line for line in both[len(lines):] if line['way'] == 'top-2, gather')
  assert [len(limited['to_floor'][which]) for which in PASSES] == [2, 6]
  assert len(limited['to_dense'][PASSES[1]]) == 2
  rows = len(lines) + len(moe_layer.LIMITED)
  assert page.read_text().count('\n| 2 | 64 |') == rows


def test_all_ways_do_equal_work():
  outputs = {way.name: way.calls[PASSES[1]]()
             for way in moe_layer_ways.ways(TINY, moe_layer_ways.ALL)}
  y, _ = outputs['expert choice, gather'][0]
  for how in ('einsum', 'grouped'):
    other, _ = outputs[f'expert choice, {how}'][0]
    assert jax.numpy.abs(other - y).max() < 1e-5 < jax.numpy.abs(y).max()
  for name in moe_layer_ways.ALL:
    (_, loss), _, ((params, x),) = outputs[name]
    assert x.shape == (1, TINY.tokens, TINY.d_model)
    assert all(jax.numpy.abs(leaf).max() > 0 for leaf in jax.tree.leaves(params))
    assert (loss > 0) == name.startswith('top-2')
  for name, shape in ((FLOOR, (4, 16, 8)), (DENSE, (64, 8))):
    assert outputs[name][0].shape == outputs[name][2][0][1].shape == shape


def temporaries(size, names):
  """{way: bytes of the forward and backward pass}."""
  return {way.name: way.temporary[PASSES[1]] for way in moe_layer_ways.ways(size, names)}


def test_temporary_memory_is_linear_in_tokens():
  linear = tuple(name for name in moe_layer_ways.ALL if 'einsum' not in name)
  less, more = (temporaries(Size(experts=8, tokens=tokens, d_model=16, d_ff=32), linear)
                for tokens in (1024, 4096))
  for name in linear:
    assert less[name] > 0 and more[name] == pytest.approx(4 * less[name], rel=0.1)


def test_memory_beside_the_floor_in_a_size_that_is_timed():
  """Per token no more than so many times its 2 rows of float32."""
  rows = {'expert choice, gather': 5, 'top-2, gather': 9}
  size = Size(experts=8, tokens=4096)
  took = temporaries(size, tuple(rows))
  for name, most in rows.items():
    assert 0 < took[name] - took[FLOOR] <= most * size.tokens * 2 * size.d_model * 4
