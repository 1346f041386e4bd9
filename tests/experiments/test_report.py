"""Table, CSV and plot from hand-made results, with numbers worked out by hand."""

import csv
import io
import json

import pytest

from experiments import report, results
from moejax.config import ConfigError

VERSIONS = dict.fromkeys(report.VERSIONS, '1.0')


def row(arm, *, start, end, flops, losses, reference=False, gap=None, seconds=1.0, domain='d',
        fingerprint='f' * 64):
  """An arm of a base that took 1000 steps of 10 FLOPs; losses: {step: validation loss}."""
  return {
      'suite': 's', 'scale': 'mini', 'suite_command': 'python -m experiments.main --suite=s',
      'domain': domain, 'arm': arm, 'reference': reference, 'key': 'k' + arm,
      'fingerprint': fingerprint, 'versions': VERSIONS, 'devices': '1 x cpu', 'parameters': 7,
      'parameters_active_per_token': 5, 'start_step': start, 'end_step': end,
      'flops_per_step': flops, 'base_steps': 1000, 'base_flops': 10_000, 'base_seconds': 12.3,
      'seconds': seconds, 'step0': None if gap is None else {'step0_gap': gap},
      'history': [{'step': s, 'loss': x, 'accuracy': 0.5} for s, x in losses.items()],
      'final': {'validation': {'loss': losses[end], 'accuracy': 0.5},
                'test': {'loss': losses[end] + 1, 'accuracy': 0.25}},
  }


def rows():
  return [
      row('dense', start=1000, end=1300, flops=10, losses={1000: 2.0, 1300: 1.5}, gap=0.0,
          reference=True),
      row('sparse', start=1000, end=1200, flops=15, losses={1000: 2.25, 1200: 1.25}, gap=0.25,
          seconds=3.14),
      row('scratch', start=0, end=200, flops=15, losses={0: 9.0, 100: 6.0, 200: 4.0}),
  ]


def cells(markdown, arm):
  line = next(x for x in markdown.splitlines() if x.startswith(f'| {arm}'))
  return [cell.strip() for cell in line.strip('|').split('|')]


def test_the_table_has_the_numbers_worked_by_hand():
  text = report.to_markdown(rows())
  # 300 steps x 10 FLOPs of 1000 x 10; 200 x 15 is as much, over fewer steps.
  assert cells(text, 'dense') == ['dense *', '1.5000', '–', '0.5000', '2.5000', '0.2500', '300',
                                  '30.0 %', '+0.0000', '1.0 s']
  assert cells(text, 'sparse') == ['sparse', '1.2500', '-0.2500', '0.5000', '2.2500', '0.2500',
                                   '200', '30.0 %', '+0.2500', '3.1 s']
  assert cells(text, 'scratch')[1:3] == ['4.0000', '+2.5000']
  assert cells(text, 'scratch')[6:9] == ['200', '30.0 %', '–']
  assert '1,000 steps of dense pretraining, 1.00e+04 FLOPs' in text
  assert 'ffffffffffffffff' in text and 'jax 1.0' in text
  assert 'python -m experiments.main --suite=s' in text


def test_the_csv_has_the_same_unrounded():
  sparse = list(csv.DictReader(io.StringIO(report.to_csv(rows()))))[1]
  assert float(sparse['extra_flops_percent']) == 30.0
  assert float(sparse['validation_loss_minus_reference']) == -0.25
  assert sparse['seconds'] == '3.14' and sparse['key'] == 'ksparse'


def test_curves_start_at_zero_extra_flops():
  assert report.curve(rows()[1]) == ([0.0, 30.0], [2.25, 1.25])
  assert report.curve(rows()[2]) == ([0.0, 15.0, 30.0], [9.0, 6.0, 4.0])


def test_the_loss_axis_shows_whole_branches_and_ends_that_do_not_flatten_them():
  # The branches span 1.25 to 2.25; an end up to 2.25 + (2.25 - 1.25) is shown too, and 4.0 is not.
  assert report.loss_axis(rows()) == pytest.approx((1.25 - 0.06, 2.25 + 0.06))
  near = rows()[:2] + [row('scratch', start=0, end=200, flops=15, losses={0: 9.0, 200: 3.25})]
  assert report.loss_axis(near) == pytest.approx((1.25 - 0.12, 3.25 + 0.12))


def test_data_that_differ_in_a_domain_are_refused_and_may_differ_between_domains():
  mixed = [rows()[0], row('other', start=0, end=1, flops=1, losses={1: 1.0}, fingerprint='0' * 64)]
  with pytest.raises(ConfigError, match='different data'):
    report.to_markdown(mixed)
  mixed[1]['domain'] = 'another'
  assert '**another**' in report.to_markdown(mixed)


def test_report_rebuilds_all_files_from_results_jsonl_alone(tmp_path, capsys):
  results.write(rows(), tmp_path)
  argv = ['--suite=quickstart', f'--results={tmp_path}']
  assert report.main(argv) == 0
  assert 'sparse' in capsys.readouterr().out
  files = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
  assert set(files) == {'results.jsonl', 's.md', 's.csv', 's.png'}
  assert files['s.png'].startswith(b'\x89PNG')
  assert [json.loads(x)['arm'] for x in files['results.jsonl'].splitlines()] == [
      'dense', 'sparse', 'scratch']
  assert report.main(argv) == 0
  assert files == {f.name: f.read_bytes() for f in tmp_path.iterdir()}


def test_report_says_when_there_is_nothing_to_report(tmp_path):
  with pytest.raises(ConfigError, match='no results in'):
    report.main(['--suite=quickstart', f'--results={tmp_path}'])
