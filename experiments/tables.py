"""Makes a suite's tables: Markdown to read, CSV to compute with."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence

from experiments import results as results_lib
from experiments import verdict as verdict_lib
from experiments.results import Record, Results, TableArm
from experiments.suite import Claim
from experiments.verdict import Verdict

VERSIONS = ('python', 'jax', 'flax', 'optax', 'numpy', 'moejax')
NONE = '–'
SPLITS = {'validation': 'val.', 'step0': 'step-0', 'test_seen': 'test (seen)'}
NAMES = {'accuracy': 'acc.', 'step0_gap': 'gap'}

LEGEND = ('Extra steps and FLOPs are those after the trunk (all of them, if an arm began from '
          'nothing); 100 % is the dense pretraining up to there. Loss is the task\'s '
          'cross-entropy, without auxiliary losses.')
TUNED = 'Of a fine-tuned model they are those of the fine-tuning alone.'
GAP = "The step-0 gap is validation loss before the first extra step minus the parent's."
WALL = 'Wall time is that of the extra train steps, without compilation and evaluation.'
TIME = ("Extra time is the extra steps' in % of the dense pretraining's, from step times measured "
        'in turns on one machine.')
SPREAD = ('± is half the width of the 95 % t-interval of the mean over (dense parent, seed) pairs; '
          'for Δ, of the mean difference within a pair, where what its arms have in common '
          'cancels.')
BARS = {True: 'In the plot the pairs are aligned: each is shifted so that its line marked * is at '
              'the mean of these lines. Its bars are so those of Δ.',
        False: 'The bars in the plot are those of the means.'}


def header(path: str) -> str:
  """'val. loss' for 'validation/loss'."""
  split, _, name = path.partition('/')
  name = re.sub(r'(\d+)shot_accuracy', r'\1-shot acc.', NAMES.get(name, name))
  return f'{SPLITS.get(split, split)} {name.replace("_", " ")}'


def mean(values: Iterable[float], form: str) -> str:
  """Mean ± half-width of values; a single value alone; a count of those that are not finite."""
  values = list(values)
  if not values:
    return NONE
  bad = [v for v in values if not math.isfinite(v)]
  if bad:
    return str(bad[0]) if len(values) == 1 else f'{bad[0]} in {len(bad)} of {len(values)}'
  estimate = verdict_lib.estimate(values)
  # At least as many digits for the half-width, which has no sign.
  spread = '' if estimate.n == 1 else f' ± {form.replace("+", "").format(estimate.half)}'
  return form.format(estimate.mean) + spread


def to_markdown(results: Results) -> str:
  """The table of each domain with the verdicts on its claims, and a legend."""
  about, metrics = results.suite, results.suite['metrics']
  domains = results_lib.by_domain(results.records, metrics)
  verdicts = verdict_lib.decide_all(results)
  out = [f'# {about["suite"]}, scale {about["scale"]}', '']
  for domain, arms in domains.items():
    records = [record for arm in arms for record in arm.records.values()]
    out += [f'**{domain}**: {_pretraining(records)}', '']
    out += _domain(arms, results_lib.measured_paths(arms, metrics, results.claims))
    out += _claims([v for v in verdicts if v.claim.domain == domain])
    out += ['', f'Data {records[0]["fingerprint"][:16]}; '
            + '; '.join(sorted({record['devices'] for record in records}))
            + ' per run; ' + versions(records), '']
  legend = _legend(results, list(domains.values()), any(v.held_out for v in verdicts))
  return '\n'.join([*out, *legend, '', f'Made by `{about["suite_command"]}`.\n'])


def _pretraining(records: list[Record]) -> str:
  """Length and cost of the dense base, or bases."""
  bases = sorted({(record['base_steps'], record['base_flops']) for record in records})
  seconds = sorted({record['base_seconds'] for record in records})
  time = f'{seconds[0]:.0f}' + (f' to {seconds[-1]:.0f}' if len(seconds) > 1 else '') + ' s'
  return (' or '.join(f'{steps:,}' for steps, _ in bases) + ' steps of dense pretraining, '
          + ' or '.join(f'{flops:.2e}' for _, flops in bases) + f' FLOPs, {time}')


def _domain(arms: list[TableArm], paths: list[str]) -> list[str]:
  """The table of one domain."""
  columns: list[tuple[str, Callable[[TableArm], str]]] = []
  for path in paths:
    columns.append((header(path), lambda arm, path=path: mean(arm.values(path).values(), '{:.4f}')))
    if path == paths[0] and any(arm.delta for arm in arms):
      columns.append(('Δ', lambda arm, path=path: mean(arm.delta.get(path, {}).values(),
                                                       '{:+.4f}')))
  columns += _costs(arms, gap='step0/step0_gap' not in paths)
  cells = [[arm.name + (' *' if arm.first['reference'] else ''),
            *(cell(arm) for _, cell in columns)] for arm in arms]
  return table(['arm', *(name for name, _ in columns)], cells) + _commonest(arms, paths)


def _commonest(arms: list[TableArm], paths: list[str]) -> list[str]:
  """Scores of always giving the commonest answer, where outputs were scored."""
  scored = []
  for path in paths:
    split, _, name = path.partition('/')
    if values := arms[0].values(f'{split}/commonest/{name}'):
      scored.append(f'{header(path)} {mean([*values.values()][:1], "{:.4f}")}')
  return ['', f'Always giving the commonest answer: {", ".join(scored)}.'] if scored else []


def _costs(arms: list[TableArm], gap: bool) -> list[tuple[str, Callable[[TableArm], str]]]:
  """(header, arm -> cell) of cost, of the gap at step 0 if `gap`, and of the number of pairs."""
  columns = [('extra steps', lambda arm: mean_cost(arm, results_lib.extra_steps, '{:,.0f}')),
             ('extra FLOPs', lambda arm: mean_cost(arm, results_lib.extra_flops, '{:.1f} %'))]
  if timed(arms):
    columns.append(('extra time', lambda arm: mean_cost(arm, results_lib.extra_time, '{:.1f} %')))
  if gap:
    columns.append(('step-0 gap', lambda arm: mean(arm.values('step0/step0_gap').values(),
                                                   '{:+.4f}')))
  if not timed(arms):
    columns.append(('wall time', lambda arm: mean_cost(arm, lambda record: record['seconds'],
                                                       '{:.1f} s')))
  if several_pairs(arms):
    columns.append(('pairs', lambda arm: str(len(arm.records))))
  return columns


def several_pairs(arms: list[TableArm]) -> bool:
  """Whether an arm was trained in more than one pair."""
  return any(len(arm.records) > 1 for arm in arms)


def timed(arms: list[TableArm]) -> bool:
  """Whether step times were compared for every arm."""
  return all(record['time_ratio'] is not None for arm in arms for record in arm.records.values())


def mean_cost(arm: TableArm, cost: Callable[[Record], float | None], form: str) -> str:
  """Mean over the pairs of a cost, which hardly differs between them."""
  values = [v for record in arm.records.values() if (v := cost(record)) is not None]
  return form.format(math.fsum(values) / len(values)) if values else NONE


def table(headers: list[str], rows: list[list[str]], left: int = 1) -> list[str]:
  """Lines of a Markdown table in columns of even width; all but the first `left` flush right."""
  rows = [headers, *([cell.replace('|', '\\|') for cell in row] for row in rows)]
  widths = [max(3, *map(len, column)) for column in zip(*rows)]
  rule = ['-' * w if i < left else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
  pad = lambda row: [cell.ljust(w) if i < left else cell.rjust(w)
                     for i, (cell, w) in enumerate(zip(row, widths))]
  return ['| ' + ' | '.join(row) + ' |' for row in (pad(rows[0]), rule, *map(pad, rows[1:]))]


VERDICT_HEADERS = ['verdict', 'ours', '95 % interval', 'pairs', 'p']
HELD_OUT = 'on the held-out family'
HELD_OUT_LEGEND = ('`test (seen)` are glyphs that training never had, of font families it had; the '
                   f'column "{HELD_OUT}" says the same of a family that it never had (`test`): '
                   'the mean difference and its 95 % interval. No verdict depends on it.')


def verdict_table(names: Sequence[str], rows: Sequence[tuple[Sequence[str], Verdict]]) -> list[str]:
  """Lines of a table of verdicts.

  Args:
    names: of the columns that identify a claim.
    rows: (cells under these, verdict).
  """
  held_out = any(verdict.held_out for _, verdict in rows)
  cells = [[*first, *_verdict_cells(verdict), *([_held_out(verdict)] if held_out else [])]
           for first, verdict in rows]
  return table([*names, *VERDICT_HEADERS, *([HELD_OUT] if held_out else [])], cells,
               left=len(names) + 2)


def _held_out(verdict: Verdict) -> str:
  estimate = verdict.held_out
  if not estimate or not math.isfinite(estimate.mean):
    return NONE
  low, high = estimate.interval
  return f'{estimate.mean:+.4f}' + (f' ({low:+.4f} to {high:+.4f})' if estimate.n > 1 else '')


def _verdict_cells(verdict: Verdict) -> list[str]:
  """Cells under VERDICT_HEADERS; p is the adjusted one."""
  claim, estimate = verdict.claim, verdict.estimate
  low, high = estimate.interval
  bold = '' if verdict.outcome == verdict_lib.UNDECIDED else '**'
  return [
      f'{bold}{verdict.outcome}{bold}' + ''.join(f'; {note}' for note in verdict.notes),
      f'{claim.difference}: {header(claim.metric)} '
      + (f'{estimate.mean:+.4f}' if math.isfinite(estimate.mean) else NONE),
      f'{low:+.4f} to {high:+.4f}' if math.isfinite(estimate.half) else NONE,
      str(estimate.n),
      NONE if verdict.p is None else f'{verdict.adjusted:.2g}']


def claim_text(claim: Claim) -> str:
  """The claim, and what it expects of our number."""
  expected = {'<': 'below 0', '>': 'above 0'}.get(claim.relation, f'within ±{claim.margin}')
  return f'{claim.says} ({expected})'


def _claims(verdicts: list[Verdict]) -> list[str]:
  if not verdicts:
    return []
  return ['', *verdict_table(['claim'], [([claim_text(v.claim)], v) for v in verdicts])]


def versions(records: list[Record]) -> str:
  """Each package's version, or versions if the runs differ."""
  return ', '.join(name + ' ' + '/'.join(sorted({record['versions'][name] for record in records}))
                   for name in VERSIONS)


