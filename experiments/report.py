"""Makes a suite's table and plot from its results.jsonl alone.

  python -m experiments.report --suite=quickstart [--results=DIR]

writes NAME.md, NAME.csv and NAME.png beside results.jsonl and prints the table.
"""

import csv
import io
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from experiments import results
from experiments.cli import Parser, results_folder
from moejax.config import ConfigError

Row = dict[str, Any]
VERSIONS = ('python', 'jax', 'flax', 'optax', 'numpy', 'moejax')
# Okabe and Ito's colours, told apart by the colour-blind; markers and dashes say the same again.
STYLES = (('#000000', 'o', ':'), ('#0072B2', 's', '-'), ('#56B4E9', 'D', '--'),
          ('#D55E00', '^', '-'), ('#009E73', 'v', '-.'), ('#CC79A7', 'P', '-'),
          ('#E69F00', 'X', '--'), ('#F0E442', 'h', '-'))
LEGEND = """\
Extra steps and FLOPs are those after the trunk (all of them, if an arm began from nothing); 100 %
is the dense pretraining up to there. Loss is the task's cross-entropy, without auxiliary losses.
Δ is validation loss minus that of the line marked *. The step-0 gap is validation loss before the
first extra step minus the parent's. Wall time is that of the extra train steps, without compilation
and evaluation. One seed per arm: small differences mean nothing."""


def extra_steps(row: Row) -> int:
  return row['end_step'] - row['start_step']


def extra_flops(row: Row, steps: int | None = None) -> float:
  """FLOPs of the extra steps (or of that many), in % of the dense pretraining."""
  steps = extra_steps(row) if steps is None else steps
  return 100 * steps * row['flops_per_step'] / row['base_flops']


def step0_gap(row: Row) -> float | None:
  return row['step0']['step0_gap'] if row['step0'] else None


def _final(split: str, metric: str) -> Callable[[Row], float | None]:
  return lambda row: row['final'].get(split, {}).get(metric)


# Header of the table, name in the CSV, value, format.
COLUMNS = (
    ('val. loss', 'validation_loss', _final('validation', 'loss'), '{:.4f}'),
    ('Δ', 'validation_loss_minus_reference', lambda row: row.get('delta'), '{:+.4f}'),
    ('val. acc.', 'validation_accuracy', _final('validation', 'accuracy'), '{:.4f}'),
    ('test loss', 'test_loss', _final('test', 'loss'), '{:.4f}'),
    ('test acc.', 'test_accuracy', _final('test', 'accuracy'), '{:.4f}'),
    ('extra steps', 'extra_steps', extra_steps, '{:,}'),
    ('extra FLOPs', 'extra_flops_percent', extra_flops, '{:.1f} %'),
    ('step-0 gap', 'step0_gap', step0_gap, '{:+.4f}'),
    ('wall time', 'seconds', lambda row: row['seconds'], '{:.1f} s'),
)


def by_domain(rows: list[Row]) -> dict[str, list[Row]]:
  """Rows of each domain, with 'delta' where it has a reference.

  Raises:
    ConfigError: the rows of a domain were measured on different data.
  """
  domains: dict[str, list[Row]] = {}
  for row in rows:
    domains.setdefault(row['domain'], []).append(dict(row))
  for domain, group in domains.items():
    found = {row['fingerprint'] for row in group}
    if len(found) > 1:
      raise ConfigError(f'{domain}: results of different data cannot stand in one table '
                        f'(fingerprints {", ".join(sorted(f[:12] for f in found))}). Was Python or '
                        'matplotlib changed in between? Train again with --runs=NEWDIR.')
    reference = [row for row in group if row['reference']]
    for row in group if reference else []:
      loss = _final('validation', 'loss')
      row['delta'] = None if row['reference'] else loss(row) - loss(reference[0])
  return domains


def to_markdown(rows: list[Row]) -> str:
  """The table of each domain, and how it came about."""
  first = rows[0]
  lines = [f'# {first["suite"]}, scale {first["scale"]}', '']
  for domain, group in by_domain(rows).items():
    base = group[0]
    lines += [f'**{domain}**: {base["base_steps"]:,} steps of dense pretraining, '
              f'{base["base_flops"]:.2e} FLOPs, {base["base_seconds"]:.0f} s', '']
    lines += _table(group)
    lines += ['', f'Data {base["fingerprint"][:16]}; '
              + '; '.join(sorted({row['devices'] for row in group}))
              + ' per run; ' + _versions(group), '']
  return '\n'.join([*lines, LEGEND, '', f'Made by `{first["suite_command"]}`.']) + '\n'


