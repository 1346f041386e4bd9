"""Pairs reported one after the other, from workdirs made by hand, join in one results.jsonl."""

import json

import pytest

from experiments import main, results
from experiments import suite as suite_lib
from experiments.session import Session
from experiments.suite import Arm, Claim, Suite
from tests.experiments.test_results import child, dense, trained


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
  """Names of workdirs without reading data."""
  monkeypatch.setattr(suite_lib, '_fingerprint', lambda config: 'f' * 64)


def two_pairs() -> Suite:
  arms = []
  for pair in (0, 1):
    parent = dense(seed=pair)
    arms += [Arm('d', 'parent', parent, parent, pair=pair, reference=True),
             Arm('d', 'child', child(parent, seed=pair), parent, pair=pair)]
  claim = Claim('it helps', 'someone', 'no figures', 'd', 'child', '<', 'parent')
  return Suite('quickstart', 'mini', tuple(arms), (claim,))


def report(folder, *pairs) -> list[int]:
  """Reports some pairs, whose workdirs alone are there; returns the pairs of the rows."""
  runs, suite = folder / '-'.join(map(str, pairs)), two_pairs()
  runs.mkdir(parents=True)
  for arm in suite.of_pairs(pairs).arms:
    first = 0 if arm.name == 'parent' else 20
    trained(runs, arm.run, first, 20, 30 + first + arm.pair)
  numbers = ','.join(map(str, pairs))
  args = main.parse(['--suite=quickstart', f'--runs={runs}', f'--results={folder / "out"}',
                     f'--pairs={numbers}'])
  Session({'quickstart': suite}, args)._report('quickstart')
  return [row['pair'] for row in results.read(folder / 'out').rows]


def test_pairs_that_are_trained_on_different_machines_join_in_one_table(tmp_path, capsys):
  assert report(tmp_path, 1) == [1, 1]
  assert 'one pair' in (tmp_path / 'out' / 'quickstart.md').read_text()
  assert report(tmp_path, 0) == [0, 0, 1, 1]
  one_by_one = (tmp_path / 'out' / 'quickstart.md').read_text()
  assert 'one pair' not in one_by_one
  assert report(tmp_path / 'whole', 0, 1) == [0, 0, 1, 1]
  assert (tmp_path / 'whole' / 'out' / 'quickstart.md').read_text() == one_by_one
  lines = map(json.loads, (tmp_path / 'out' / results.FILE).read_text().splitlines())
  assert [line['kind'] for line in lines] == ['suite', 'claim'] + 4 * ['arm']
