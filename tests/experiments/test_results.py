"""results.jsonl: read out of workdirs, worked by hand; and it comes back as it was written."""

import json
import math

import pytest

from experiments import results, untrained
from experiments import suite as suite_lib
from experiments.suite import Arm, Claim, Suite
from moejax.config import ConfigError
from tests.experiments import made_up
from tests.experiments.made_up import child, dense, trained


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
  """Names of workdirs without reading data."""
  monkeypatch.setattr(suite_lib, '_fingerprint', lambda config: 'f' * 64)


def test_arms_are_read_from_their_workdirs(tmp_path):
  parent, other = dense(), child(dense())
  scratch = dense(seed=1)
  trained(tmp_path, parent, 0, 20, 30)
  trained(tmp_path, other, 20, 30, 40, gap=0.5)
  trained(tmp_path, scratch, 0, 10, 10)
  claim = Claim('it helps', 'someone', 'no figures', 'd', 'child', '<', 'parent')
  suite = Suite('s', 'mini', (Arm('d', 'parent', parent, parent, pair=3, reference=True),
                              Arm('d', 'child', other, parent, pair=3, series='c', x=2.0),
                              Arm('d', 'scratch', scratch, parent)), (claim,), plot='sweep',
                x_label='size')
  found = results.collect(suite, tmp_path)
  first, second, third = found.records
  # The parent's own line is its cooldown, 20 to 30; the child's steps are 20 to 40.
  assert (first['start_step'], first['end_step'], first['seconds']) == (20, 30, 5.0)
  assert (second['start_step'], second['end_step'], second['seconds']) == (20, 40, 10.0)
  assert (third['start_step'], third['end_step'], third['seconds']) == (0, 10, 5.0)
  column = lambda *names: [tuple(record[name] for name in names) for record in found.records]
  assert column('base_steps', 'base_flops', 'base_seconds') == [(20, 60, 10.0)] * 3
  assert column('pair', 'reference') == [(3, True), (3, False), (0, False)]
  assert column('series', 'x', 'time_ratio') == [
      ('', None, None), ('c', 2.0, None), ('', None, None)]
  assert column('step0') == [(None,), ({'step0_gap': 0.5},), (None,)]
  assert second['history'] == [{'step': s, 'loss': 100 - s, 'accuracy': 0.5}
                               for s in (20, 25, 30, 35, 40)]
  assert [line['step'] for line in first['history']] == [20, 25, 30]
  assert second['final'] == {
      'train': {'loss': 7.0}, 'test': {'loss': 160, 'exact_match': 0.25},
      'validation': {'loss': 60, 'accuracy': 0.5, 'moe/02/dropped': 0.125}}
  assert second['parent'] == parent.key and second['config']['init']['parent'] == parent.key
  assert found.claims == (claim,)
  assert found.suite['runs'] == [
      {'key': run.key, 'devices': '1 x cpu', 'seconds': seconds, 'cpu_seconds': cpu}
      for run, seconds, cpu in ((parent, 15.0, 30.5), (other, 10.0, None), (scratch, 5.0, 10.5))]
  assert (found.suite['plot'], found.suite['x_label']) == ('sweep', 'size')
  assert found.suite['pairs'] == 2
  assert found.suite['suite_command'] == suite.command()


def test_torn_last_lines_are_left_out_and_damaged_files_are_named(tmp_path):
  parent, other = dense(), child(dense())
  trained(tmp_path, parent, 0, 20, 30)
  trained(tmp_path, other, 20, 30, 40, gap=0.5)
  suite = Suite('s', 'mini', (Arm('d', 'child', other, parent),))
  before = results.collect(suite, tmp_path)
  for name in ('metrics.jsonl', 'timing.jsonl'):
    with (tmp_path / other.name / name).open('a') as file:
      file.write('{"step": 40, "val')
  assert results.collect(suite, tmp_path) == before
  for name, fix in (('receipt.json', 'Delete the whole run'), ('run.json', 'Delete that file')):
    (tmp_path / other.name / name).write_text('{"a')
    with pytest.raises(ConfigError, match=f'{other.name}.*whose {name} can be read.*{fix}'):
      results.collect(suite, tmp_path)


def test_a_rung_counts_the_steps_of_the_continuation_it_cools(tmp_path):
  parent = dense()
  long = child(parent, steps=30)
  rung = child(long, steps=10)
  trained(tmp_path, parent, 0, 20, 30)
  trained(tmp_path, long, 20, 50, 50, gap=0.25)
  trained(tmp_path, rung, 40, 40, 50, gap=0.0)
  suite = Suite('s', 'mini', (
      Arm('d', 'rung', rung, parent, start_step=15, base_step=10),
      Arm('d', 'later', rung, parent, start_step=30), Arm('d', 'alone', rung, parent),
      Arm('d', 'whole', rung, parent, start_step=20)))
  rung, later, alone, whole = results.collect(suite, tmp_path).records
  # 5 steps of the parent, 20 of the continuation up to 40 and not its 10 beyond, 10 of its own.
  assert (rung['start_step'], rung['seconds']) == (15, 17.5)
  assert (later['start_step'], later['seconds']) == (30, 10.0)
  assert (alone['start_step'], alone['seconds']) == (40, 5.0)
  # Surgery was what the continuation began with.
  assert whole['step0'] == later['step0'] == {'step0_gap': 0.25}
  assert alone['step0'] == {'step0_gap': 0.0} and rung['step0'] is None
  assert (rung['base_steps'], rung['base_flops'], rung['base_seconds']) == (10, 30, 5.0)
  assert (later['base_steps'], later['base_seconds']) == (20, 10.0)


