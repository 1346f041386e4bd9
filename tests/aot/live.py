"""The compiler for TPUs itself: python -m tests.aot.live, as `make tpu` does; no TPU needed.

Compiles the runs on glyphs and on stdlib_text, upcycled and scanned, for a slice of four chips, and
checks what the report says of them against what is known without it.
"""

import json
import pathlib
import re
import sys
import tempfile

import jax

from configs import common
from moejax.aot import report
from moejax.config import ConfigError
from moejax.train import config as run_config

SLICE, CHIPS = 'v5e:2x2', 4
# Config -> tokens of an example that go through sparse blocks, all of these together.
RUNS = {'vit_glyphs_upcycled': 2 * 16, 't5_stdlib_upcycled': 113 + 22}
SLACK = 1.1   # slots are rounded, and a TPU pads them


def found(name: str, **mesh) -> tuple[dict, run_config.RunConfig]:
  """The report on a run over four chips; AssertionError unless it is the same, read again."""
  config = common.load(name)
  config.parallel = 'mesh'
  config.execution.scan = True
  config.data.update(batch_size=64, eval_batch_size=64)   # whole routing groups on each chip
  config.mesh.update(mesh)
  run = run_config.resolve(config)
  with tempfile.TemporaryDirectory() as folder:
    report.run(run, SLICE, folder)
    path = pathlib.Path(folder)
    said = json.loads((path / report.FILE).read_text())
    assert json.loads(json.dumps(report.read_again(path))) == said
  return said, run


def check(name: str, tokens: int) -> None:
  """Raises AssertionError with the numbers where the report is not what it must be."""
  said, run = found(name, data=1, expert=CHIPS)
  print(f'That was {name}.\n')
  assert said['chips'] == CHIPS and said['mesh']['expert'] == CHIPS
  assert 0 < said['memory']['total'] < said['memory']['available']
  assert not said['loops_of_unknown_length']
  # XLA leaves out what nobody reads, and turns the smallest matmuls into something else.
  assert 0.9 < said['flops']['executed'] / said['flops']['model'] < 1.05, said['flops']
  kinds = {c['kind'] for c in said['collectives']}
  assert kinds == {'all-to-all', 'all-reduce'}, kinds
  sent = sum(c['sent_bytes'] for c in said['collectives'] if c['kind'] == 'all-to-all')
  D, C = run.model.d_model, 2.0
  slots = run.data.batch_size // CHIPS * tokens * C
  expected = 4 * slots * D * 4 * (CHIPS - 1) / CHIPS
  # What only a matmul reads may be sent as bfloat16, to which a TPU rounds its operands anyhow.
  assert expected / 2 <= sent < expected * SLACK, (sent, expected)
  roof = said['roofline']
  assert 0 < roof['overlapped'] <= roof['serial'] and 0 < roof['mfu_serial'] < 1


def decodes() -> None:
  """Decoding is compiled for the slice too, where the run's data is scored."""
  config = common.load('t5_cmudict')
  config.parallel = 'mesh'
  config.execution.scan = True
  found, _ = report.compile_for(run_config.resolve(config), SLICE)
  print(report.to_text(found), '\n')
  moments = found['memory']['phases']
  assert moments.keys() == {'saving', 'evaluating', 'decoding'}, moments
  assert all(0 < size < found['memory']['available'] for size in moments.values()), moments


def refused() -> None:
  """What does not fit is one line with remedies; a slice that does not exist is one line too."""
  config = common.load('vit_glyphs')
  config.parallel = 'mesh'
  config.execution.scan = True
  config.data.update(batch_size=5 * 2**15, eval_batch_size=64)   # 20 GiB on each chip, of 16
  for slice_name, words in ((SLICE, 'does not fit.*execution.remat=full'),
                            ('v5e:3x17', 'a slice that exists')):
    try:
      report.compile_for(run_config.resolve(config), slice_name)
    except ConfigError as error:
      print(error)
      assert re.search(words, str(error)), error
    else:
      raise AssertionError(f'{slice_name} was not refused')


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  for name, tokens in RUNS.items():
    check(name, tokens)
  decodes()
  refused()
  print('The compiler for TPUs and the report agree.')
  sys.exit(0)
