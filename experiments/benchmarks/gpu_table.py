"""The page of experiments.benchmarks.gpu_step: a table per device, and what its columns are."""

import re
import textwrap
from collections.abc import Iterable
from typing import Any

LIMIT = 1.15    # what an upcycled step may take, over the sum of its matmuls and attentions

# FLOPs per second in bfloat16, dense, of NVIDIA's data sheets; float16 for T4, which has no other.
# The first name that is a word of the device's counts.
PEAKS = {'H100 PCIe': 756e12, 'H100': 989e12, 'H200': 989e12, 'A100': 312e12, 'L4': 121e12,
         'T4': 65e12}

COLUMNS = ('cell', 'parameters', 'batch', 'step', 'matmuls', 'attention', 'step / both',
           'products in it', 'other kernels', 'GB of them', 'MFU', 'examples / s',
           'time / dense', 'peak', 'forecast')

LEGEND = (
    'step: milliseconds, median; matmuls, attention: those of the step, each alone, forward and '
    f'backward; step / both: of an upcycled step at most {LIMIT:.2f} is wanted, what is above is '
    'marked !. products in it, other kernels: what the step spends in kernels of matmuls and fused '
    'attention, and in all others (a profile); GB of them: what the others read and write, by the '
    'compiled program. MFU: FLOPs of the model (flops.py) over those of '
    "the device's peak in bfloat16. time / dense: per "
    'example, over the dense cell of the same attention. peak: GiB that the process had at most on '
    'the device; forecast: GiB, before anything was allocated (moejax/train/memory.py). '
    'Dropless matmuls alone have even loads. –: not known here.')


def page(lines: list[dict[str, Any]], names: Iterable[str]) -> str:
  """Markdown, a table per device.

  lines: of gpu.jsonl.
  names: of cells, in the order of their rows; lines of other names come last.
  """
  order = {name: i for i, name in enumerate(names)}
  out = ['# On a GPU', '']
  for device in sorted({line['device'] for line in lines}):
    rows = sorted((x for x in lines if x['device'] == device),
                  key=lambda x: order.get(x['name'], len(order)))
    dense = {(x['model'], x['attention']): x['seconds'] / x['batch_size']
             for x in rows if x['routing'] == 'dense'}
    out += [f'## {device}', '', '| ' + ' | '.join(COLUMNS) + ' |',
            '|---|' + '---:|' * (len(COLUMNS) - 1), *(_row(x, dense) for x in rows), '',
            f'JAX {", ".join(sorted({x["versions"]["jax"] for x in rows}))}; '
            + ', '.join(f'`{c}`' for c in sorted({x['command'] for x in rows})) + '.', '']
    errors = [x['attention_errors'] for x in rows if 'attention_errors' in x]
    if errors:
      most = {how: max(e[how] for e in errors) for how in ('fused', 'plain')}
      out += textwrap.wrap(
          f'Attention, output and gradients, is off float32 by at most {most["fused"]:.1e} of an '
          f"array's largest value where it is fused, {most['plain']:.1e} where it is plain, both "
          'in bfloat16.', 100) + ['']
  return '\n'.join(out + textwrap.wrap(LEGEND, 100)) + '\n'


def peak_of(device: str) -> float | None:
  """FLOPs per second of a device by its name; None if it is not in PEAKS."""
  return next((peak for name, peak in PEAKS.items() if re.search(rf'\b{name}\b', device)), None)


def _row(x: dict[str, Any], dense: dict[tuple[str, str], float]) -> str:
  gib = lambda size: f'{size / 2**30:.1f}' if size else '–'
  both = x['matmuls'] and x['matmuls'] + x['attention_alone']   # None: not measured
  mark = '!' if x['experts'] and both and x['seconds'] > LIMIT * both else ''
  peak = peak_of(x['device'])
  base, inside = dense.get((x['model'], x['attention'])), x.get('kernels')
  per_example = x['seconds'] / x['batch_size']
  cells = [x['name'], f'{x["parameters"] / 1e6:,.0f} M', str(x['batch_size']),
           *(f'{1e3 * x[k]:,.1f}' if x[k] else '–'
             for k in ('seconds', 'matmuls', 'attention_alone')),
           f'{x["seconds"] / both:.2f}{mark}' if both else '–',
           *(f'{1e3 * inside[k]:,.1f}' if inside else '–' for k in ('products', 'other')),
           f'{x["other_bytes"] / 1e9:,.0f}' if x.get('other_bytes') else '–',
           f'{x["flops"] / x["seconds"] / peak:.2f}' if peak else '–',
           f'{1 / per_example:,.0f}', f'{per_example / base:.2f}' if base else '–',
           gib(x['peak_bytes']), gib(sum(x['forecast'][k] for k in (
               'params', 'optimizer', 'gradients', 'activations')))]
  return '| ' + ' | '.join(cells) + ' |'
