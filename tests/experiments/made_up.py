"""Records, results and workdirs made by hand, for what turns them into reports."""

import json

from experiments import tables
from experiments.results import Results
from experiments.suite import Claim, Run

VERSIONS = dict.fromkeys(tables.VERSIONS, '1.0')


def record(arm, *, start=1000, end=1300, flops=10, losses=None, reference=False, gap=None,
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


def results(records, *claims, name='s', plot='curves', x_label='',
            metrics=('validation/loss', 'validation/accuracy', 'test/loss', 'test/accuracy')):
  """Results of a suite; every record is a run of half an hour."""
  return Results({'suite': name, 'scale': 'mini', 'title': f'What {name} is about.',
                  'suite_command': f'python -m experiments.main --suite={name}',
                  'metrics': list(metrics), 'plot': plot, 'x_label': x_label,
                  'runs': [{'key': r['key'], 'devices': r['devices'], 'seconds': 1800.0}
                           for r in records]},
                 tuple(claims), records)


def one_pair():
  """Three arms, one pair."""
  return [
      record('dense', end=1300, losses={1000: 2.0, 1300: 1.5}, gap=0.0, reference=True),
      record('sparse', end=1200, flops=15, losses={1000: 2.25, 1200: 1.25}, gap=0.25, seconds=3.14),
      record('scratch', start=0, end=200, flops=15, losses={0: 9.0, 100: 6.0, 200: 4.0}),
  ]


def three_pairs(domain='d', fingerprint='f' * 64):
  """Dense loses 1, 2, 3 at the end, sparse 0.5 less than that in one pair, 1 in another, 1.5."""
  records = []
  for pair, (dense, sparse) in enumerate([(1.0, 0.5), (2.0, 1.0), (3.0, 1.5)]):
    common = {'pair': pair, 'domain': domain, 'fingerprint': fingerprint}
    records += [record('dense', end=1300, losses={1000: 4.0 + pair, 1300: dense}, gap=0.0,
                       reference=True, ratio=1.0, **common),
                record('sparse', end=1200, flops=15, losses={1000: 5.0, 1100: 4.0, 1200: sparse},
                       gap=0.1 * pair, ratio=1.5, x=8, series='upcycled', **common)]
  return records


def claim(relation='<', margin=None, a='sparse', b='dense', domain='d', metric='validation/loss'):
  return Claim(f'{a} beats {b}', 'Someone 2023, Fig. 1', '1 % | 2 %', domain, a, relation, b,
               metric, margin)


def dense(**changes):
  return Run('dense', 'vit_glyphs', changes, arg='runlocal')


def child(parent, label='child', **changes):
  return Run(label, 'vit_glyphs', {'init.mode': 'continue', **changes}, parent, arg='runlocal')


def trained(folder, run, first, trunk, end, gap=None):
  """The workdir of a run: an evaluation every 5 steps, a loss of 100 - step, 0.5 s a step."""
  path = folder / run.name
  path.mkdir()
  facts = {'data_fingerprint': 'f' * 64, 'versions': VERSIONS, 'devices': '1 x cpu',
           'parameters': 7, 'parameters_active_per_token': 5, 'train_flops_per_step': 3,
           'first_step': first, 'trunk_step': trunk, 'end_step': end}
  (path / 'run.json').write_text(json.dumps(facts))
  cpu = {} if first else {'cpu_seconds': end + 0.5}   # as if the others were of an older version
  (path / 'status.json').write_text(json.dumps({'phase': 'finished', **cpu}))
  if gap is not None:
    (path / 'receipt.json').write_text(json.dumps({'measured': {'step0_gap': gap}}))
  evaluated, timed = [], []
  for step in range(first, end + 1, 5):
    evaluated.append({'step': step, 'train/loss': 7.0})
    evaluated.append({'step': step, 'validation/loss': 100 - step, 'validation/accuracy': 0.5,
                      'validation/moe/02/dropped': 0.125})
    timed += [{'step': step, 'steps': 5, 'seconds': 2.5}] if step > first else []
  evaluated.append({'step': end, 'test/loss': 200 - end, 'test/exact_match': 0.25})
  for name, lines in (('metrics.jsonl', evaluated), ('timing.jsonl', timed)):
    (path / name).write_text(''.join(json.dumps(line) + '\n' for line in lines))
