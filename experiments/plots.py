"""Draws a suite's plot: for each domain curves and points, points, or a sweep (suite.Suite.plot).

Claims are about differences within a pair, and pairs differ by more than arms do. So a plot aligns
the pairs at the reference, if there is one (see `offsets`): error bars are then those of Δ.
"""

import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import results as results_lib
from experiments import tables
from experiments.results import Results, TableArm
from experiments.verdict import Estimate, estimate

# Okabe and Ito's colours, which the colour-blind can distinguish (grey for their yellow, which is
# faint on white); markers and dashes repeat the distinction.
COLORS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#56B4E9', '#CC79A7', '#E69F00', '#777777')
MARKERS = ('o', 's', '^', 'v', 'D', 'P', 'X', 'h', '*')
DASHES = (':', '-', '--', '-.', (0, (5, 1, 1, 1, 1, 1)))
FAR_START = 6.0   # a start this many axis heights above the axis is given in words
CLAIMED = 4.0     # how much further an axis reaches for an arm that a claim is about, see `span`
PANEL = 5.2       # inches: a README shows two of them side by side at full size
STYLE = {'font.size': 11, 'axes.titlesize': 12, 'axes.grid': True, 'grid.alpha': 0.3,
         'axes.axisbelow': True, 'lines.linewidth': 1.7, 'lines.markersize': 5.5}
UNITS = {'loss': 'nats', 'step0_gap': 'nats'}


def plot(results: Results, path: pathlib.Path) -> None:
  """Draws results.suite['plot'] as PNG; equal results give equal bytes."""
  domains = results_lib.by_domain(results.records, results.suite['metrics'])
  kind = results.suite['plot']
  draws = {'curves': (_curves, _points), 'points': (_points,), 'sweep': (_sweep,)}[kind]
  if not any(map(tables.several_pairs, domains.values())):
    draws = draws[:1]   # points would repeat the ends of the curves
  most_arms = max(map(len, domains.values()))
  heights = [max(2.4, 1.1 + 0.4 * most_arms) if draw is _points else 4.2 for draw in draws]
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
      for panel, (domain, arms) in zip(panels.flat, domains.items()):
        draw(panel, arms, styles, results)
        panel.set_title(domain if row == 0 else '')
      if draw is _points:
        _name_arms_once(panels)
    _legend(figure, grid)
    save(figure, path)


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes PNG without the software's name and version, so that equal figures give equal bytes."""
  figure.savefig(path, dpi=130, metadata={'Software': None})


def _name_arms_once(panels) -> None:
  """Removes the arms' names from a panel if the panel to its left has the same names."""
  for left, right in zip(panels[:, :-1].flat, panels[:, 1:].flat):
    names = [[text.get_text() for text in panel.get_yticklabels()] for panel in (left, right)]
    if names[0] == names[1]:
      right.set_yticklabels([])


def _styles(domains: dict[str, list[TableArm]], kind: str) -> dict[str, dict]:
  """{label: colour, marker, dashes}, the same in every panel; no two alike."""
  labels = dict.fromkeys(_label(arm) if kind == 'sweep' else arm.name
                         for arms in domains.values() for arm in arms)
  return {label: {'color': COLORS[i % len(COLORS)], 'marker': MARKERS[i % len(MARKERS)],
                  'linestyle': DASHES[i % len(DASHES)], 'markeredgecolor': 'black',
                  'markeredgewidth': 0.4}
          for i, label in enumerate(labels)}


def _label(arm: TableArm) -> str:
  return arm.first['series'] or arm.name


def _legend(figure, panels) -> None:
  """Draws one legend under all panels."""
  handles = {}
  for panel in panels.flat:
    for handle, label in zip(*panel.get_legend_handles_labels()):
      handles.setdefault(label, handle)
  if handles:
    width = max(map(len, handles))
    per_row = max(1, int(52 * panels.shape[1] / (width + 8)))
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', frameon=False,
                  ncols=min(len(handles), per_row), handlelength=3.2)


def offsets(arms: Sequence[TableArm], path: str) -> dict[int, float]:
  """{pair: the reference's metric in it - its mean over pairs}.

  Less these, a pair's values keep their differences, all pairs have the reference in one place, and
  the spread of another arm is that of Δ. {pair: 0.0} without a reference that is finite in every
  pair.
  """
  pairs = {pair for arm in arms for pair in arm.records}
  reference = next((arm for arm in arms if arm.first['reference']), None)
  values = reference.values(path) if reference else {}
  if values.keys() != pairs or not all(map(math.isfinite, values.values())):
    return dict.fromkeys(pairs, 0.0)
  mean = math.fsum(values.values()) / len(values)
  return {pair: value - mean for pair, value in values.items()}


def _aligned(arms: list[TableArm], path: str) -> dict[str, list[float]]:
  """{arm's name: its values of a metric less the `offsets`}."""
  moved = offsets(arms, path)
  return {arm.name: [value - moved[pair] for pair, value in arm.values(path).items()]
          for arm in arms}


