"""Does the data loader outrun the train step? Ratios of the two rates, measured side by side.

  python -m experiments.benchmarks.loader [--rounds=15]

For each config, rounds of one and the other in turn: as many train steps on one batch that is
already in memory, then the same number of batches from the loader with nothing else running. The
ratio is batches per second over steps per second; below 1 the loader would be the bottleneck. In
training both share the cores, so it should be well above 1.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

import jax
from tqdm import tqdm

from configs.pretrain import t5_stdlib, vit_glyphs
from moejax import data
from moejax.train import config as run_config
from moejax.train import loop
from moejax.train.plan import Plan
from moejax.train.validate import validate

CONFIGS = {'configs/pretrain/vit_glyphs.py': vit_glyphs, 'configs/pretrain/t5_stdlib.py': t5_stdlib}
STEPS = 40   # a round


def ratios(config: run_config.RunConfig, rounds: int, tick=lambda: None) -> list[float]:
  """Loader rate over step rate, one number a round, after a round of each to warm up."""
  config = dataclasses.replace(config, steps_per_call=1)
  trainer = loop.Trainer(validate(config, Plan.make(config, 0)))
  trainer.compile()
  state, _ = trainer.programs.first_state()
  batch = trainer.devices.put(trainer.dataset.train_batch(0))
  found = []
  for _ in range(rounds + 1):
    started = time.perf_counter()
    for _ in range(STEPS):
      state, marker = trainer.train_step(state, batch)
    jax.block_until_ready(marker)
    step_rate = STEPS / (time.perf_counter() - started)
    found.append(data.throughput(trainer.dataset, STEPS, threads=True) / step_rate)
    tick()
  return found[1:]


def table(rows: dict[str, list[float]]) -> str:
  """Markdown of {config: ratios}: median, least and greatest."""
  lines = ['| config | loader / train step, median | least | greatest | rounds |',
           '|---|---:|---:|---:|---:|']
  lines += [f'| `{name}` | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} '
            f'| {len(found)} |' for name, found in rows.items()]
  return '\n'.join(lines) + '\n'


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog='python -m experiments.benchmarks.loader',
                                   description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=15, help='rounds per config (%(default)s)')
  parser.add_argument('--results', type=pathlib.Path, metavar='FILE',
                      help='also write the table there')
  args = parser.parse_args(argv)
  rows = {}
  with tqdm(total=len(CONFIGS) * (args.rounds + 1), unit='round') as bar:
    for name, module in CONFIGS.items():
      run = run_config.resolve(module.get_config())
      rows[name] = ratios(run, args.rounds, lambda: bar.update(1))
  text = table(rows)
  print(text)
  if args.results:
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(f'{text}\nMade by `python -m experiments.benchmarks.loader '
                            f'{" ".join(argv or sys.argv[1:])}`.\n')
  return 0


if __name__ == '__main__':
  sys.exit(main())
