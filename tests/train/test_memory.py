"""Memory before it is allocated: bytes worked out by hand, refusals, remedies that help.

Refusals and the choice of remedies are tested on forecasts that were recorded from real programs
(RECORDED), so that they compile nothing; each kind of program and of remedy is compiled once.
"""

import dataclasses
import functools
import hashlib
import json
import re
import types

import jax
import numpy as np
import pytest

from moejax.aot import report
from moejax.cluster import processes
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.data.config import TextConfig
from moejax.evaluation.evaluate import DecodeConfig
from moejax.models import t5, vit
from moejax.models.scan import Execution
from moejax.moe.config import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import compiled, malloc, memory, parallel
from moejax.train import config as run_config
from moejax.train.compiled import Programs
from moejax.train.memory import Forecast
from moejax.train.optimizer import OptimizerConfig
from moejax.train.plan import Plan
from moejax.train.validate import without_data
from moejax.trees import stacking

# ViT tiny: D 16, F 32, 2 blocks, 4 patches of 16 pixels, 10 classes.
# Matrices that fsdp splits: 2 blocks x (4 of 16 x 16, 2 of 16 x 32), head 16 x 10.
SPLIT = 2 * (4 * 256 + 2 * 512) + 160
# Patch embedding 16 x 16 and 16, positions 4 x 16, 2 blocks x (biases 4 x 16 + 32 + 16, norms
# 2 x 32), final norm 32, head's bias 10.
WHOLE = 272 + 64 + 2 * (112 + 64) + 32 + 10
LEAVES = 2 + 1 + 2 * (8 + 4 + 4) + 2 + 2   # adamw has a count for each
ROOM = 2**40
MOE = MoEConfig(layers='every_2', num_experts=4, router='top_k', group_size=4)
LARGE = vit.config('tiny', d_model=64, d_ff=256, moe=MOE)
SMALL_TEXT = t5.config('tiny', encoder_layers=1, decoder_layers=1)
NO_ROOM = ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
           'hbm. (Used 200.82G) exceeds available HBM (15.75G).')   # of the compiler for TPUs


def run(batch_size=16, eval_batch_size=0, **changes):
  return run_config.RunConfig(
      model=changes.pop('model', vit.config('tiny')),
      data=DataConfig(batch_size=batch_size, eval_batch_size=eval_batch_size or batch_size),
      **changes)


def text_run(text=(16, 8), beams=1, batch_size=32, model=SMALL_TEXT, **changes):
  """A T5 that is evaluated on 32 examples at once."""
  return run_config.RunConfig(
      model=model, decode=DecodeConfig(beams=beams), data=DataConfig(
          source='cmudict', batch_size=batch_size, eval_batch_size=32, text=TextConfig(*text)),
      **changes)


LONG = {'text': (64, 32), 'microbatches': 8}   # the step takes 4 examples at once, decoding 32


def programs_of(config, devices=1):
  where = parallel.make(config.parallel, config.mesh, jax.devices()[:devices])
  batch = report.batch_shapes(config)
  return Programs(without_data(config, Plan.make(config, 0), where, batch, 'target' in batch))


@functools.cache
def measured(config, devices=1):
  """(programs, forecast) of a run where there is room."""
  programs = programs_of(config, devices)
  return programs, memory.measure(programs, ROOM)


def state_of(config, devices):
  """The forecast of a run that is known without compiling."""
  return memory.measure(programs_of(config, devices), 0)


def beside(program, *inputs):
  """Bytes that a program takes beside some of its arguments."""
  return sum(memory.sizes(program.compiled)) - sum(map(memory.per_device, inputs))


# Bytes by hand.