def axis_label(arms: list[TableArm], path: str) -> str:
  """'test loss (nats), pairs aligned' for 'test/loss' of arms whose `offsets` are not 0."""
  unit = UNITS.get(path.rpartition('/')[2])
  name = tables.header(path).replace('val.', 'validation').replace('acc.', 'accuracy')
  return name + (f' ({unit})' if unit else '') + (
      ', pairs aligned' if any(offsets(arms, path).values()) else '')


def span(arms: Sequence[TableArm], drawn: dict[str, list[float]], ends: dict[str, list[float]],
         claimed: Collection[str] = ()) -> tuple[float, float]:
  """Limits of an axis that shows every value of the arms that branch from a trunk or are swept.

  It shows the end of any other arm too, if that is no further from those values than they spread,
  or CLAIMED times that for an arm that a claim is about. An arm that is left out (one that started
  from nothing, mostly) would flatten all others; its value is given in words.

  Args:
    arms: of a domain.
    drawn: {arm's name: values that are drawn of it}.
    ends: {arm's name: the interval around its last value, if any, and last that value}.
    claimed: names of arms that claims are about.
  """
  finite = lambda values: [v for v in values if math.isfinite(v)]
  branches = [v for arm in arms if arm.first['start_step'] > 0 or arm.first['x'] is not None
              for v in finite(drawn[arm.name] + ends[arm.name])]
  branches = branches or [v for values in ends.values() for v in finite(values)] or [0.0]
  low, high = min(branches), max(branches)
  near = []
  for name, values in ends.items():
    reach = (high - low) * (CLAIMED if name in claimed else 1)
    near += finite(values) if low - reach <= values[-1] <= high + reach else []
  low, high = min([low, *near]), max([high, *near])
  margin = 0.06 * (high - low) or 0.1
  return low - margin, high + margin


def curve(arm: TableArm, offsets: Mapping[int, float]) -> list[tuple[float, list[float]]]:
  """[(extra FLOPs in %, validation loss of each pair)] of the evaluations that all pairs have.

  offsets: {pair: subtracted from its loss}.
  """
  losses = [{point['step'] - record['start_step']: point['loss'] - offsets[pair]
             for point in record['history']} for pair, record in arm.records.items()]
  steps = sorted(set.intersection(*map(set, losses)))
  return [(results_lib.extra_flops(arm.first, step), [loss[step] for loss in losses])
          for step in steps]


def _curves(panel: Axes, arms: list[TableArm], styles: dict, _: Results) -> None:
  """Validation loss over extra FLOPs: mean over pairs, each pair thinly, the end's interval."""
  moved = offsets(arms, 'validation/loss')
  curves = {arm.name: curve(arm, moved) for arm in arms}
  means = {name: [estimate(losses) for _, losses in points] for name, points in curves.items()}
  low, high = _height(arms, curves, {name: _ends(of_arm[-1]) for name, of_arm in means.items()})
  lane = 0.012 * max(points[-1][0] for points in curves.values())
  outside = [f'{arm.name} starts at {means[arm.name][0].mean:.4g}' for arm in arms
             if arm.first['start_step'] and means[arm.name][0].mean > high]
  for place, arm in enumerate(arms):
    style, end = styles[arm.name], means[arm.name][-1]
    x = [at for at, _ in curves[arm.name]]
    outside += [f'{arm.name} ends at {note}'] if (note := _outside(end.mean, low, high)) else []
    panel.plot(x, [e.mean for e in means[arm.name]], **style,
               label=arm.name if any(low <= e.mean <= high for e in means[arm.name]) else None)
    if len(arm.records) > 1:
      panel.plot(x, [losses for _, losses in curves[arm.name]], color=style['color'], alpha=0.35,
                 linewidth=0.7, zorder=1)
      # Beside the end, where bars of arms of the same cost do not hide each other.
      panel.errorbar(x[-1] + (place + 1) * lane, end.mean, end.half, color=style['color'],
                     capsize=2.5, zorder=3)
  panel.set_ylim(low, high)
  _write_notes(panel, outside)
  panel.set_xlabel('extra FLOPs (% of dense pretraining)')
  panel.set_ylabel(axis_label(arms, 'validation/loss'))


def _height(arms: list[TableArm], curves: Mapping[str, list[tuple[float, list[float]]]],
            ends: dict[str, list[float]]) -> tuple[float, float]:
  """Limits of an axis of curves, without a start so high that it would flatten the rest."""
  values = lambda points: [loss for _, losses in points for loss in losses]
  later = {name: values(points[1:] or points) for name, points in curves.items()}
  low, high = span(arms, later, ends)
  starts = {name: values(points[:1]) for name, points in curves.items()}
  return span(arms, {
      name: later[name] + [v for v in starts[name] if v <= high + FAR_START * (high - low)]
      for name in curves}, ends)


