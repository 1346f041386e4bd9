"""Measures whether the data loader is faster than the train step: ratios of the two rates.

  python -m experiments.benchmarks.loader [--rounds=15]

For each config, a round runs some train steps on one batch that is already in memory, and then
reads as many batches from the loader while nothing else runs. The ratio is batches per second over
steps per second; below 1 the loader would be the bottleneck. In training both share the cores, so
the ratio should be well above 1.
"""

import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax

from configs.pretrain import t5_stdlib, vit_glyphs
from experiments import cli, results
from experiments.benchmarks import common
from moejax.train import config as run_config

COMMAND = 'python -m experiments.benchmarks.loader'
CONFIGS = {'configs/pretrain/vit_glyphs.py': vit_glyphs, 'configs/pretrain/t5_stdlib.py': t5_stdlib}
STEPS = 40   # a round


def ratios(config: run_config.RunConfig, rounds: int,
           tick: Callable[[Any], Any] = lambda key: None) -> list[float]:
  """Loader rate over step rate, one number a round."""
  trainer, state = common.trainer(dataclasses.replace(config, steps_per_call=1))
  batch = trainer.devices.put(trainer.dataset.train_batch(0))

  def train() -> None:
    nonlocal state
    for _ in range(STEPS):
      state, marker = trainer.train_step(state, batch)
    jax.block_until_ready(marker)

  took = common.in_turns({
      'step': train, 'loader': lambda: [*trainer.dataset.train_batches(1, STEPS + 1)]},
      rounds, tick)
  return common.ratios(took['step'], took['loader'])


def page(measured: dict[str, list[float]]) -> str:
  """Markdown of {config: ratios}: median, least and greatest."""
  headers = ['config', 'loader / train step, median', 'least', 'greatest', 'rounds']
  rows = [[f'`{name}`', *(f'{x:.1f}' for x in (statistics.median(r), min(r), max(r))), len(r)]
          for name, r in measured.items()]
  return '\n'.join(common.table(headers, rows)) + '\n'


def main(argv: list[str] | None = None) -> int:
  """Measures; returns the exit code. Raises ConfigError on a wrong flag."""
  parser = cli.Parser(COMMAND, __doc__)
  parser.add_argument('--rounds', type=int, default=15, help='rounds per config (%(default)s)')
  parser.add_argument('--results', type=pathlib.Path, metavar='FILE',
                      help='also write the table there')
  args = parser.parse(argv)
  cli.check_at_least(1, '--rounds', args.rounds, 'More are more certain.')
  with common.progress(total=len(CONFIGS) * 2 * (args.rounds + 1), unit='round') as bar:
    measured = {name: ratios(run_config.resolve(module.get_config()), args.rounds,
                             lambda key: bar.update())
                for name, module in CONFIGS.items()}
  text = page(measured)
  print(text)
  if args.results:
    flags = ' '.join(sys.argv[1:] if argv is None else argv)
    results.write_text(args.results, f'{text}\nMade by `{COMMAND} {flags}`.\n')
  return 0


if __name__ == '__main__':
  cli.start(main)