def test_bytes_on_one_device_are_those_worked_out_by_hand():
  programs = programs_of(run())
  said = memory.check(programs, ROOM)
  assert said.params == 4 * (SPLIT + WHOLE) == 4 * 4986
  assert said.optimizer == 2 * said.params + 4 * LEAVES
  assert said.gradients == said.params
  assert said.saving == said.evaluation == said.decoding == said.teaching == 0 and said.compiled
  # At the very least the batch, and what a block gets and its MLP has inside, 16 x 4 tokens.
  batch, kept = 16 * (64 + 3) * 4, 2 * 16 * 4 * (16 + 32) * 4
  assert batch + kept < said.activations < 40 * (batch + kept)
  # In all what the compiler reports. The state is in and out in one; beside it there are the
  # objective and a pointer to each output.
  stats = programs.train.compiled.memory_analysis()
  inside = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  assert inside < said.needed <= inside + 8 * (len(jax.tree.leaves(programs.shapes)) + 2)
  assert memory.check(programs, said.needed).fits
  frozen = run(optimizer=OptimizerConfig(freeze='re:^(?!head)'))
  assert memory.measure(programs_of(frozen), ROOM).gradients == 4 * 170


@pytest.mark.parametrize('fsdp', [2, 4])
def test_fsdp_divides_matrices_and_their_moments(fsdp):
  said = state_of(run(mesh=MeshConfig(data=-1, fsdp=fsdp)), 4)
  assert said.params == 4 * (SPLIT // fsdp + WHOLE) and not said.compiled
  assert said.optimizer == 2 * said.params + 4 * LEAVES


def test_experts_are_divided_over_their_axis_and_pmap_divides_nothing():
  """The last block's MLP, 2 x 512 and biases, four times over, with a router of 16 x 4."""
  model = vit.config('tiny', moe=dataclasses.replace(MOE, layers='last_1', group_size=8))
  whole, split = (state_of(run(model=model, mesh=MeshConfig(data=-1, expert=n)), 4)
                  for n in (1, 4))
  experts = 4 * (2 * 512 + 32 + 16)
  assert whole.params == 4 * (SPLIT + WHOLE - experts // 4 + experts + 64)
  assert split.params == whole.params - 4 * experts * 3 // 4
  assert state_of(run(parallel='pmap'), 4).params == 4 * (SPLIT + WHOLE)


def test_saving_scanned_blocks_takes_a_copy_of_them():
  said = state_of(run(execution=Execution(scan=True), optimizer=OptimizerConfig(name='adamw')), 1)
  blocks = 2 * (2 * 1024 + 112 + 64)
  # Params and two moments of 2 blocks, and one count for each leaf of each of them.
  assert said.saving == 3 * 4 * blocks + 4 * 2 * 16
  assert said.needed == said.params + said.optimizer + said.saving
  assert f'{said.needed / 2**20:.1f} while saving' in str(said)


# The programs, each compiled.

SAME = {   # an evaluation takes as many examples at once as the step
    'scanned, rematerialised': run(64, execution=Execution(scan=True, remat='full')),
    'experts': run(64, model=vit.config('tiny', moe=dataclasses.replace(
        MOE, router='expert_choice'))),
    'text': text_run(batch_size=128, microbatches=4)}


@pytest.mark.parametrize('name', SAME)
def test_an_evaluation_of_no_more_examples_makes_nothing_that_the_step_does_not(name):
  """Nor does decoding."""
  programs = programs_of(SAME[name])
  said = memory.check(programs, ROOM)
  step, params = said.gradients + said.activations, programs.shapes.params
  assert said.evaluation == said.decoding == 0
  assert 0 < beside(programs.evaluate, params) < step
  assert not programs.run.decodes or 0 < beside(programs.decode, params) < step


def test_an_evaluation_of_more_slots_counts():
  """Sixteen times the slots of training: more than the whole step of a frozen, scanned model."""
  moe = MoEConfig(layers='every_1', num_experts=16, group_size=4, capacity_factor=1.0,
                  eval_capacity_factor=16.0)
  programs = programs_of(run(64, model=vit.config('tiny', d_ff=1024, moe=moe),
                             execution=Execution(scan=True, remat='full'),
                             optimizer=OptimizerConfig(name='sgd', freeze='all_but_head')))
  said = memory.check(programs, ROOM)
  assert said.evaluation == beside(programs.evaluate, programs.shapes.params)
  assert said.evaluation > said.gradients + said.activations
  assert said.needed == said.params + said.optimizer + said.evaluation


def test_an_evaluation_of_more_examples_counts():
  """At least the images and what an MLP has inside, 4 tokens of 32; all in proportion to them."""
  (_, said), (_, twice) = (measured(run(16, n)) for n in (2048, 4096))
  images, inside = 2048 * (64 + 3) * 4, 2048 * 4 * 32 * 4
  assert images + inside < said.evaluation < 8 * (images + inside)
  assert twice.evaluation == pytest.approx(2 * said.evaluation, rel=0.05)
  assert said.needed == said.params + said.optimizer + said.evaluation
  assert f'{said.needed / 2**20:.1f} while evaluating' in str(said)


def test_decoding_with_beams_counts():
  """At least keys and values of a block for each hypothesis: 64 of the source, 32 of the target;
  in proportion to the beams, but for what the encoder takes."""
  (_, four), (_, eight) = (measured(text_run(**LONG, beams=n)) for n in (4, 8))
  keys = 4 * 32 * 2 * (64 + 32) * SMALL_TEXT.num_heads * SMALL_TEXT.d_kv * 4
  assert keys < four.decoding < 5 * keys
  assert 1.6 * four.decoding < eight.decoding < 2.1 * four.decoding
  assert eight.needed == eight.resident + eight.decoding
  assert f'{eight.needed / 2**20:.1f} while decoding' in str(eight)


def test_decoding_scanned_blocks_copies_them_beside_what_single_ones_take():
  model = t5.config('tiny', decoder_layers=1)   # two blocks of the encoder repeat
  programs = programs_of(text_run(model=model, execution=Execution(scan=True)))
  said = memory.check(programs, ROOM)
  stacked = sum(leaf.size * 4 for path, leaf in memory.trees.flatten(programs.shapes.params).items()
                if stacking.is_stacked(path))
  plain = programs_of(text_run(model=model))
  assert said.decoding == stacked + beside(plain.decode, plain.shapes.params)
  assert said.saving > 3 * stacked > 0


# Remedies, on recorded forecasts.

# On 4 CPU devices: the run, bytes available, and by changed settings, in the order of candidates:
# params, optimizer, gradients, activations, saving, evaluation.
RECORDED = {
    'activations': (run(1024), 1_600_000, {
        '': (19944, 40044, 19944, 3115608),
        'execution.scan=True': (19944, 40044, 19944, 4684400, 53504),
        'mesh.fsdp=4': (7176, 14508, 7176, 3145368),
        'execution.scan=True execution.remat=dots': (19944, 40044, 19944, 2088952, 53504),
        'microbatches=4': (19944, 40044, 19944, 909320, 0, 428148),
        'execution.scan=True execution.remat=full': (19944, 40044, 19944, 1560336, 53504),
        'optimizer.name=adafactor': (19944, 20412, 19944, 3118352),
        'data.batch_size=256': (19944, 40044, 19944, 769944, 0, 428148)}),
    'state': (run(8, model=LARGE), 2_900_000, {
        '': (806440, 1613088, 806440, 816572),
        'mesh.expert=4': (409384, 818928, 409384, 287996),
        'mesh.fsdp=4': (214696, 429600, 214696, 1166164),
        'execution.remat=dots': (806440, 1613088, 806440, 816572),
        'microbatches=2': (806440, 1613088, 806440, 1625324, 0, 24740),
        'execution.remat=full': (806440, 1613088, 806440, 816572),
        'optimizer.name=adafactor': (806440, 807064, 806440, 819452),
        'data.batch_size=4': (806440, 1613088, 806440, 816180, 0, 24740)})}
NAMED = {   # what a refusal names: setting, MiB, whether that suffices
    'activations': [('microbatches=4', 0.9, True), ('data.batch_size=256', 0.8, True),
                    ('execution.scan=True execution.remat=full', 1.6, False)],
    'state': [('mesh.expert=4', 1.8, True), ('mesh.fsdp=4', 1.9, True),
              ('optimizer.name=adafactor', 3.1, False)]}


def with_flags(config, flags):
  """The run with settings 'a.b=value c=value', as on a command line."""
  values = {key: json.loads(value) if value.isdigit() else {'True': True}.get(value, value)
            for key, value in (flag.split('=') for flag in flags.split())}
  edited = run_config.config_lib.as_config_dict(config)
  edited.update_from_flattened_dict(values)
  return run_config.resolve(edited)


def parsed(message):
  """[(settings, MiB that the run then takes, whether that suffices)] of a refusal."""
  return [(text.partition(': ')[0].replace('--config.', ''),
           float(re.search(r': ([\d.]+) MiB', text)[1]), 'still too much alone' not in text)
          for text in message.split('in this order: ')[1].split('; --')
          for text in [text if text.startswith('--') else f'--{text}']]


@pytest.mark.parametrize('name', RECORDED)
def test_a_refusal_names_the_cheapest_remedies(name, monkeypatch):
  config, available, recorded = RECORDED[name]
  by_config = {with_flags(config, flags): Forecast(*numbers[:6], compiled=True)
               for flags, numbers in recorded.items()}
  measured = []

  def measure(programs, available):
    measured.append(programs.run.config)
    return dataclasses.replace(by_config[programs.run.config], available=available)
  monkeypatch.setattr(memory, 'measure', measure)
  with pytest.raises(ConfigError, match='^memory: does not fit on a device: params') as error:
    memory.check(programs_of(config, 4), available)
  assert parsed(str(error.value)) == NAMED[name]
  assert measured == list(by_config)   # every one that might help, in the order of its cost


REAL = {   # a run, devices, a remedy: each is compiled
    'evaluating': (run(16, 4096), 1, 'data.eval_batch_size=2048'),
    'decoding': (text_run(**LONG, beams=8), 1, 'decode.beams=1'),
    'experts': (run(8, model=LARGE), 4, 'mesh.expert=4'),
    'fsdp': (run(8, model=LARGE), 4, 'mesh.fsdp=4'),
    'dots': (run(1024), 1, 'execution.scan=True execution.remat=dots'),
    'microbatches': (run(1024), 1, 'microbatches=2'),
    'full': (run(1024), 1, 'execution.scan=True execution.remat=full')}


@pytest.mark.parametrize('name', REAL)
def test_each_kind_of_remedy_lowers_what_the_compiler_reports(name):
  config, devices, flags = REAL[name]
  programs, before = measured(config, devices)
  little = dataclasses.replace(before, available=int(0.7 * before.needed))
  [remedy] = [r for r in memory.candidates(programs, little) if str(r) == ' '.join(
      f'--config.{flag}' for flag in flags.split())]
  changed = memory.changed(programs, remedy.changes)
  assert changed.run.config == with_flags(config, flags)
  assert memory.measure(changed, ROOM).needed < before.needed


def test_a_state_that_is_too_large_is_refused_without_compiling(monkeypatch):
  """Then remedies are measured by the states they leave."""
  monkeypatch.setattr(compiled.Program, 'compiled', None)
  programs = programs_of(run(8, model=LARGE), 4)
  state = sum(map(memory.per_device, (programs.shapes.params, programs.shapes.opt_state)))
  with pytest.raises(ConfigError, match='before gradients and activations') as error:
    memory.check(programs, state // 20)
  named = parsed(str(error.value))
  assert {flags for flags, *_ in named} == {
      'mesh.fsdp=4', 'mesh.expert=4', 'optimizer.name=adafactor'}
  sizes = [mib for _, mib, _ in named]
  assert sizes == sorted(sizes) and all(0 < mib < state / 2**20 for mib in sizes)   # none suffices


def test_under_pmap_a_split_comes_with_the_mesh():
  programs = programs_of(run(8, model=LARGE, parallel='pmap'), 4)
  forecast = Forecast(10, 10, activations=100, compiled=True, available=50)
  assert {'--config.parallel=mesh --config.mesh.expert=4',
          '--config.parallel=mesh --config.mesh.fsdp=4'} <= set(
              map(str, memory.candidates(programs, forecast)))


# How it reads, and what is known of devices.

def gib(x):
  return round(x * 2**30)


def test_how_it_reads():
  said = Forecast(gib(1.2), gib(2.4), gib(1.2), gib(3.1), available=gib(15.7), compiled=True)
  assert str(said) == ('params 1.2 GiB, optimizer 2.4, gradients 1.2, activations 3.1 = 7.9 of '
                       '15.7 GiB')
  little = Forecast(2**20, 2**21, 2**20, 0, available=gib(2), compiled=True)
  assert str(little) == ('params 1.0 MiB, optimizer 2.0, gradients 1.0, activations 0.0 = 4.0 MiB '
                         'of 2.0 GiB')
  assert str(dataclasses.replace(little, available=None)).endswith('= 4.0 MiB')
  taught = Forecast(gib(1), gib(2), gib(1), gib(1), teacher=gib(3), teaching=gib(1), compiled=True)
  assert str(taught) == ('params 1.0 GiB, optimizer 2.0, teacher 3.0, gradients 1.0, activations '
                         '1.0 = 8.0 GiB')
  assert taught.as_dict().items() >= {'teacher': gib(3), 'needed': gib(8)}.items()
  asking = dataclasses.replace(taught, teaching=gib(4), available=gib(16))
  assert str(asking).endswith('= 8.0 GiB, 10.0 while the teacher answers of 16.0 GiB')
  assert not {'teacher', 'teaching'} & said.as_dict().keys()


class Refusing:
  """A program whose compiler runs out of memory, or fails."""

  def __init__(self, message):
    self.message = message

  @property
  def compiled(self):
    raise jax.errors.JaxRuntimeError(self.message)


def refused(available, message=NO_ROOM, phase='train', config=None):
  """What memory.check raises where one program does not compile, and others take nothing."""
  programs = programs_of(config or run())
  owner = programs.teacher if phase == 'logits' else programs
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(memory, 'candidates', lambda *args: [])
    patch.setattr(memory, 'sizes', lambda _: (0, 0, 0))
    patch.setattr(compiled.Program, 'compiled', None)
    vars(owner)[phase] = Refusing(message)
    with pytest.raises((ConfigError, jax.errors.JaxRuntimeError)) as error:
      memory.check(programs, available)
  return str(error.value)


def test_a_compiler_that_finds_no_room_is_a_refusal_with_its_number():
  assert 'activations 200.8 = 200.8 of 15.8 GiB' in refused(gib(15.75))
  for available in (ROOM, None):   # no number: more than there is
    assert 'does not fit' in refused(available, 'RESOURCE_EXHAUSTED: out of memory')
  assert refused(ROOM, 'INTERNAL: a bug') == 'INTERNAL: a bug'
  assert '200.8 while evaluating of 4.0 GiB' in refused(gib(4), phase='evaluate',
                                                        config=run(16, eval_batch_size=64))
  assert '200.8 while decoding of 4.0 GiB' in refused(gib(4), phase='decode',
                                                      config=text_run(**LONG))


def device(platform, stats=None, process=0):
  return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats, process_index=process)


def on(*devices):
  """Devices of train.parallel by their mesh alone."""
  return types.SimpleNamespace(mesh=types.SimpleNamespace(devices=np.array(devices, object)))


@pytest.mark.parametrize('devices, expected', [
    ([device('gpu', {'bytes_limit': 100, 'bytes_in_use': 30}),
      device('gpu', {'bytes_limit': 100, 'bytes_in_use': 10}),
      device('gpu', {'bytes_limit': 1}, process=1)], 70),
    ([device('cpu')] * 4 + [device('cpu', process=1)], 1000 // 4),
    ([device('other')], None)])
def test_what_is_free_on_a_device(devices, expected, monkeypatch):
  monkeypatch.setattr(malloc, 'free', lambda: 1000)
  assert memory.free(on(*devices)) == expected


def test_processes_on_one_host_share_its_memory(monkeypatch):
  """Of three, with 4, 3 and 2 devices, the first and the last are here."""
  devices = on(*(device('cpu', process=n) for n in (0, 0, 0, 0, 1, 1, 1, 2, 2)))
  others = {1: 'another', 2: malloc.host()}
  monkeypatch.setattr(malloc, 'free', lambda: 1200)
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', lambda own: np.stack(
      [own, *(np.frombuffer(hashlib.sha256(others[n].encode()).digest()[:8], np.int32)
              for n in (1, 2))]))
  assert memory.free(devices) == 1200 // (4 + 2)