def _ends(e: Estimate) -> list[float]:
  """What an axis must reach for a mean and its interval; the mean last."""
  return [*(e.interval if e.n > 1 else ()), e.mean]


def _outside(value: float, low: float, high: float) -> str:
  """The note on a mean that is outside the axis; '' if it is inside."""
  if not math.isfinite(value):
    return str(value)
  return '' if low <= value <= high else f'{value:.4g}, outside'


def _write_notes(panel: Axes, notes: list[str]) -> None:
  if notes:
    panel.text(0.98, 0.97, '\n'.join(notes), transform=panel.transAxes, ha='right', va='top',
               fontsize='small', bbox={'color': 'white', 'alpha': 0.8, 'pad': 1.5})


def _plotted(arms: list[TableArm], results: Results) -> tuple[str, list[TableArm]]:
  """The first metric of a domain, and the arms that measured it."""
  path = results_lib.measured_paths(arms, results.suite['metrics'], results.claims)[0]
  return path, [arm for arm in arms if arm.values(path)]


def _points(panel: Axes, arms: list[TableArm], styles: dict, results: Results) -> None:
  """The first metric of each arm: every pair, mean and interval; the reference down the panel."""
  path, arms = _plotted(arms, results)
  values = _aligned(arms, path)
  means = {name: estimate(of_arm) for name, of_arm in values.items()}
  claimed = {name for claim in results.claims if claim.domain == arms[0].domain
             for name in claim.terms}
  low, high = span(arms, values, {name: _ends(e) for name, e in means.items()}, claimed)
  for place, arm in enumerate(arms):
    e, style = means[arm.name], styles[arm.name]
    if arm.first['reference'] and math.isfinite(e.mean):
      panel.axvline(e.mean, color='#555555', linestyle='--', linewidth=1, zorder=1)
      if e.n > 1 and e.half > 0:
        panel.axvspan(*e.interval, color='#999999', alpha=0.22, linewidth=0, zorder=0)
    panel.plot(values[arm.name], [place + 0.24] * e.n, 'o', color=style['color'], alpha=0.6,
               markersize=3.5, markeredgewidth=0)
    if note := _outside(e.mean, low, high):
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
  panel.set_yticks(range(len(arms)), [arm.name for arm in arms])
  panel.set_ylim(len(arms) - 0.5, -0.5)
  panel.set_xlabel(axis_label(arms, path))


def _sweep(panel: Axes, arms: list[TableArm], styles: dict, results: Results) -> None:
  """The first metric over x: a line per series with intervals; arms without x lie across."""
  path, arms = _plotted(arms, results)
  means = {name: estimate(values) for name, values in _aligned(arms, path).items()}
  ends = {name: _ends(e) for name, e in means.items()}
  low, high = span(arms, ends, ends)
  series: dict[str, list[TableArm]] = {}
  outside = []
  for arm in arms:
    e, style = means[arm.name], styles[_label(arm)]
    note = _outside(e.mean, low, high)
    if note:
      outside.append(f'{arm.name}: {note}')
    if arm.first['x'] is not None:
      series.setdefault(_label(arm), []).append(arm)
    elif not note:
      panel.axhline(e.mean, color=style['color'], linestyle=style['linestyle'], linewidth=1.3,
                    label=_label(arm), zorder=1)
      if e.n > 1:
        panel.axhspan(*e.interval, color=style['color'], alpha=0.12, linewidth=0, zorder=0)
  shifted = _x_axis(panel, sorted({arm.first['x'] for one in series.values() for arm in one}),
                    len(series))
  for place, (label, one) in enumerate(series.items()):
    one.sort(key=lambda arm: arm.first['x'])
    # A little apart, so that the bars of two series do not hide each other.
    panel.errorbar([shifted(arm.first['x'], place - (len(series) - 1) / 2) for arm in one],
                   [means[arm.name].mean for arm in one],
                   [means[arm.name].half for arm in one], label=label, capsize=3,
                   elinewidth=1.1, **styles[label])
  panel.set_ylim(low, high)
  _write_notes(panel, outside)
  panel.set_xlabel(results.suite['x_label'])
  panel.set_ylabel(axis_label(arms, path))


def _x_axis(panel: Axes, places: list[float], series: int) -> Callable[[float, float], float]:
  """Puts a tick at every x, evenly if all are powers of two; returns (x, steps) -> x, shifted."""
  even = bool(places) and all(x > 0 and math.log2(x).is_integer() for x in places)
  if even:
    panel.set_xscale('log', base=2)
    panel.minorticks_off()
  if even or len(places) <= 10:
    panel.set_xticks(places, [f'{x:,g}' for x in places])
  width = places[-1] - places[0] if places else 0.0
  octaves, step = min(0.08, 0.5 / max(series, 1)), min(0.012, 0.06 / max(series, 1)) * width
  return lambda x, steps: x * 2 ** (octaves * steps) if even else x + step * steps