def _legend(results: Results, domains: list[list[TableArm]], held_out: bool) -> list[str]:
  delta = sorted({results_lib.measured_paths(arms, results.suite['metrics'], results.claims)[0]
                  for arms in domains if any(arm.delta for arm in arms)})
  more = ([TUNED] if any(record['start_step'] > record['base_steps'] for record in results.records)
          else [])
  if delta:
    names = ' or '.join(map(header, delta)).replace('val.', 'validation')
    more.append(f'Δ is {names} minus that of the line marked *.')
  more += [GAP, *sorted({TIME if timed(arms) else WALL for arms in domains})]
  more += ([SPREAD, BARS[bool(delta)]] if any(map(several_pairs, domains)) else
           ['One seed per arm: small differences mean nothing.'])
  if results.claims:
    more.append('p is adjusted by Holm over all claims of the suite; the rule of the verdicts is '
                'in experiments/verdict.py.')
  if held_out:
    more.append(HELD_OUT_LEGEND)
  return textwrap.wrap(' '.join([LEGEND, *more]), 100, break_on_hyphens=False)


def to_csv(results: Results) -> str:
  """Every arm of every pair, with unrounded numbers."""
  metrics = results.suite['metrics']
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  as_is = ('seconds', 'parameters', 'parameters_active_per_token', 'flops_per_step', 'key',
           'fingerprint')
  names = [path.replace('/', '_') for path in metrics]
  writer.writerow(['domain', 'arm', 'pair', 'series', 'x', *names,
                   *(f'{name}_minus_reference' for name in names), 'extra_steps',
                   'extra_flops_percent', 'extra_time_percent', 'step0_gap', *as_is])
  for arms in results_lib.by_domain(results.records, metrics).values():
    for arm in arms:
      for pair, record in arm.records.items():
        writer.writerow([
            arm.domain, arm.name, pair, record['series'], record['x'],
            *(results_lib.metric(record, path) for path in metrics),
            *(arm.delta.get(path, {}).get(pair) for path in metrics),
            results_lib.extra_steps(record), results_lib.extra_flops(record),
            results_lib.extra_time(record), results_lib.metric(record, 'step0/step0_gap'),
            *(record[name] for name in as_is)])
  return out.getvalue()
