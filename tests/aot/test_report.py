"""What --compile_for says of memory: every moment of a run that the forecast knows.

CPU devices stand for the slice; what is read from a TPU's program is not at issue.
"""

import dataclasses
import functools
import json
import types

import jax
import pytest

from moejax.aot import chips, report
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.data.config import TextConfig
from moejax.evaluation.evaluate import DecodeConfig
from moejax.models import t5, vit
from moejax.models.scan import Execution
from moejax.train import config as run_config
from moejax.train import memory, parallel
from moejax.train.optimizer import OptimizerConfig

SLICE = 'v5e:2x4'
READING = {'largest': [], 'flops': {'model': 1.0, 'executed': 1.0}, 'collectives': [],
           'roofline': dict.fromkeys(('compute_bound', 'memory_bound', 'network', 'serial',
                                      'overlapped', 'mfu_serial', 'mfu_overlapped'), 0.5),
           'loops_of_unknown_length': 0}


@pytest.fixture
def slices(monkeypatch):
  """Sets the bytes of a chip."""
  def hold(memory):
    chip = dataclasses.replace(chips.CHIPS['v5e'], memory=memory)
    monkeypatch.setitem(chips.CHIPS, 'v5e', chip)
  monkeypatch.setattr(chips, 'topology', lambda _: types.SimpleNamespace(devices=jax.devices()))
  monkeypatch.setattr(report, '_reading', lambda *args: READING)
  hold(2**40)
  return hold


def scored(**changes):
  """Decodes 8 times the examples that its step takes at once, with beams."""
  return run_config.RunConfig(
      model=t5.config('tiny'), decode=DecodeConfig(beams=changes.pop('beams', 8)), microbatches=8,
      data=DataConfig(source=changes.pop('source', 'cmudict'), batch_size=64, eval_batch_size=64,
                      text=TextConfig(64, 32)), **changes)


def evaluated(eval_batch_size=4096):
  return run_config.RunConfig(
      model=vit.config('tiny'), execution=Execution(scan=True),
      optimizer=OptimizerConfig(name='adamw'),
      data=DataConfig(batch_size=16, eval_batch_size=eval_batch_size))


@functools.cache
def reported(config):
  """The report on a run where there is room; call it before a chip gets less."""
  return report.compile_for(config, SLICE)[0]


def test_phases_are_the_forecasts(slices):
  found = reported(scored())
  devices = parallel.make('mesh', scored().mesh)
  asked, said = found['memory'], memory.check(
      report.programs_of(scored(), devices, decodes=True), None)
  assert asked['total'] == said.resident + said.gradients + said.activations
  assert asked['phases'].keys() == {'evaluating', 'decoding'}   # nothing is scanned
  assert asked['phases']['decoding'] == said.needed > asked['total']
  assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize('config, phase', [(scored, 'decoding'), (evaluated, 'evaluating')])
def test_a_step_that_fits_is_not_enough(config, phase, slices, monkeypatch):
  monkeypatch.setattr(memory, 'candidates', lambda *args: [])
  found = reported(config())
  step, worst = found['memory']['total'], found['memory']['phases'][phase]
  slices((step + worst) // 2)
  with pytest.raises(ConfigError, match=rf'--compile_for: {SLICE}: does not fit on a device: .*'
                                        rf'while {phase} of '):
    report.compile_for(config(), SLICE)


def test_what_is_not_scored_is_not_decoded(slices):
  found = reported(scored(source='stdlib_text'))
  assert 'decoding' not in found['memory']['phases']


def test_the_report_names_them(slices, capsys):
  assert report.run(evaluated(), SLICE) == 0
  memory = reported(evaluated())['memory']
  assert memory['phases'].keys() == {'saving', 'evaluating'}
  assert f'{memory["total"] / chips.GIB:.2f} GiB of 1024.00 GiB in the step: ' in (
      said := capsys.readouterr().out)
  assert (f'\n  else       {memory["phases"]["saving"] / chips.GIB:.2f} GiB while saving, '
          f'{memory["phases"]["evaluating"] / chips.GIB:.2f} GiB while evaluating, no more than '
          'the step at any other moment\n') in said
