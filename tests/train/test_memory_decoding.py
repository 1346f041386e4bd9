"""Memory that decoding takes, known before it is allocated: beside what the train step takes."""

import re

import jax
import pytest

from moejax import trees
from moejax.aot import report
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.data.config import TextConfig
from moejax.evaluation.evaluate import DecodeConfig
from moejax.models import t5
from moejax.models.scan import Execution
from moejax.train import config as run_config
from moejax.train import memory, parallel, remedies
from moejax.train.compiled import Step
from moejax.train.plan import Plan
from moejax.trees import stacking

TINY = t5.config('tiny')
ROOM = 2**40
LONG = {'text': (64, 32), 'microbatches': 8}   # the step takes 4 examples at once, decoding 32


def decoding(available=ROOM, text=(16, 8), beams=1, batch_size=32, decodes=True, **changes):
  """The step of a run of T5 tiny on one device, evaluated on 32 examples at once; its forecast."""
  config = run_config.RunConfig(
      model=TINY, decode=DecodeConfig(beams=beams), data=DataConfig(
          source='cmudict', batch_size=batch_size, eval_batch_size=32, text=TextConfig(*text)),
      **changes)
  step = Step.of(config, Plan.make(config, 0),
                 parallel.make('mesh', config.mesh, jax.devices()[:1]),
                 report.batch_shapes(config), decodes)
  return step, memory.compile_step(step, available)[1]


@pytest.mark.parametrize('sizes', [{}, {'text': (64, 8)}, {'text': (8, 64)}, {
    'batch_size': 128, 'microbatches': 4}])
def test_decoding_as_many_as_the_step_takes_makes_nothing_that_it_does_not(sizes):
  step, said = decoding(**sizes)
  assert said.decoding == 0
  assert 0 < memory._decoding(step, 0) < said.gradients + said.activations


def test_a_run_that_does_not_decode_forecasts_none():
  assert decoding(**LONG, beams=4, decodes=False)[1].decoding == 0


def test_decoding_with_beams_counts():
  """At least keys and values of 2 blocks for each hypothesis: 64 of the source, 32 of the target;
  in proportion to the beams, but for what the encoder takes."""
  four, eight = (decoding(**LONG, beams=n)[1] for n in (4, 8))
  keys = 4 * 32 * 2 * 2 * (64 + 32) * TINY.num_heads * TINY.d_kv * 4
  assert keys < four.decoding < 4 * keys
  assert 1.7 * four.decoding < eight.decoding < 2.1 * four.decoding
  assert eight.needed == eight.params + eight.optimizer + eight.decoding
  assert f'{eight.needed / 2**20:.1f} while decoding' in str(eight)


@pytest.mark.parametrize('execution', [Execution(scan=True), Execution(remat='full')])
def test_decoding_of_scanned_or_rematerialised_blocks_is_compiled(execution):
  """Scanned ones are copied as single ones, beside what the same program takes without a scan."""
  step, said = decoding(execution=execution)
  stacked = sum(leaf.size * 4 for path, leaf in trees.flatten(step.shapes.params).items()
                if stacking.is_stacked(path))
  assert (stacked > 0) == execution.scan
  plain = memory._decoding(decoding()[0], 0)
  assert plain > 0 and said.decoding == plain + stacked


def test_too_much_decoding_is_refused_with_a_batch_or_a_beam_that_fits():
  before, without = (decoding(**LONG, beams=n)[1] for n in (8, 1))
  limit = (before.needed + without.needed) // 2
  with pytest.raises(ConfigError, match='while decoding') as error:
    decoding(limit, **LONG, beams=8)
  named = re.findall(r'--config\.([\w.]+)=(\d+): ([\d.]+) MiB', str(error.value))[:2]
  assert named[0][0] == 'data.eval_batch_size' and named[1][:2] == ('decode.beams', '1')
  assert all(float(mib) * 2**20 <= limit + 0.05 * 2**20 for *_, mib in named)


def test_a_compiler_without_room_for_decoding_is_a_refusal(monkeypatch):
  class Refusing:
    def compile(self):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 200.82G) exceeds available HBM (4G).')
  monkeypatch.setattr(remedies, 'WANTED', 0)
  monkeypatch.setattr(parallel.MeshParallel, 'lower_eval', lambda *args: Refusing())
  with pytest.raises(ConfigError, match=r'200\.8 while decoding of 4\.0 GiB'):
    decoding(4 * 2**30, execution=Execution(remat='full'))
