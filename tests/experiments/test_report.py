"""Tables, CSV, plots and page from hand-made results, with numbers worked out by hand.

tests/test_docs.py compares what the committed results have, byte for byte: more columns and axes.
"""

import csv
import io
import math

import pytest

from experiments import plots, report, results, results_page, tables
from moejax.config import ConfigError
from tests.experiments import made_up

T_2_DF = 4.302652729749   # 97.5 % quantile of Student's t with 2 degrees of freedom, from a table


def cells(markdown, first):
  line = next(x for x in markdown.splitlines() if x.startswith(f'| {first}'))
  return [cell.strip() for cell in line.strip('|').split(' | ')]


def test_the_table_of_one_pair_has_the_numbers_worked_by_hand():
  text = tables.to_markdown(made_up.results(made_up.one_pair()))
  assert cells(text, 'arm') == ['arm', 'val. loss', 'Δ', 'val. acc.', 'test loss', 'test acc.',
                                'extra steps', 'extra FLOPs', 'step-0 gap', 'wall time']
  # 300 steps x 10 FLOPs of 1000 x 10; 200 x 15 is as much, over fewer steps.
  assert cells(text, 'dense') == ['dense *', '1.5000', '–', '0.5000', '2.5000', '0.2500', '300',
                                  '30.0 %', '+0.0000', '1.0 s']
  assert cells(text, 'sparse') == ['sparse', '1.2500', '-0.2500', '0.5000', '2.2500', '0.2500',
                                   '200', '30.0 %', '+0.2500', '3.1 s']
  assert cells(text, 'scratch')[1:3] == ['4.0000', '+2.5000']
  assert cells(text, 'scratch')[6:9] == ['200', '30.0 %', '–']
  assert '1,000 steps of dense pretraining, 1.00e+04 FLOPs, 12 s' in text
  assert 'ffffffffffffffff' in text and 'jax 1.0' in text
  assert 'python -m experiments.main --suite=s' in text
  prose = ' '.join(text.split())
  assert 'Δ is validation loss minus' in prose and 'One seed per arm' in prose


def test_the_table_of_three_pairs_has_the_numbers_worked_by_hand():
  found = made_up.results(made_up.three_pairs(), made_up.claim(), metrics=['validation/loss'])
  text = tables.to_markdown(found)
  assert cells(text, 'arm') == ['arm', 'val. loss', 'Δ', 'extra steps', 'extra FLOPs', 'extra time',
                                'step-0 gap', 'pairs']
  # Means of 1, 2, 3 and 0.5, 1, 1.5 with sd 1 and 0.5; differences -0.5, -1, -1.5 with sd 0.5.
  half = T_2_DF / math.sqrt(3)
  assert cells(text, 'dense *') == ['dense *', f'2.0000 ± {half:.4f}', '–', '300', '30.0 %',
                                    '30.0 %', '+0.0000 ± 0.0000', '3']
  # 200 steps of 1.5 times the time; gaps 0, 0.1, 0.2.
  assert cells(text, 'sparse  ') == [
      'sparse', f'1.0000 ± {half / 2:.4f}', f'-1.0000 ± {half / 2:.4f}', '200', '30.0 %', '30.0 %',
      f'+0.1000 ± {half / 10:.4f}', '3']
  # t = -1 / (0.5 / sqrt 3) = -sqrt 12: p = 1 - sqrt(12 / 14) as in test_verdict.
  assert cells(text, 'sparse beats dense (below 0)')[1:] == [
      'undecided', 'sparse − dense: val. loss -1.0000',
      f'{-1 - half / 2:+.4f} to {-1 + half / 2:+.4f}', '3', '0.074']
  prose = ' '.join(text.split())
  assert 'One seed' not in prose and 'Wall time' not in prose and 'Extra time' in prose
  assert 'the pairs are aligned' in prose and 'those of the means' not in prose


def test_a_diverged_arm_is_said_in_the_table():
  rows = made_up.three_pairs()
  rows[3]['final']['validation']['loss'] = math.nan
  text = tables.to_markdown(made_up.results(rows, made_up.claim()))
  assert cells(text, 'sparse  ')[1:3] == ['nan in 1 of 3', 'nan in 1 of 3']
  assert cells(text, 'sparse beats')[1] == (
      'undecided; validation/loss of sparse is nan in pair 1')
  rows[0]['final']['validation']['loss'] = math.inf
  assert tables.mean([math.inf], '{:.4f}') == 'inf'


