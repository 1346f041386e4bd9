"""A suite's plot, for each domain: curves and points, points, or a sweep (see suite.Suite.plot).

Claims are about differences within a pair, and pairs differ by more than arms do. So a plot aligns
the pairs at the reference, if there is one (see lines.offsets): bars are then those of Δ.
"""

import math
import pathlib
from collections.abc import Callable, Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import lines as lines_lib
from experiments import tables
from experiments.lines import Line
from experiments.results import Results
from experiments.verdict import Estimate, estimate

# Okabe and Ito's colours, told apart by the colour-blind (grey for their yellow, which is faint on
# white); markers and dashes say the same again.
COLORS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#56B4E9', '#CC79A7', '#E69F00', '#777777')
MARKERS = ('o', 's', '^', 'v', 'D', 'P', 'X', 'h', '*')
DASHES = (':', '-', '--', '-.', (0, (5, 1, 1, 1, 1, 1)))
STARTS = 6.0      # times what is drawn otherwise: a start further above is told in words
PANEL = 5.2       # inches: two of them are as wide as a README shows at full size
STYLE = {'font.size': 11, 'axes.titlesize': 12, 'axes.grid': True, 'grid.alpha': 0.3,
         'axes.axisbelow': True, 'lines.linewidth': 1.7, 'lines.markersize': 5.5}
UNITS = {'loss': 'nats', 'step0_gap': 'nats'}


def plot(found: Results, path: pathlib.Path) -> None:
  """Draws found.suite['plot'] as PNG; the same results are the same file."""
  domains = lines_lib.by_domain(found.rows, found.suite['metrics'])
  kind = found.suite['plot']
  draws = {'curves': (_curves, _points), 'points': (_points,), 'sweep': (_sweep,)}[kind]
  if not any(map(tables.several, domains.values())):
    draws = draws[:1]   # the curves' ends say it all
  lines = max(map(len, domains.values()))
  heights = [max(2.4, 1.1 + 0.4 * lines) if draw is _points else 4.2 for draw in draws]
  with matplotlib.rc_context(STYLE):
    columns = min(2, len(domains))
    rows = math.ceil(len(domains) / columns)
    figure = Figure(figsize=(PANEL * columns, rows * sum(heights)), layout='constrained')
    grid = figure.subplots(rows * len(draws), columns, squeeze=False, height_ratios=heights * rows)
    styles = _styles(domains, kind)
    for row, draw in enumerate(draws):   # of the panels of a domain, one below the other
      panels = grid[row::len(draws)]
      for panel in panels.flat[len(domains):]:
        panel.set_visible(False)
      for panel, (domain, group) in zip(panels.flat, domains.items()):
        draw(panel, group, styles, found)
        panel.set_title(domain if row == 0 else '')
      if draw is _points:
        _name_arms_once(panels)
    _legend(figure, grid)
    # Without the software and its version that matplotlib would write into the file.
    figure.savefig(path, dpi=130, metadata={'Software': None})


def _name_arms_once(panels) -> None:
  """Takes the arms' names off a panel if those to its left are the same."""
  for left, right in zip(panels[:, :-1].flat, panels[:, 1:].flat):
    names = [[text.get_text() for text in panel.get_yticklabels()] for panel in (left, right)]
    if names[0] == names[1]:
      right.set_yticklabels([])


def _styles(domains: dict[str, list[Line]], kind: str) -> dict[str, dict]:
  """{label: colour, marker, dashes}, the same in every panel; no two alike."""
  labels = dict.fromkeys(_label(line) if kind == 'sweep' else line.name
                         for group in domains.values() for line in group)
  return {label: {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)],
                  'linestyle': DASHES[i % len(DASHES)], 'markeredgecolor': 'black',
                  'markeredgewidth': 0.4}
          for i, label in enumerate(labels)}


def _label(line: Line) -> str:
  return line.first['series'] or line.name


def axis_label(path: str) -> str:
  """'test loss (nats)' of 'test/loss'."""
  unit = UNITS.get(path.rpartition('/')[2])
  return tables.header(path).replace('val.', 'validation').replace(
      'acc.', 'accuracy') + (f' ({unit})' if unit else '')


def _legend(figure, panels) -> None:
  """One legend under all panels, of what is drawn in any of them."""
  handles = {}
  for panel in panels.flat:
    for handle, label in zip(*panel.get_legend_handles_labels()):
      handles.setdefault(label, handle)
  if handles:
    width = max(map(len, handles))
    per_row = max(1, int(52 * panels.shape[1] / (width + 8)))
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', frameon=False,
                  ncols=min(len(handles), per_row), handlelength=3.2)


