"""Plots of what was compiled for TPUs (experiments/benchmarks/tpu.py)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from experiments.plots import COLORS, PANEL, STYLE

GRAY, BLUE, ORANGE, GREEN = COLORS[7], COLORS[1], COLORS[2], COLORS[3]
LIMIT = 0.85   # of the dense parent's MFU, wanted of an upcycled run
PARTS = {'compute_bound': ('bound by FLOPs', BLUE, ''),
         'memory_bound': ('bound by HBM', ORANGE, '//'), 'network': ('network', GREEN, '..')}


def weak(lines: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Weak scaling as PNG: the estimated step by what bounds it, and a chip's HBM.

  lines: of the table 'weak', by number of chips.
  """
  names = [str(line['chips']) for line in lines]
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(2 * PANEL, 3.6), layout='constrained')
    step, memory = figure.subplots(1, 2)
    bottom = [0.0] * len(lines)
    for key, (label, color, hatch) in PARTS.items():
      height = [1e3 * line['roofline'][key] for line in lines]
      step.bar(names, height, bottom=bottom, label=label, color=color, hatch=hatch,
               edgecolor='white')
      bottom = [a + b for a, b in zip(bottom, height)]
    step.set(title='Estimated step, all in turn', xlabel='chips', ylabel='ms')
    step.set_ylim(0, 1.25 * max(bottom))
    step.legend(loc='upper left', ncols=3, fontsize=9)
    memory.bar(names, [line['memory']['total'] / 2**30 for line in lines], color=GRAY)
    memory.set(title='HBM of a chip', xlabel='chips', ylabel='GiB')
    figure.savefig(path, dpi=130, metadata={'Software': None})


def pairs(lines: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Estimated MFU of dense runs and upcycled ones on the same slices, as PNG.

  lines: of the table 'paper'; those whose pair is not whole are left out.
  """
  mfu = {line['name']: line['roofline']['mfu_serial'] for line in lines}
  names = [name for name in mfu if f'{name}_upcycled' in mfu]
  place = list(range(len(names)))
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(2 * PANEL, 3.6), layout='constrained')
    panel = figure.subplots()
    for shift, ending, color, hatch in ((-0.2, '', GRAY, ''), (0.2, '_upcycled', BLUE, '//')):
      panel.bar([x + shift for x in place], [mfu[name + ending] for name in names], 0.4,
                color=color, hatch=hatch, edgecolor='white',
                label='upcycled, 32 experts' if ending else 'dense')
    panel.hlines([LIMIT * mfu[name] for name in names], place, [x + 0.4 for x in place],
                 color='black', label=f'{LIMIT} of dense')
    panel.set_xticks(place, [name.replace('_', ' ') for name in names], rotation=20)
    panel.set(ylabel='estimated MFU', ylim=(0, None), title='All operations in turn')
    panel.legend(loc='upper left', ncols=3)
    panel.set_ylim(0, 1.25 * max(mfu.values(), default=1))
    figure.savefig(path, dpi=130, metadata={'Software': None})
