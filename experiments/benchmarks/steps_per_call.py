"""Measures step times of small models by the number of steps per call: does the host keep up?

  python -m experiments.benchmarks.steps_per_call     the mini models, dense and upcycled
    --models=vit     those with that in their names
    --scale=smoke    tiny models, as a test; writes to runs/smoke_steps_per_call
    --show           only prints the table of what is measured

For each model, train steps with 1, 5, 25 and 50 steps per call (config.steps_per_call) run in
turns, round by round. All include the train loop's work on the host: it joins batches, sends them
and starts the call, with at most two calls in flight. Batches are made beforehand.
"""

import collections
import dataclasses
import pathlib
import textwrap
from collections.abc import Callable
from typing import Any

import jax

from configs.pretrain import t5_stdlib, vit_glyphs
from configs.upcycle import t5_stdlib_upcycled, vit_glyphs_upcycled
from experiments import cli
from experiments.benchmarks import common
from experiments.benchmarks.common import Line
from moejax.config import fail
from moejax.train import config as run_config
from moejax.train import workdir
from moejax.train.run_log import AHEAD
from moejax.train.step import join_batches

COMMAND = 'python -m experiments.benchmarks.steps_per_call'
FOLDER, SMOKE_FOLDER = common.RESULTS / 'gpu', pathlib.Path('runs') / 'smoke_steps_per_call'
FILE, PAGE = 'steps_per_call.jsonl', 'steps_per_call.md'
MODELS = {'t5_stdlib': t5_stdlib, 't5_stdlib_upcycled': t5_stdlib_upcycled,
          'vit_glyphs': vit_glyphs, 'vit_glyphs_upcycled': vit_glyphs_upcycled}


@dataclasses.dataclass(frozen=True)
class Scale:
  """steps: numbers per call. A round is `least` steps of each, rounded up to whole calls."""
  steps: tuple[int, ...]
  rounds: int
  least: int
  runlocal: bool = False


SCALES = {'mini': Scale((1, 5, 25, 50), 11, 200), 'smoke': Scale((1, 2), 2, 2, runlocal=True)}


def config(name: str, steps: int, scale: Scale) -> run_config.RunConfig:
  """The run of a config file, `steps` per call, from fresh weights; every device has its batch."""
  found = MODELS[name].get_config('runlocal' if scale.runlocal else None)
  found.init.update(mode='scratch', parent='', optimizer='reset')
  found.schedule.cooldown_steps = 0
  found.steps_per_call = steps
  found.data.batch_size *= jax.device_count()
  found.data.eval_batch_size *= jax.device_count()
  found.steps = found.log_every = found.eval_every = found.checkpoint_every = 100
  return run_config.resolve(found)


def prepare(run: run_config.RunConfig, calls: int) -> Callable[[], None]:
  """Compiles a run's train step; what it returns makes so many calls as the train loop does."""
  trainer, state = common.trainer(run)
  batches = [trainer.dataset.train_batch(step) for step in range(run.steps_per_call)]

  def advance() -> None:
    nonlocal state
    in_flight = collections.deque()
    for _ in range(calls):
      batch = join_batches(batches, trainer.programs.examples_per_device)
      state, marker = trainer.train_step(state, trainer.put(batch))
      in_flight.append(marker)
      if len(in_flight) > AHEAD:
        jax.block_until_ready(in_flight.popleft())
    jax.block_until_ready(state)
  return advance


def measure(name: str, scale: Scale, tick: Callable[[Any], Any] = lambda steps: None) -> Line:
  """A line of FILE without its command: quartiles of the seconds of a step, and of their ratios to
  one step per call, by steps per call."""
  calls = {steps: -(-scale.least // steps) for steps in scale.steps}
  works = {steps: prepare(config(name, steps, scale), calls[steps]) for steps in scale.steps}
  took = {steps: [seconds / (calls[steps] * steps) for seconds in rounds]
          for steps, rounds in common.in_turns(works, scale.rounds, tick).items()}
  return {'model': name, 'rounds': scale.rounds, 'device': common.device_name(),
          'versions': workdir.versions(),
          'seconds': {str(steps): common.quartiles(times) for steps, times in took.items()},
          'ratios': {str(steps): common.quartiles(common.ratios(times, took[1]))
                     for steps, times in took.items()}}


def measure_all(names: list[str], scale_name: str, output: common.Measurements) -> int:
  """Measures models, in place of their lines from such a device; returns 0 failures."""
  scale = SCALES[scale_name]
  with common.progress(total=len(names) * len(scale.steps) * (scale.rounds + 1), unit='round'
                       ) as bar:
    for name in names:
      bar.set_postfix_str(name)
      line = measure(name, scale, lambda steps: bar.update())
      output.add([{**line, 'command': f'{COMMAND} --scale={scale_name}'}])
  return 0


LEGEND = ('Milliseconds of a train step, median of the rounds, by how many steps a call has; '
          'in brackets the ratio to one step per call, median and quartiles over rounds that '
          'took turns.')


def page(lines: list[Line]) -> str:
  """Markdown, a table per device."""
  out, order = ['# Steps per call', ''], {name: i for i, name in enumerate(MODELS)}
  for device in sorted({line['device'] for line in lines}):
    own = sorted((line for line in lines if line['device'] == device),
                 key=lambda line: order.get(line['model'], len(order)))
    steps = sorted({n for line in own for n in line['seconds']}, key=int)
    out += [f'## {device}', '', *common.table(['model', *steps], (
        [line['model'], *(_cell(line, n) for n in steps)] for line in own)), '',
            common.made_by(own), '']
  return '\n'.join(out + textwrap.wrap(LEGEND, 100)) + '\n'


def _cell(line: Line, steps: str) -> str:
  if steps not in line['seconds']:
    return '–'
  low, median, high = line['ratios'][steps]
  ratio = '' if steps == '1' else f' ({median:.2f}, {low:.2f} to {high:.2f})'
  return f'{1e3 * line["seconds"][steps][1]:.2f}{ratio}'


def main(argv: list[str] | None = None) -> int:
  """Measures, or shows; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser(COMMAND, __doc__)
  parser.add_argument('--models', metavar='TEXT', default='',
                      help=f'those with this in their names, of {", ".join(MODELS)}')
  parser.add_argument('--scale', choices=tuple(SCALES), default='mini',
                      help='how large (default: %(default)s)')
  common.add_measurement_flags(parser, FOLDER, SMOKE_FOLDER)
  args = parser.parse(argv)
  names = [name for name in MODELS if args.models in name]
  if not names:
    fail('--models', args.models, ', '.join(MODELS), 'It is a part of a name.')
  folder = common.folder_of(args, FOLDER, SMOKE_FOLDER)
  output = common.Measurements(folder / FILE, ('model', 'device', 'command'), page, folder / PAGE)
  return output.finish(lambda: measure_all(names, args.scale, output), args.show)


if __name__ == '__main__':
  cli.start(main)