def test_surgeries_are_arms_that_cost_no_training(tmp_path, monkeypatch):
  parent = dense()
  cell = untrained.UntrainedRun('cell', 'vit_glyphs', {'init.mode': 'continue'}, parent, 'runlocal')
  trained(tmp_path, parent, 0, 20, 30)
  measured = {'start_step': 20, 'end_step': 20, 'final': {}, 'step0': {'step0_gap': 0.5}}
  monkeypatch.setattr(untrained, 'facts', lambda run, folder: measured)
  found = results.collect(Suite('s', 'mini', (Arm('d', 'cell', cell, parent, x=8),)), tmp_path)
  record, = found.records
  assert measured.items() <= record.items() and (record['x'], record['base_steps']) == (8, 20)
  assert [run['key'] for run in found.suite['runs']] == [parent.key]


def three_pair_suite(pairs=(0, 1, 2)):
  arms = [Arm('d', name, dense(), dense(), pair=pair) for pair in pairs
          for name in ('dense', 'sparse')]
  return Suite('s', 'mini', tuple(arms), (made_up.claim(),))


def of_pairs(*pairs):
  records = [record for record in made_up.three_pairs() if record['pair'] in pairs]
  return made_up.results(records, *([made_up.claim()] if len(pairs) == 3 else []))


def test_pairs_that_were_measured_apart_are_merged_into_what_measuring_all_gives():
  suite, whole = three_pair_suite(), of_pairs(0, 1, 2)
  merged = results.merge(suite, of_pairs(1), results.merge(suite, of_pairs(2, 0), of_pairs(2, 0)))
  assert merged.records == whole.records and merged.claims == whole.claims
  assert results.merge(suite, of_pairs(1), of_pairs(1)).suite['pairs'] == 3
  by_key = lambda found: sorted(found.suite['runs'], key=lambda run: run['key'])
  assert by_key(merged) == by_key(whole)
  once_more = results.merge(suite, of_pairs(1), whole)
  assert (once_more.records, once_more.suite) == (whole.records, whole.suite | {'pairs': 3})


def test_a_pair_that_is_measured_again_replaces_its_arms_and_costs_twice():
  again = of_pairs(1)
  for record in again.records:
    record['final']['test']['loss'] = 9.0
  for run in again.suite['runs']:
    run['seconds'] = 7.0
  merged = results.merge(three_pair_suite(), again, of_pairs(0, 1, 2))
  assert [record['final']['test']['loss'] == 9.0 for record in merged.records] == (
      [False] * 2 + [True] * 2 + [False] * 2)
  assert len(merged.suite['runs']) == 8


def test_arms_a_suite_no_longer_has_are_not_merged_and_other_suites_are_refused():
  merged = results.merge(three_pair_suite(pairs=(1, 2)), of_pairs(1), of_pairs(0, 1, 2))
  assert [record['pair'] for record in merged.records] == [1, 1, 2, 2]
  other = made_up.results(made_up.three_pairs(), name='t')
  with pytest.raises(ConfigError, match="--results: got 'a folder with results of suite t'"):
    results.merge(three_pair_suite(), of_pairs(1), other)


def test_what_is_written_is_read_back_and_written_the_same(tmp_path):
  found = made_up.results(made_up.three_pairs(), made_up.claim(), made_up.claim('~', 0.1))
  found.records[0]['final']['test']['loss'] = math.inf
  results.write(found, tmp_path)
  again = results.read(tmp_path)
  assert again == found and isinstance(again.claims[1], Claim)
  lines = [json.loads(line) for line in (tmp_path / results.FILE).read_text().splitlines()]
  assert [line['kind'] for line in lines] == ['suite', 'claim', 'claim'] + 6 * ['arm']
  assert set(lines[1]) == {'kind', 'says', 'source', 'paper', 'domain', 'a', 'relation', 'b',
                           'metric', 'margin', 'than'}
  before = (tmp_path / results.FILE).read_bytes()
  results.write(again, tmp_path)
  assert (tmp_path / results.FILE).read_bytes() == before


def test_no_results_and_half_of_them_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='no results in'):
    results.read(tmp_path)
  results.write(made_up.results(made_up.one_pair()), tmp_path)
  path = tmp_path / results.FILE
  path.write_text(path.read_text().split('\n', 1)[1])
  with pytest.raises(ConfigError, match='0 lines of kind "suite" in place of one'):
    results.read(tmp_path)
  results.write(made_up.results(made_up.three_pairs(), made_up.claim()), tmp_path)
  whole = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(whole)[:-10])   # as where a copy was cut off
  with pytest.raises(ConfigError, match="not whole: it has 5 lines of kind 'arm'.*main"):
    results.read(tmp_path)
  path.write_text(''.join([whole[0], *whole[2:]]))
  with pytest.raises(ConfigError, match="not whole: it has 0 lines of kind 'claim'"):
    results.read(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='--results: got .* a folder that can be written'):
    results.write(made_up.results(made_up.one_pair()), tmp_path / 'file')
