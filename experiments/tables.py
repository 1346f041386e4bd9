"""A suite's tables: Markdown to read, CSV to compute with."""

import csv
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence

from experiments import lines as lines_lib
from experiments import verdict as verdict_lib
from experiments.lines import Line
from experiments.results import Results
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
  """'val. loss' of 'validation/loss'."""
  split, _, name = path.partition('/')
  name = re.sub(r'(\d+)shot_accuracy', r'\1-shot acc.', NAMES.get(name, name))
  return f'{SPLITS.get(split, split)} {name.replace("_", " ")}'


def column(path: str) -> str:
  """'validation_loss' of 'validation/loss', for the CSV."""
  return path.replace('/', '_')


def mean(values: Sequence[float], form: str) -> str:
  """Mean ± half-width of values; the one value; that some are not finite."""
  if not values:
    return NONE
  bad = [v for v in values if not math.isfinite(v)]
  if bad:
    return str(bad[0]) if len(values) == 1 else f'{bad[0]} in {len(bad)} of {len(values)}'
  found = verdict_lib.estimate(values)
  # At least as many digits for the half-width, which has no sign.
  spread = '' if found.n == 1 else f' ± {form.replace("+", "").format(found.half)}'
  return form.format(found.mean) + spread


def to_markdown(found: Results) -> str:
  """The table of each domain with the verdicts on its claims, and how they came about."""
  about, metrics = found.suite, found.suite['metrics']
  domains = lines_lib.by_domain(found.rows, metrics)
  verdicts = verdict_lib.of(found)
  out = [f'# {about["suite"]}, scale {about["scale"]}', '']
  for domain, group in domains.items():
    rows = [row for line in group for row in line.rows.values()]
    out += [f'**{domain}**: {_pretraining(rows)}', '']
    out += _domain(group, lines_lib.shown(group, metrics, found.claims))
    out += _claims([v for v in verdicts if v.claim.domain == domain])
    out += ['', f'Data {rows[0]["fingerprint"][:16]}; '
            + '; '.join(sorted({row['devices'] for row in rows}))
            + ' per run; ' + versions(rows), '']
  return '\n'.join([*out, *_legend(found, domains), '', f'Made by `{about["suite_command"]}`.\n'])


def _pretraining(rows: list[lines_lib.Row]) -> str:
  """Length and cost of the dense base, or bases."""
  bases = sorted({(row['base_steps'], row['base_flops']) for row in rows})
  seconds = sorted({row['base_seconds'] for row in rows})
  time = f'{seconds[0]:.0f}' + (f' to {seconds[-1]:.0f}' if len(seconds) > 1 else '') + ' s'
  return (' or '.join(f'{steps:,}' for steps, _ in bases) + ' steps of dense pretraining, '
          + ' or '.join(f'{flops:.2e}' for _, flops in bases) + f' FLOPs, {time}')


def _domain(group: list[Line], paths: list[str]) -> list[str]:
  """Lines of one domain's table."""
  columns: list[tuple[str, Callable[[Line], str]]] = []
  for path in paths:
    columns.append((header(path), lambda line, path=path: mean([*line.values(path).values()],
                                                               '{:.4f}')))
    if path == paths[0] and any(line.delta for line in group):
      columns.append(('Δ', lambda line, path=path: mean([*line.delta.get(path, {}).values()],
                                                        '{:+.4f}')))
  columns += _costs(group, gap='step0/step0_gap' not in paths)
  cells = [[line.name + (' *' if line.first['reference'] else ''),
            *(cell(line) for _, cell in columns)] for line in group]
  return table(['arm', *(name for name, _ in columns)], cells) + _commonest(group, paths)


def _commonest(group: list[Line], paths: list[str]) -> list[str]:
  """What always giving the commonest answer scores, where outputs were scored."""
  scored = []
  for path in paths:
    split, _, name = path.partition('/')
    if values := group[0].values(f'{split}/commonest/{name}'):
      scored.append(f'{header(path)} {mean([*values.values()][:1], "{:.4f}")}')
  return ['', f'Always giving the commonest answer: {", ".join(scored)}.'] if scored else []


def _costs(group: list[Line], gap: bool) -> list[tuple[str, Callable[[Line], str]]]:
  """(header, cell) of what an arm cost, of its gap at step 0 if asked for, and of the pairs."""
  columns = [('extra steps', lambda line: mean_of(line, lines_lib.extra_steps, '{:,.0f}')),
             ('extra FLOPs', lambda line: mean_of(line, lines_lib.extra_flops, '{:.1f} %'))]
  if timed(group):
    columns.append(('extra time', lambda line: mean_of(line, lines_lib.extra_time, '{:.1f} %')))
  if gap:
    columns.append(('step-0 gap', lambda line: mean([*line.values('step0/step0_gap').values()],
                                                    '{:+.4f}')))
  if not timed(group):
    columns.append(('wall time', lambda line: mean_of(line, lambda row: row['seconds'],
                                                      '{:.1f} s')))
  if several(group):
    columns.append(('pairs', lambda line: str(len(line.rows))))
  return columns


def several(group: list[Line]) -> bool:
  """Whether an arm was trained in more than one pair."""
  return any(len(line.rows) > 1 for line in group)


def timed(group: list[Line]) -> bool:
  """Whether step times were compared for every arm."""
  return all(row['time_ratio'] is not None for line in group for row in line.rows.values())