def _table(group: list[Row]) -> list[str]:
  """Lines of one domain's table, in columns of even width."""
  cells = [['arm', *(header for header, *_ in COLUMNS)]]
  for row in group:
    values = [(value(row), form) for _, _, value, form in COLUMNS]
    cells.append([row['arm'] + (' *' if row['reference'] else ''),
                  *('–' if value is None else form.format(value) for value, form in values)])
  widths = [max(map(len, column)) for column in zip(*cells)]
  rule = ['-' * widths[0], *('-' * (w - 1) + ':' for w in widths[1:])]
  pad = lambda row: [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
  return ['| ' + ' | '.join(row) + ' |' for row in (pad(cells[0]), rule, *map(pad, cells[1:]))]


def _versions(group: list[Row]) -> str:
  """Each package's version, or versions if the runs differ."""
  return ', '.join(name + ' ' + '/'.join(sorted({row['versions'][name] for row in group}))
                   for name in VERSIONS)


def to_csv(rows: list[Row]) -> str:
  """Every arm with unrounded numbers."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(['domain', 'arm', *(name for _, name, *_ in COLUMNS), 'parameters',
                   'parameters_active_per_token', 'flops_per_step', 'key', 'fingerprint'])
  for group in by_domain(rows).values():
    for row in group:
      writer.writerow([row['domain'], row['arm'], *(value(row) for _, _, value, _ in COLUMNS),
                       row['parameters'], row['parameters_active_per_token'],
                       row['flops_per_step'], row['key'], row['fingerprint']])
  return out.getvalue()


def curve(row: Row) -> tuple[list[float], list[float]]:
  """Extra FLOPs in % and validation loss of each evaluation."""
  x = [extra_flops(row, point['step'] - row['start_step']) for point in row['history']]
  return x, [point['loss'] for point in row['history']]


def plot(rows: list[Row], path: pathlib.Path) -> None:
  """Validation loss over extra FLOPs, a panel per domain, as PNG."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  domains = by_domain(rows)
  arms = list(dict.fromkeys(row['arm'] for row in rows))
  style = {arm: STYLES[i % len(STYLES)] for i, arm in enumerate(arms)}
  figure, panels = plt.subplots(1, len(domains), figsize=(6 * len(domains), 4.6), squeeze=False,
                                layout='constrained')
  for panel, (domain, group) in zip(panels[0], domains.items()):
    for row in group:
      color, marker, dashes = style[row['arm']]
      panel.plot(*curve(row), color=color, marker=marker, linestyle=dashes, label=row['arm'],
                 linewidth=1.6, markersize=4.5)
    low, high = loss_axis(group)
    panel.set_ylim(low, high)
    above = [f'{row["arm"]} ends at {row["history"][-1]["loss"]:.2f}, above this axis'
             for row in group if row['history'][-1]['loss'] > high]
    panel.text(0.98, 0.97, '\n'.join(above), transform=panel.transAxes, ha='right', va='top',
               fontsize='small')
    panel.set_title(domain)
    panel.set_xlabel('extra FLOPs (% of dense pretraining)')
    panel.set_ylabel('validation loss')
    panel.grid(alpha=0.3)
  handles = {line.get_label(): line for panel in panels[0] for line in panel.get_lines()
             if line.get_ydata()[-1] <= panel.get_ylim()[1]}
  figure.legend(handles.values(), handles.keys(), loc='outside lower center', frameon=False,
                ncols=min(len(arms), 3 * len(domains)))
  # Without the date and software that matplotlib would write, the same results are the same file.
  figure.savefig(path, dpi=130, metadata={'Software': None})
  plt.close(figure)


def loss_axis(group: list[Row]) -> tuple[float, float]:
  """Limits that show whole curves of the arms that branch from a trunk, and how others end.

  An arm that ends further above the rest than they spread is left to a note: it would flatten them.
  """
  branches = [row for row in group if row['start_step'] > 0] or group
  losses = [point['loss'] for row in branches for point in row['history']]
  low, high = min(losses), max(losses)
  ends = [row['history'][-1]['loss'] for row in group]
  high = max([high, *(end for end in ends if end <= 2 * high - low)])
  margin = 0.06 * (high - low) or 0.1
  return low - margin, high + margin


def write(rows: list[Row], directory: pathlib.Path) -> str:
  """Writes NAME.md, NAME.csv and NAME.png into directory; returns the Markdown."""
  name = rows[0]['suite']
  markdown = to_markdown(rows)
  results.write_text(directory / f'{name}.md', markdown + f'\n![Curves]({name}.png)\n')
  results.write_text(directory / f'{name}.csv', to_csv(rows))
  plot(rows, directory / f'{name}.png')
  return markdown


def main(argv: list[str] | None = None) -> int:
  parser = Parser('python -m experiments.report', __doc__)
  parser.add_suite()
  args = parser.parse(argv)
  directory = results_folder(args)
  print(write(results.read(directory), directory))
  print(f'Written to {directory}')
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main())
  except ConfigError as error:
    sys.exit(f'experiments: {error}')