def _aligned(group: list[Line], path: str) -> dict[str, list[float]]:
  """{line's name: its values of a metric, the pairs aligned at the reference}."""
  offsets = lines_lib.offsets(group, path)
  return {line.name: [value - offsets[pair] for pair, value in line.values(path).items()]
          for line in group}


def _aligned_label(group: list[Line], path: str) -> str:
  """The axis' label, which says so if pairs are aligned."""
  moved = any(lines_lib.offsets(group, path).values())
  return axis_label(path) + (', pairs aligned' if moved else '')


def curve(line: Line, offsets: Mapping[int, float]) -> list[tuple[float, list[float]]]:
  """[(extra FLOPs in %, validation loss of each pair)] of the evaluations that all pairs have.

  offsets: {pair: what is taken off}, see lines.offsets.
  """
  losses = [{point['step'] - row['start_step']: point['loss'] - offsets[pair]
             for point in row['history']} for pair, row in line.rows.items()]
  steps = sorted(set.intersection(*map(set, losses)))
  return [(lines_lib.extra_flops(line.first, step), [loss[step] for loss in losses])
          for step in steps]


def _curves(panel: Axes, group: list[Line], styles: dict, _: Results) -> None:
  """Validation loss over extra FLOPs: mean over pairs, each pair thinly, the end's interval."""
  offsets = lines_lib.offsets(group, 'validation/loss')
  curves = {line.name: curve(line, offsets) for line in group}
  means = {name: [estimate(losses) for _, losses in points] for name, points in curves.items()}
  low, high = _height(group, curves, {name: _ends(found[-1]) for name, found in means.items()})
  lane = 0.012 * max(points[-1][0] for points in curves.values())
  outside = [f'{line.name} starts at {means[line.name][0].mean:.4g}' for line in group
             if line.first['start_step'] and means[line.name][0].mean > high]
  for place, line in enumerate(group):
    style, end = styles[line.name], means[line.name][-1]
    x = [at for at, _ in curves[line.name]]
    outside += [f'{line.name} ends at {note}'] if (note := _elsewhere(end.mean, low, high)) else []
    panel.plot(x, [e.mean for e in means[line.name]], **style,
               label=line.name if any(low <= e.mean <= high for e in means[line.name]) else None)
    if len(line.rows) > 1:
      panel.plot(x, [losses for _, losses in curves[line.name]], color=style['color'], alpha=0.35,
                 linewidth=0.7, zorder=1)
      # Beside the end, where bars of arms of the same cost do not hide each other.
      panel.errorbar(x[-1] + (place + 1) * lane, end.mean, end.half, color=style['color'],
                     capsize=2.5, zorder=3)
  panel.set_ylim(low, high)
  _say(panel, outside)
  panel.set_xlabel('extra FLOPs (% of dense pretraining)')
  panel.set_ylabel(_aligned_label(group, 'validation/loss'))


def _height(group: list[Line], curves: Mapping[str, list[tuple[float, list[float]]]],
            ends: dict[str, list[float]]) -> tuple[float, float]:
  """Limits of an axis of curves; a start so high that it would flatten the rest is left out."""
  drawn = lambda points: [loss for _, losses in points for loss in losses]
  later = {name: drawn(points[1:] or points) for name, points in curves.items()}
  low, high = lines_lib.span(group, later, ends)
  starts = {name: drawn(points[:1]) for name, points in curves.items()}
  return lines_lib.span(group, {
      name: later[name] + [v for v in starts[name] if v <= high + STARTS * (high - low)]
      for name in curves}, ends)


def _ends(e: Estimate) -> list[float]:
  """What an axis must reach for a mean and its interval; the mean last."""
  return [*(e.interval if e.n > 1 else ()), e.mean]


def _elsewhere(value: float, low: float, high: float) -> str:
  """What is said of a mean that is outside the axis; '' if it is inside."""
  if not math.isfinite(value):
    return str(value)
  return '' if low <= value <= high else f'{value:.4g}, outside'


def _say(panel: Axes, notes: list[str]) -> None:
  if notes:
    panel.text(0.98, 0.97, '\n'.join(notes), transform=panel.transAxes, ha='right', va='top',
               fontsize='small', bbox={'color': 'white', 'alpha': 0.8, 'pad': 1.5})


