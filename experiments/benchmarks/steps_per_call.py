"""Does the host keep up? Step times of small models by how many steps a dispatch has.

  python -m experiments.benchmarks.steps_per_call     the mini models, dense and upcycled
    --models=vit     those with that in their names
    --scale=smoke    tiny ones, to see that it works; into runs/smoke_steps_per_call
    --show           the table of what is measured, and no more

Of each model the train steps with 1, 5, 25 and 50 steps per dispatch (config.steps_per_call)
take turns, round by round, all with what the train loop does on the host: batches are put together,
sent and handed over, and at most two dispatches are in flight. Batches are made beforehand.
"""

import collections
import dataclasses
import json
import pathlib
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

from configs.pretrain import t5_stdlib, vit_glyphs
from configs.upcycle import t5_stdlib_upcycled, vit_glyphs_upcycled
from experiments import cli, results
from moejax.config import fail
from moejax.train import config as run_config
from moejax.train import loop, metrics, workdir
from moejax.train.plan import Plan
from moejax.train.run_log import AHEAD
from moejax.train.step import join_batches
from moejax.train.validate import validate

FOLDER = pathlib.Path(__file__).parent.parent / 'results/gpu'
FILE, PAGE = 'steps_per_call.jsonl', 'steps_per_call.md'
MODELS = {'t5_stdlib': t5_stdlib, 't5_stdlib_upcycled': t5_stdlib_upcycled,
          'vit_glyphs': vit_glyphs, 'vit_glyphs_upcycled': vit_glyphs_upcycled}
STEPS = (1, 5, 25, 50)      # per dispatch


@dataclasses.dataclass(frozen=True)
class Scale:
  """A round is `least` steps of each, or more to end with a dispatch; `per`: per dispatch."""
  per: tuple[int, ...]
  rounds: int
  least: int
  runlocal: bool = False


SCALES = {'mini': Scale(STEPS, 11, 200), 'smoke': Scale((1, 2), 2, 2, runlocal=True)}


def config(name: str, per: int, scale: Scale) -> run_config.RunConfig:
  """The run of a config file, from fresh weights, with its batch on every device."""
  found = MODELS[name].get_config('runlocal' if scale.runlocal else None)
  found.init.update(mode='scratch', parent='', optimizer='reset')
  found.schedule.cooldown_steps = 0
  found.steps_per_call = per
  found.data.batch_size *= jax.device_count()
  found.data.eval_batch_size *= jax.device_count()
  found.steps = found.log_every = found.eval_every = found.checkpoint_every = 100
  return run_config.resolve(found)