def test_the_csv_has_every_arm_and_pair_unrounded():
  rows = made_up.three_pairs()
  rows[5]['final']['validation']['loss'] = 1 / 3
  lines = list(csv.DictReader(io.StringIO(tables.to_csv(made_up.results(rows)))))
  assert [(line['arm'], line['pair']) for line in lines] == [
      ('dense', '0'), ('dense', '1'), ('dense', '2'), ('sparse', '0'), ('sparse', '1'),
      ('sparse', '2')]
  last = lines[-1]
  assert float(last['validation_loss']) == 1 / 3
  assert float(last['validation_loss_minus_reference']) == 1 / 3 - 3
  assert float(last['test_loss']) == 2.5 and float(last['test_loss_minus_reference']) == -1.5
  assert lines[0]['validation_loss_minus_reference'] == ''
  assert float(last['extra_flops_percent']) == 30 == float(last['extra_time_percent'])
  assert float(last['step0_gap']) == 0.2
  assert (last['series'], last['x'], last['key']) == ('upcycled', '8', 'ksparse2')
  assert float(last['seconds']) == 1.0


def test_curves_start_at_zero_extra_flops_and_have_the_steps_of_all_pairs():
  domain, = results.by_domain(made_up.three_pairs(), []).values()
  still = dict.fromkeys(range(3), 0.0)
  assert plots.curve(domain[0], still) == [(0, [4.0, 5.0, 6.0]), (30, [1.0, 2.0, 3.0])]
  assert plots.curve(domain[1], still) == [
      (0, [5.0] * 3), (15, [4.0] * 3), (30, [0.5, 1.0, 1.5])]
  assert plots.curve(domain[0], {0: -1.0, 1: 0.0, 2: 1.0}) == [(0, [5.0] * 3), (30, [2.0] * 3)]
  del domain[1].records[2]['history'][1]
  assert [at for at, _ in plots.curve(domain[1], still)] == [0, 30]
  scratch = results.by_domain(made_up.one_pair(), [])['d'][2]
  assert plots.curve(scratch, still) == [(0, [9.0]), (15, [6.0]), (30, [4.0])]


def test_pairs_are_aligned_at_a_reference_that_all_of_them_have():
  def offsets(rows):
    domain, = results.by_domain(rows, []).values()
    return plots.offsets(domain, 'validation/loss')
  assert offsets(made_up.three_pairs()) == {0: -1.0, 1: 0.0, 2: 1.0}   # ends of 1, 2, 3
  still = dict.fromkeys(range(3), 0.0)
  for broken in ('missing', 'infinite', 'none'):
    rows = made_up.three_pairs()
    dense = [row for row in rows if row['arm'] == 'dense']
    if broken == 'missing':
      rows.remove(dense[1])
    elif broken == 'infinite':
      dense[1]['final']['validation']['loss'] = math.inf
    else:
      for row in dense:
        row['reference'] = False
    assert offsets(rows) == still, broken
  domain, = results.by_domain(made_up.three_pairs(), ['validation/loss']).values()
  drawn = plots._aligned(domain, 'validation/loss')
  assert drawn == {'dense': [2.0] * 3, 'sparse': [1.5, 1.0, 0.5]}   # Δ -0.5, -1, -1.5


def test_what_is_claimed_comes_first_in_its_domain_alone():
  metrics = ['validation/loss', 'test/loss', 'test/nowhere']
  claims = [made_up.claim(metric='test/loss'), made_up.claim(metric='test/accuracy')]
  for domain, wanted in (('d', ['test/loss', 'validation/loss']), ('e', metrics[:2])):
    group, = results.by_domain(made_up.three_pairs(domain), []).values()
    assert results.measured_paths(group, metrics, claims) == wanted


def test_an_axis_shows_whole_branches_and_ends_that_do_not_flatten_them():
  group = results.by_domain(made_up.one_pair(), [])['d']
  def span(scratch, dense=(2.0, 1.5), interval=()):
    drawn = {'dense': [*dense], 'sparse': [2.25, 1.25], 'scratch': [9.0, scratch]}
    ends = {name: values[-1:] for name, values in drawn.items()}
    return plots.span(group, drawn, ends | {'scratch': [*interval, scratch]})

  # The branches span 1.25 to 2.25; an end up to one span away is shown too, and 4.0 is not.
  assert span(4.0) == pytest.approx((1.25 - 0.06, 2.25 + 0.06))
  assert span(3.25) == pytest.approx((1.25 - 0.12, 3.25 + 0.12))
  assert span(3.25, interval=(3.0, 5.25)) == pytest.approx((1.25 - 0.24, 5.25 + 0.24))
  # The same upside down, as of an accuracy; and what is not finite has no place on any axis.
  assert span(0.5) == pytest.approx((0.5 - 0.105, 2.25 + 0.105))
  assert span(-9.0) == span(math.inf) == pytest.approx((1.25 - 0.06, 2.25 + 0.06))
  assert span(4.0, dense=(2.0, math.nan)) == pytest.approx((1.25 - 0.06, 2.25 + 0.06))
  nothing = {line.name: [math.nan] for line in group}
  assert plots.span(group, nothing, nothing) == (-0.1, 0.1)