def _points(panel: Axes, group: list[Line], styles: dict, found: Results) -> None:
  """The first metric of each arm: every pair, mean and interval; the reference down the panel."""
  path = lines_lib.shown(group, found.suite['metrics'], found.claims)[0]
  group = [line for line in group if line.values(path)]
  values = _aligned(group, path)
  means = {name: estimate(drawn) for name, drawn in values.items()}
  low, high = lines_lib.span(group, values, {name: _ends(e) for name, e in means.items()},
                             {name for claim in found.claims if claim.domain == group[0].domain
                              for name in claim.terms})
  for place, line in enumerate(group):
    e, style = means[line.name], styles[line.name]
    if line.first['reference'] and math.isfinite(e.mean):
      panel.axvline(e.mean, color='#555555', linestyle='--', linewidth=1, zorder=1)
      if e.n > 1 and e.half > 0:
        panel.axvspan(*e.interval, color='#999999', alpha=0.22, linewidth=0, zorder=0)
    panel.plot(values[line.name], [place + 0.24] * e.n, 'o', color=style['color'], alpha=0.6,
               markersize=3.5, markeredgewidth=0)
    if note := _elsewhere(e.mean, low, high):
      left = e.mean < low
      panel.annotate(note, (0 if left else 1, place), xycoords=panel.get_yaxis_transform(),
                     xytext=(5 if left else -5, 0), textcoords='offset points', va='center',
                     ha='left' if left else 'right', fontsize='small')
    else:
      panel.errorbar([e.mean], [place], xerr=[e.half] if e.n > 1 else None, color=style['color'],
                     marker=style['marker'], markeredgecolor='black', markeredgewidth=0.5,
                     markersize=7, capsize=4)
  panel.set_xlim(low, high)
  panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
  panel.set_yticks(range(len(group)), [line.name for line in group])
  panel.set_ylim(len(group) - 0.5, -0.5)
  panel.set_xlabel(_aligned_label(group, path))


def _sweep(panel: Axes, group: list[Line], styles: dict, found: Results) -> None:
  """The first metric over x: a line per series with intervals; arms without x lie across."""
  path = lines_lib.shown(group, found.suite['metrics'], found.claims)[0]
  group = [line for line in group if line.values(path)]
  means = {name: estimate(values) for name, values in _aligned(group, path).items()}
  ends = {name: _ends(e) for name, e in means.items()}
  low, high = lines_lib.span(group, ends, ends)
  series: dict[str, list[Line]] = {}
  outside = []
  for line in group:
    e, style = means[line.name], styles[_label(line)]
    note = _elsewhere(e.mean, low, high)
    if note:
      outside.append(f'{line.name}: {note}')
    if line.first['x'] is not None:
      series.setdefault(_label(line), []).append(line)
    elif not note:
      panel.axhline(e.mean, color=style['color'], linestyle=style['linestyle'], linewidth=1.3,
                    label=_label(line), zorder=1)
      if e.n > 1:
        panel.axhspan(*e.interval, color=style['color'], alpha=0.12, linewidth=0, zorder=0)
  aside = _x_axis(panel, sorted({line.first['x'] for arms in series.values() for line in arms}),
                  len(series))
  for place, (label, arms) in enumerate(series.items()):
    arms.sort(key=lambda line: line.first['x'])
    # A little apart, so that the bars of two series do not hide each other.
    panel.errorbar([aside(line.first['x'], place - (len(series) - 1) / 2) for line in arms],
                   [means[line.name].mean for line in arms],
                   [means[line.name].half for line in arms], label=label, capsize=3,
                   elinewidth=1.1, **styles[label])
  panel.set_ylim(low, high)
  _say(panel, outside)
  panel.set_xlabel(found.suite['x_label'])
  panel.set_ylabel(_aligned_label(group, path))


def _x_axis(panel: Axes, places: list[float], series: int) -> Callable[[float, float], float]:
  """Ticks at every x, evenly if all are powers of two; how to move an x by so many small steps."""
  even = bool(places) and all(x > 0 and math.log2(x).is_integer() for x in places)
  if even:
    panel.set_xscale('log', base=2)
    panel.minorticks_off()
  if even or len(places) <= 10:
    panel.set_xticks(places, [f'{x:,g}' for x in places])
  width = places[-1] - places[0] if places else 0.0
  octaves, step = min(0.08, 0.5 / max(series, 1)), min(0.012, 0.06 / max(series, 1)) * width
  return lambda x, steps: x * 2 ** (octaves * steps) if even else x + step * steps