def prepare(run: run_config.RunConfig, least: int) -> Callable[[], float]:
  """Compiles; what is returned takes at least so many steps, and says how long one took, in s."""
  trainer = loop.Trainer(validate(run, Plan.make(run, 0)))
  trainer.compile()
  state, _ = trainer.programs.first_state()
  per = run.steps_per_call
  batches = [trainer.dataset.train_batch(step) for step in range(per)]
  dispatches = -(-least // per)

  def advance() -> float:
    nonlocal state
    flying = collections.deque()
    started = time.perf_counter()
    for _ in range(dispatches):
      batch = join_batches(batches, trainer.programs.examples_per_device)
      state, marker = trainer.train_step(state, trainer.put(batch))
      flying.append(marker)
      if len(flying) > AHEAD:
        jax.block_until_ready(flying.popleft())
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / (dispatches * per)
  return advance


def measure(name: str, scale: Scale, tick: Callable[[], Any] = lambda: None) -> dict[str, Any]:
  """A line of FILE, but for its command: seconds of a step by steps per dispatch, [lower quartile,
  median, upper quartile], and their ratios to one step per dispatch, likewise."""
  advances = {per: prepare(config(name, per, scale), scale.least) for per in scale.per}
  for advance in advances.values():
    advance()
    tick()
  took = {per: [] for per in advances}
  for n in range(scale.rounds):
    order = list(advances)
    for per in order[n % len(order):] + order[:n % len(order)]:
      took[per].append(advances[per]())
      tick()
  quartiles = lambda values: statistics.quantiles(values, n=4, method='inclusive')
  ratios = {per: [a / b for a, b in zip(times, took[1])] for per, times in took.items()}
  device = jax.local_devices()[0]
  return {'model': name, 'rounds': scale.rounds, 'device': f'{device.platform}: '
          f'{device.device_kind}', 'versions': workdir.versions(),
          'seconds': {str(per): quartiles(times) for per, times in took.items()},
          'ratios': {str(per): quartiles(values) for per, values in ratios.items()}}


def run(names: list[str], scale_name: str, folder: pathlib.Path) -> int:
  """Measures all, in place of what was there from such a device; returns 0 failures."""
  scale = SCALES[scale_name]
  total = len(names) * len(scale.per) * (scale.rounds + 1)
  with tqdm(total=total, unit='round', dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
    for name in names:
      bar.set_postfix_str(name)
      line = {**measure(name, scale, bar.update),
              'command': f'python -m experiments.benchmarks.steps_per_call --scale={scale_name}'}
      kept = [x for x in metrics.read_lines(folder / FILE)
              if any(x[k] != line[k] for k in ('model', 'device', 'command'))]
      results.write_text(folder / FILE, ''.join(json.dumps(x) + '\n' for x in [*kept, line]))
  return 0


LEGEND = ('Milliseconds of a train step, median of the rounds, by how many steps a dispatch has; '
          'in brackets the ratio to one step per dispatch, median and quartiles over rounds that '
          'took turns.')


def page(lines: list[dict[str, Any]]) -> str:
  """Markdown, a table per device."""
  out, order = ['# Steps per dispatch', ''], {name: i for i, name in enumerate(MODELS)}
  for device in sorted({x['device'] for x in lines}):
    rows = [x for x in lines if x['device'] == device]
    per = sorted({p for x in rows for p in x['seconds']}, key=int)
    out += [f'## {device}', '', '| model | ' + ' | '.join(per) + ' |', '|---|' + '---:|' * len(per),
            *(_row(x, per) for x in sorted(
                rows, key=lambda x: order.get(x['model'], len(order)))), '',
            f'JAX {", ".join(sorted({x["versions"]["jax"] for x in rows}))}; '
            + ', '.join(f'`{c}`' for c in sorted({x['command'] for x in rows})) + '.', '']
  return '\n'.join(out + textwrap.wrap(LEGEND, 100)) + '\n'


def _row(x: dict[str, Any], per: list[str]) -> str:
  def cell(p):
    if p not in x['seconds']:
      return '–'
    low, middle, high = x['ratios'][p]
    ratio = '' if p == '1' else f' ({middle:.2f}, {low:.2f} to {high:.2f})'
    return f'{1e3 * x["seconds"][p][1]:.2f}{ratio}'
  return '| ' + ' | '.join([x['model'], *map(cell, per)]) + ' |'


def main(argv: list[str] | None = None) -> int:
  """Measures, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser('python -m experiments.benchmarks.steps_per_call', __doc__)
  parser.add_argument('--models', metavar='TEXT', default='',
                      help=f'those with this in their names, of {", ".join(MODELS)}')
  parser.add_argument('--scale', choices=tuple(SCALES), default='mini',
                      help='how large (default: %(default)s)')
  parser.add_argument('--show', action='store_true', help='print what is measured, and no more')
  parser.add_argument('--results', metavar='DIR', type=pathlib.Path,
                      help=f'folder of {FILE} and {PAGE} (default: {FOLDER}; of --scale=smoke '
                      f'{cli.smoke_folder("steps_per_call")})')
  args = parser.parse(argv, suite_required=False)
  names = [name for name in MODELS if args.models in name]
  if not names:
    fail('--models', args.models, ', '.join(MODELS), 'It is a part of a name.')
  folder = args.results or (FOLDER if args.scale == 'mini' else cli.smoke_folder('steps_per_call'))
  return cli.measure(lambda: 0 if args.show else run(names, args.scale, folder), page,
                     folder / FILE, None if args.show else folder / PAGE)


if __name__ == '__main__':
  cli.run(main)