def test_an_arm_that_a_claim_is_about_is_shown_further_away():
  group = results.by_domain(made_up.one_pair(), [])['d']
  ends = {'dense': [1.5], 'sparse': [1.25], 'scratch': [2.4]}   # 0.9 above, 3.6 times the span
  assert plots.span(group, ends, ends) == pytest.approx((1.235, 1.515))
  low, high = plots.span(group, ends, ends, {'scratch'})
  assert low < 1.25 and 2.4 < high < 2.5
  ends['scratch'] = [2.6]
  assert plots.span(group, ends, ends, {'scratch'}) == pytest.approx((1.235, 1.515))
  group[-1].first['x'] = 8   # a sweep shows every arm that it is about
  assert plots.span(group, ends, ends)[1] > 2.6


def test_a_start_that_would_flatten_the_curves_is_told_in_words(tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(plots, '_write_notes', lambda panel, notes: shown.update(
      notes=notes, high=panel.get_ylim()[1] if panel.lines else None))
  rows = made_up.one_pair()[:2]   # dense from 2.0 to 1.5, sparse from 2.25 to 1.25
  plots.plot(made_up.results(rows), tmp_path / 'a.png')
  assert shown['notes'] == [] and shown['high'] > 2.25
  rows[1]['history'][0]['loss'] = 30.0
  plots.plot(made_up.results(rows), tmp_path / 'b.png')
  assert shown['notes'] == ['sparse starts at 30'] and shown['high'] < 3


def test_data_that_differ_in_a_domain_are_refused_and_may_differ_between_domains():
  mixed = [made_up.record('dense'), made_up.record('other', fingerprint='0' * 64)]
  with pytest.raises(ConfigError, match='different data'):
    tables.to_markdown(made_up.results(mixed))
  mixed[1]['domain'] = 'another'
  assert '**another**' in tables.to_markdown(made_up.results(mixed))


def two_domains(plot):
  """Both domains, one of them with an arm that diverged and one that started from nothing."""
  rows = made_up.three_pairs() + made_up.three_pairs('e', 'e' * 64)
  rows += [made_up.record('scratch', start=0, end=200, losses={0: 99.0, 200: 50.0}, pair=pair)
           for pair in range(3)]
  rows[-4]['final']['validation']['loss'] = rows[-4]['history'][-1]['loss'] = math.nan
  return made_up.results(rows, made_up.claim(), made_up.claim('~', 0.5, domain='e'), plot=plot,
                         x_label='experts', name=plot)


@pytest.mark.parametrize('plot', ['curves', 'points', 'sweep'])
def test_a_plot_draws_the_numbers_and_says_what_is_outside(plot, tmp_path, monkeypatch):
  drawn = {}
  monkeypatch.setattr(plots.Figure, 'savefig',
                      lambda figure, path, **_: drawn.update({path.name: figure}))
  plots.plot(two_domains(plot), tmp_path / 'p.png')
  left, right, *below = drawn['p.png'].axes
  assert (left.get_title(), right.get_title()) == ('d', 'e')
  assert 'validation loss (nats), pairs aligned' in (left.get_xlabel(), left.get_ylabel())
  assert any('outside' in text.get_text() and '50' in text.get_text() for text in left.texts)
  assert any('nan' in text.get_text() for text in right.texts)
  found = {tuple(map(float, points)) for line in left.get_lines() for points in [line.get_ydata()]}
  if plot == 'curves':
    assert {(5.0, 2.0), (5.0, 4.0, 1.0), (6.0, 5.0, 1.5), (4.0, 3.0, 0.5)} <= found
    dots = {tuple(map(float, line.get_xdata())) for line in below[0].get_lines()}
    assert {(2.0, 2.0, 2.0), (1.5, 1.0, 0.5)} <= dots and len(below) == 2
    assert left.get_xlabel() == 'extra FLOPs (% of dense pretraining)'
  elif plot == 'points':
    assert [text.get_text() for text in left.get_yticklabels()] == ['dense', 'sparse', 'scratch']
    dots = {tuple(map(float, line.get_xdata())) for line in left.get_lines()}
    assert {(2.0, 2.0, 2.0), (1.5, 1.0, 0.5), (2.0,), (1.0,)} <= dots
  else:
    assert (2.0, 2.0) in found and (1.0,) in found   # the control across, the series' one point
    assert left.get_xscale() == 'log' and left.get_xlabel() == 'experts'


def test_no_two_of_many_arms_look_alike():
  rows = [made_up.record(f'arm {i}') for i in range(40)]
  styles = plots._styles(results.by_domain(rows, []), 'curves').values()
  assert len({(s['color'], s['marker'], str(s['linestyle'])) for s in styles}) == 40


def test_report_rebuilds_a_suite_from_results_jsonl_alone(tmp_path, capsys):
  """As test_docs.py checks it of the committed results, their page included."""
  results.write(made_up.results(made_up.one_pair()), tmp_path)
  assert report.main(['--suite=quickstart', f'--results={tmp_path}']) == 0
  assert 'sparse' in capsys.readouterr().out
  assert {file.name for file in tmp_path.iterdir()} == {'results.jsonl', 's.md', 's.csv', 's.png'}
  with pytest.raises(ConfigError, match='--results: got .* a folder of folders with results.jsonl'):
    report.main([f'--results={tmp_path}'])


def test_the_page_has_claims_counts_and_costs_worked_by_hand():
  first = made_up.results(made_up.three_pairs(), made_up.claim(), made_up.claim('>'))
  rows = made_up.three_pairs('e', 'e' * 64)
  for row in rows:   # differences -1.1, -1.2, -1.3: t = -1.2 / (0.1 / sqrt 3) = -sqrt 432
    loss = {'dense': 3.0, 'sparse': 1.9 - 0.1 * row['pair']}[row['arm']]
    row['final']['validation']['loss'] = loss
  second = made_up.results(rows, made_up.claim(domain='e'), name='t')
  third = made_up.results(made_up.one_pair(), name='u')
  second.suite['pairs'] = 5
  early = results_page.to_markdown({'s': first, 't': second, 'u-smoke': third})
  assert cells(early, '[t, scale mini](#t-scale-mini)')[1:] == ['3 of 5', '1', '0', '0', '1']
  assert early.count('3 of 5 pairs are trained so far; verdicts wait for the others.') == 1
  second.suite['pairs'] = 3
  text = results_page.to_markdown({'s': first, 't': second, 'u-smoke': third})
  assert cells(text, '[s, scale mini](#s-scale-mini)')[1:] == ['3', '2', '0', '0', '2']
  assert cells(text, '[t, scale mini](#t-scale-mini)')[1:] == ['3', '1', '1', '0', '0']
  assert 'trained so far' not in text
  assert cells(text, '3 suites') == ['3 suites', '', '3', '1', '0', '2']
  line = cells(text, 'e ')
  assert line[:6] == ['e', 'sparse beats dense (below 0)', 'Someone 2023, Fig. 1', r'1 % \| 2 %',
                      '**reproduced**', 'sparse − dense: val. loss -1.2000']
  assert line[7:] == ['3', f'{1 - math.sqrt(432 / 434):.2g}']
  # Two claims of one suite: p is twice what it is in the table of three pairs above.
  assert [cells(text, 'd  ')[i] for i in (4, 8)] == ['undecided', '0.15']
  # Of fifteen rows, six runs and the one from scratch are different: half an hour each.
  assert 'Train steps of 7 runs on 1 x cpu each' in text and ': 3.50 hours' in text
  assert '- Data source of d: fingerprint ffffffffffffffff' in text
  assert '- Data source of e: fingerprint eeeeeeeeeeeeeeee' in text
  assert '`python -m experiments.main --suite=t` · [table](t/t.md)' in text
  assert '[table](u-smoke/u.md)' in text and '![What u is about.](u-smoke/u.png)' in text
  assert 'It makes no claim.' in text and 'Where we disagree' not in text
  assert 'Here 2 suites make claims: expect a wrong verdict, by chance, in 0.1 of them' in text
  assert '## Where we disagree, and why\n\nBecause *so*.\n\n' in results_page.to_markdown(
      {'s': first}, 'Because *so*.\n')


def test_time_is_that_of_every_training_and_cpu_time_that_of_the_runs_that_recorded_it():
  first, again = made_up.results(made_up.one_pair()), made_up.results(made_up.one_pair(), name='t')
  again.suite['runs'][0]['seconds'] = 3600.0   # trained once more
  text = results_page.to_markdown({'s': first, 't': again})
  assert 'Train steps of 4 runs on 1 x cpu each' in text and ': 2.50 hours' in text
  assert 'CPU time' not in text
  first.suite['runs'][0]['cpu_seconds'], first.suite['runs'][1]['cpu_seconds'] = 5400.0, None
  text = results_page.to_markdown({'s': first})
  assert 'CPU time of the processes of 1 of the 3 runs' in text
  assert 'start-up not: 1.50 core-hours' in text
