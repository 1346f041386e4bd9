"""Rows and suites made by hand, for what turns results into reports."""

from experiments import tables
from experiments.results import Results
from experiments.suite import Claim

VERSIONS = dict.fromkeys(tables.VERSIONS, '1.0')


def row(arm, *, start=1000, end=1300, flops=10, losses=None, reference=False, gap=None,
        seconds=1.0, domain='d', fingerprint='f' * 64, pair=0, series='', x=None, ratio=None,
        **final):
  """An arm of a base that took 1000 steps of 10 FLOPs; losses: {step: validation loss}.

  final: test metrics; without any, 'loss' is 1 more than the last validation loss.
  """
  losses = losses or {end: 1.0}
  return {
      'domain': domain, 'arm': arm, 'pair': pair, 'reference': reference, 'series': series, 'x': x,
      'key': f'k{arm}{pair}', 'config': {'data': {'source': f'source of {domain}'}},
      'fingerprint': fingerprint, 'versions': VERSIONS, 'devices': '1 x cpu', 'parameters': 7,
      'parameters_active_per_token': 5, 'start_step': start, 'end_step': end,
      'flops_per_step': flops, 'base_steps': 1000, 'base_flops': 10_000, 'base_seconds': 12.3,
      'seconds': seconds, 'time_ratio': ratio, 'step0': None if gap is None else {'step0_gap': gap},
      'history': [{'step': s, 'loss': v, 'accuracy': 0.5} for s, v in losses.items()],
      'final': {'validation': {'loss': losses[end], 'accuracy': 0.5},
                'test': final or {'loss': losses[end] + 1, 'accuracy': 0.25}},
  }


def results(rows, *claims, name='s', plot='curves', x_label='',
            metrics=('validation/loss', 'validation/accuracy', 'test/loss', 'test/accuracy')):
  """Results of a suite; every row is a run of half an hour."""
  return Results({'suite': name, 'scale': 'mini', 'title': f'What {name} is about.',
                  'suite_command': f'python -m experiments.main --suite={name}',
                  'metrics': list(metrics), 'plot': plot, 'x_label': x_label,
                  'runs': [{'key': r['key'], 'devices': r['devices'], 'seconds': 1800.0}
                           for r in rows]},
                 tuple(claims), rows)


def one_pair():
  """Three arms, one pair."""
  return [
      row('dense', end=1300, losses={1000: 2.0, 1300: 1.5}, gap=0.0, reference=True),
      row('sparse', end=1200, flops=15, losses={1000: 2.25, 1200: 1.25}, gap=0.25, seconds=3.14),
      row('scratch', start=0, end=200, flops=15, losses={0: 9.0, 100: 6.0, 200: 4.0}),
  ]


def three_pairs(domain='d', fingerprint='f' * 64):
  """Dense loses 1, 2, 3 at the end, sparse 0.5 less than that in one pair, 1 in another, 1.5."""
  rows = []
  for pair, (dense, sparse) in enumerate([(1.0, 0.5), (2.0, 1.0), (3.0, 1.5)]):
    common = {'pair': pair, 'domain': domain, 'fingerprint': fingerprint}
    rows += [row('dense', end=1300, losses={1000: 4.0 + pair, 1300: dense}, gap=0.0,
                 reference=True, ratio=1.0, **common),
             row('sparse', end=1200, flops=15, losses={1000: 5.0, 1100: 4.0, 1200: sparse},
                 gap=0.1 * pair, ratio=1.5, x=8, series='upcycled', **common)]
  return rows


def claim(relation='<', margin=None, a='sparse', b='dense', domain='d', metric='validation/loss'):
  return Claim(f'{a} beats {b}', 'Someone 2023, Fig. 1', '1 % | 2 %', domain, a, relation, b,
               metric, margin)