def mean_of(line: Line, value: Callable[[lines_lib.Row], float | None], form: str) -> str:
  """Mean over the pairs of a cost, which is nearly or wholly the same in each."""
  values = [v for row in line.rows.values() if (v := value(row)) is not None]
  return form.format(math.fsum(values) / len(values)) if values else NONE


def table(headers: list[str], cells: list[list[str]], left: int = 1) -> list[str]:
  """Lines of a Markdown table in columns of even width; all but the first `left` flush right."""
  cells = [headers, *([cell.replace('|', '\\|') for cell in row] for row in cells)]
  widths = [max(3, *map(len, column)) for column in zip(*cells)]
  rule = ['-' * w if i < left else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
  pad = lambda row: [cell.ljust(w) if i < left else cell.rjust(w)
                     for i, (cell, w) in enumerate(zip(row, widths))]
  return ['| ' + ' | '.join(row) + ' |' for row in (pad(cells[0]), rule, *map(pad, cells[1:]))]


# Of a table of verdicts, apart from what identifies the claim.
VERDICT_HEADERS = ['verdict', 'ours', '95 % interval', 'pairs', 'p']
HELD_OUT = 'on the held-out family'
HELD_OUT_LEGEND = ('`test (seen)` are glyphs that training never had, of font families it had; the '
                   f'column "{HELD_OUT}" says the same of a family that it never had (`test`): '
                   'the mean difference and its 95 % interval. No verdict depends on it.')


def verdict_table(names: Sequence[str], rows: Sequence[tuple[Sequence[str], Verdict]]) -> list[str]:
  """Lines of the table of some verdicts.

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
  found = verdict.held_out
  if not found or not math.isfinite(found.mean):
    return NONE
  low, high = found.interval
  return f'{found.mean:+.4f}' + (f' ({low:+.4f} to {high:+.4f})' if found.n > 1 else '')


def _verdict_cells(verdict: Verdict) -> list[str]:
  """Cells under VERDICT_HEADERS; p is the adjusted one."""
  claim, found = verdict.claim, verdict.estimate
  low, high = found.interval
  bold = '' if verdict.outcome == verdict_lib.UNDECIDED else '**'
  return [
      f'{bold}{verdict.outcome}{bold}' + ''.join(f'; {note}' for note in verdict.notes),
      f'{claim.difference}: {header(claim.metric)} '
      + (f'{found.mean:+.4f}' if math.isfinite(found.mean) else NONE),
      f'{low:+.4f} to {high:+.4f}' if math.isfinite(found.half) else NONE,
      str(found.n),
      NONE if verdict.p is None else f'{verdict.adjusted:.2g}']


def says(verdict: Verdict) -> str:
  """The claim and what it expects of our number."""
  claim = verdict.claim
  expected = {'<': 'below 0', '>': 'above 0'}.get(claim.relation, f'within ±{claim.margin}')
  return f'{claim.says} ({expected})'


def _claims(verdicts: list[Verdict]) -> list[str]:
  if not verdicts:
    return []
  return ['', *verdict_table(['claim'], [([says(v)], v) for v in verdicts])]


def versions(rows: list[lines_lib.Row]) -> str:
  """Each package's version, or versions if the runs differ."""
  return ', '.join(name + ' ' + '/'.join(sorted({row['versions'][name] for row in rows}))
                   for name in VERSIONS)


def _legend(found: Results, domains: dict[str, list[Line]]) -> list[str]:
  groups = domains.values()
  delta = sorted({lines_lib.shown(group, found.suite['metrics'], found.claims)[0]
                   for group in groups if any(line.delta for line in group)})
  more = [TUNED] if any(row['start_step'] > row['base_steps'] for row in found.rows) else []
  if delta:
    names = ' or '.join(map(header, delta)).replace('val.', 'validation')
    more.append(f'Δ is {names} minus that of the line marked *.')
  times = {TIME if timed(group) else WALL for group in groups}
  more += [GAP, *sorted(times)]
  more += ([SPREAD, BARS[bool(delta)]] if any(map(several, groups)) else
           ['One seed per arm: small differences mean nothing.'])
  if found.claims:
    more.append('p is adjusted by Holm over all claims of the suite; the rule of the verdicts is '
                'in experiments/verdict.py.')
  if any(verdict.held_out for verdict in verdict_lib.of(found)):
    more.append(HELD_OUT_LEGEND)
  return textwrap.wrap(' '.join([LEGEND, *more]), 100, break_on_hyphens=False)


def to_csv(found: Results) -> str:
  """Every arm of every pair, with unrounded numbers."""
  metrics = found.suite['metrics']
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  as_is = ('seconds', 'parameters', 'parameters_active_per_token', 'flops_per_step', 'key',
           'fingerprint')
  writer.writerow(['domain', 'arm', 'pair', 'series', 'x', *map(column, metrics),
                   *(f'{column(path)}_minus_reference' for path in metrics), 'extra_steps',
                   'extra_flops_percent', 'extra_time_percent', 'step0_gap', *as_is])
  for group in lines_lib.by_domain(found.rows, metrics).values():
    for line in group:
      for pair, row in line.rows.items():
        writer.writerow([
            line.domain, line.name, pair, row['series'], row['x'],
            *(lines_lib.metric(row, path) for path in metrics),
            *(line.delta.get(path, {}).get(pair) for path in metrics),
            lines_lib.extra_steps(row), lines_lib.extra_flops(row), lines_lib.extra_time(row),
            lines_lib.metric(row, 'step0/step0_gap'), *(row[name] for name in as_is)])
  return out.getvalue()
