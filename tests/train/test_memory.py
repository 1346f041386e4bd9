"""Memory before it is allocated: bytes worked out by hand, refusals, remedies that help."""

import dataclasses
import hashlib
import json
import logging
import re
import types

import jax
import numpy as np
import pytest

from configs.pretrain import vit_glyphs
from moejax.cluster import processes
from moejax.config import ConfigError
from moejax.data import DataConfig
from moejax.models import vit
from moejax.models.scan import Execution
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import loop, malloc, parallel, remedies
from moejax.train import memory as forecast
from moejax.train.compiled import Step
from moejax.train.optimizer import OptimizerConfig
from moejax.train.plan import Plan

# ViT tiny: D 16, F 32, 2 blocks, 4 patches of 16 pixels, 10 classes.
# Matrices that fsdp splits: 2 blocks x (4 of 16 x 16, 2 of 16 x 32), head 16 x 10.
SPLIT = 2 * (4 * 256 + 2 * 512) + 160
# Patch embedding 16 x 16 and 16, positions 4 x 16, 2 blocks x (biases 4 x 16 + 32 + 16, norms
# 2 x 32), final norm 32, head's bias 10.
WHOLE = 272 + 64 + 2 * (112 + 64) + 32 + 10
LEAVES = 2 + 1 + 2 * (8 + 4 + 4) + 2 + 2   # adamw has a count for each
ROOM = 2**40
NO_ROOM = ('RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
           'hbm. (Used 200.82G) exceeds available HBM (15.75G).')   # the words of TPUs' compiler


def run(batch_size=16, eval_batch_size=0, **changes):
  return run_config.RunConfig(
      model=changes.pop('model', vit.config('tiny')),
      data=DataConfig(batch_size=batch_size, eval_batch_size=eval_batch_size or batch_size),
      **changes)


def step_of(config, devices=None):
  side = config.model.image_size
  shape = lambda dtype, *dims: jax.ShapeDtypeStruct((1, *dims), dtype)
  batch = {'image': shape(np.float32, side, side, 1), 'label': shape(np.int32),
           'weight': shape(np.float32), 'index': shape(np.int32)}
  return Step.of(config, Plan.make(config, 0),
                 parallel.make(config.parallel, config.mesh, devices), batch)


def found(config, devices=None, available=ROOM):
  return forecast.compile_step(step_of(config, devices), available)[1]


def test_bytes_on_one_device_are_those_worked_out_by_hand():
  said = found(run(), jax.devices()[:1])
  assert said.params == 4 * (SPLIT + WHOLE) == 4 * 4986
  assert said.optimizer == 2 * said.params + 4 * LEAVES
  assert said.gradients == said.params
  assert said.saving == 0 and said.compiled
  # At the very least the batch, and what a block gets and its MLP has inside, 16 x 4 tokens.
  batch, kept = 16 * (64 + 3) * 4, 2 * 16 * 4 * (16 + 32) * 4
  assert batch + kept < said.activations < 40 * (batch + kept)


@pytest.mark.parametrize('fsdp', [2, 8])
def test_fsdp_divides_matrices_and_their_slots(fsdp):
  said = found(run(mesh=MeshConfig(data=-1, fsdp=fsdp)))
  assert said.params == 4 * (SPLIT // fsdp + WHOLE)
  assert said.optimizer == 2 * said.params + 4 * LEAVES


def test_experts_are_divided_over_their_axis():
  """The last block's MLP, 2 x 512 and biases, four times over, with a router of 16 x 4."""
  moe = MoEConfig(layers='last_1', num_experts=4, router='top_k', group_size=8)
  model = vit.config('tiny', moe=moe)
  whole, split = (found(run(model=model, mesh=MeshConfig(data=-1, expert=n))) for n in (1, 4))
  experts = 4 * (2 * 512 + 32 + 16)
  assert whole.params == 4 * (SPLIT + WHOLE - experts // 4 + experts + 64)
  assert split.params == whole.params - 4 * experts * 3 // 4


def test_pmap_holds_everything_on_each_device():
  said = found(run(parallel='pmap'))
  assert said.params == 4 * (SPLIT + WHOLE)
  assert said.activations < found(run(), jax.devices()[:1]).activations   # an eighth of the batch


def test_what_stands_still_has_no_gradient():
  said = found(run(optimizer=OptimizerConfig(freeze='re:^(?!head)')), jax.devices()[:1])
  assert said.gradients == 4 * 170


def test_activations_follow_the_batch_and_microbatches():
  one = jax.devices()[:1]
  small, large = found(run(128), one), found(run(256), one)
  assert large.activations == pytest.approx(2 * small.activations, rel=0.05)
  parts = found(run(256, microbatches=4), one)
  assert large.needed / 4 < parts.needed < large.needed / 2


def test_the_sum_is_what_the_compiler_says():
  step = step_of(run())
  compiled, said = forecast.compile_step(step, ROOM)
  stats = compiled.memory_analysis()
  # The state is in and out in one; beside it there are the objective and a pointer to each output.
  inside = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  assert inside < said.needed <= inside + 8 * (len(jax.tree.leaves(step.shapes)) + 2)


def test_saving_scanned_blocks_takes_a_copy_of_them():
  said = found(run(1, execution=Execution(scan=True), optimizer=OptimizerConfig(name='adamw')),
               jax.devices()[:1])
  blocks = 2 * (2 * 1024 + 112 + 64)
  # Params and two slots of 2 blocks, and one count for each leaf of each of them.
  assert said.saving == 3 * 4 * blocks + 4 * 2 * 16
  more = dataclasses.replace(said, saving=said.gradients + said.activations + 2**20)
  assert more.needed == said.params + said.optimizer + more.saving
  assert f'{more.needed / 2**20:.1f} while saving' in str(more)


SAME = {   # configurations whose evaluation takes as many examples at once as their step
    'plain': run(64), 'one device': run(64, mesh=MeshConfig(data=1)),
    'pmap': run(64, parallel='pmap'), 'microbatches': run(128, eval_batch_size=32, microbatches=4),
    'scanned, rematerialised': run(64, execution=Execution(scan=True, remat='full')),
    'frozen': run(64, optimizer=OptimizerConfig(freeze='re:^(?!head)')),
    'experts': run(64, model=vit.config('tiny', moe=MoEConfig(
        layers='every_2', num_experts=4, router='expert_choice', group_size=4)))}


@pytest.mark.parametrize('name', SAME)
def test_an_evaluation_of_no_more_examples_makes_nothing_that_the_step_does_not(name):
  step = step_of(SAME[name], jax.devices()[:1] if SAME[name].mesh.data == 1 else None)
  said = forecast.compile_step(step, ROOM)[1]
  assert said.evaluation == 0
  assert 0 < forecast._evaluation(step, 0) < said.gradients + said.activations


def test_a_step_of_which_no_data_is_at_hand_checks_the_optimizers_groups():
  with pytest.raises(ConfigError, match='optimizer.freeze: got .re:no_such'):
    step_of(run(optimizer=OptimizerConfig(freeze='re:no_such')), jax.devices()[:1])


def test_an_evaluation_of_more_slots_counts():
  """Sixteen times the slots of training: more than the whole step of a frozen, scanned model."""
  moe = MoEConfig(layers='every_1', num_experts=16, group_size=4, capacity_factor=1.0,
                  eval_capacity_factor=16.0)
  config = run(64, model=vit.config('tiny', d_ff=1024, moe=moe),
               execution=Execution(scan=True, remat='full'),
               optimizer=OptimizerConfig(name='sgd', freeze='all_but_head'))
  step = step_of(config, jax.devices()[:1])
  said = forecast.compile_step(step, ROOM)[1]
  assert said.evaluation == forecast._evaluation(step, 0) > said.gradients + said.activations
  assert said.needed == said.params + said.optimizer + said.evaluation


def test_an_evaluation_of_more_examples_counts():
  """At least the images and what an MLP has inside, 4 tokens of 32; all in proportion to them."""
  one = jax.devices()[:1]
  said, twice = (found(run(16, eval_batch_size=n), one) for n in (2048, 4096))
  images, inside = 2048 * (64 + 3) * 4, 2048 * 4 * 32 * 4
  assert images + inside < said.evaluation < 8 * (images + inside)
  assert twice.evaluation == pytest.approx(2 * said.evaluation, rel=0.05)
  assert said.needed == said.params + said.optimizer + said.evaluation
  assert f'{said.needed / 2**20:.1f} while evaluating' in str(said)


def test_too_large_an_evaluation_is_refused_with_a_batch_that_fits():
  config = run(16, eval_batch_size=4096)
  before, without = (found(run(16, eval_batch_size=n)) for n in (4096, 16))
  limit = (before.needed + without.needed) // 2
  with pytest.raises(ConfigError, match='while evaluating') as error:
    found(config, available=limit)
  flags, mib = parsed(str(error.value))[0]
  assert list(flags) == ['data.eval_batch_size'] and mib * 2**20 <= limit
  after = found(run(16, eval_batch_size=int(flags['data.eval_batch_size'])))
  assert mib == pytest.approx(after.needed / 2**20, abs=0.051)


def test_a_compiler_without_room_for_an_evaluation_is_a_refusal(monkeypatch):
  monkeypatch.setattr(remedies, 'WANTED', 0)
  step = step_of(run(16, eval_batch_size=64))
  monkeypatch.setattr(step.devices, 'lower_eval', lambda *args: Refusing(NO_ROOM))
  with pytest.raises(ConfigError, match=r'200\.8 while evaluating of 4\.0 GiB'):
    forecast.compile_step(step, 4 * 2**30)


def test_how_it_reads():
  gib = lambda x: round(x * 2**30)
  said = forecast.Forecast(gib(1.2), gib(2.4), gib(1.2), gib(3.1), available=gib(15.7),
                           compiled=True)
  assert str(said) == ('params 1.2 GiB, optimizer 2.4, gradients 1.2, activations 3.1 = 7.9 of '
                       '15.7 GiB')
  small = forecast.Forecast(2**20, 2**21, 2**20, 0, available=gib(2), compiled=True)
  assert str(small) == ('params 1.0 MiB, optimizer 2.0, gradients 1.0, activations 0.0 = 4.0 MiB '
                        'of 2.0 GiB')
  assert str(dataclasses.replace(small, available=None)).endswith('= 4.0 MiB')


def test_a_tight_fit_is_no_error():
  step = step_of(run(), jax.devices()[:1])
  needed = forecast.compile_step(step, None)[1].needed
  assert forecast.compile_step(step, needed)[1].fits
  with pytest.raises(ConfigError, match='does not fit'):
    forecast.compile_step(step, needed - 1)


FLAG = re.compile(r'--config\.([\w.]+)=(\S+?)(?=[ :])')


def parsed(message):
  """[({key: value as typed}, MiB that the run then takes)] of a refusal."""
  return [(dict(FLAG.findall(line + ':')), float(re.search(r': ([\d.]+) MiB', line)[1]))
          for line in message.split('in this order: ')[1].split('; --')
          for line in [line if line.startswith('--') else f'--{line}']]


def with_flags(config, flags):
  flat = {key: json.loads(value.lower()) if value.lower() in ('true', 'false') or value.isdigit()
          else value for key, value in flags.items()}
  edited = run_config.config_lib.as_config_dict(config)
  edited.update_from_flattened_dict(flat)
  return run_config.resolve(edited)


MOE = MoEConfig(layers='every_2', num_experts=4, router='top_k', group_size=4)
LARGE = vit.config('tiny', d_model=64, d_ff=256, moe=MOE)
CASES = {   # config, part of what it needs that there is, keys that must be among the remedies
    'activations': (run(1024), 0.5, {'microbatches'}),
    'state': (run(8, model=LARGE), 0.7, {'mesh.fsdp', 'mesh.expert'}),
    'pmap': (run(8, model=LARGE, parallel='pmap'), 0.7, {'mesh.fsdp', 'parallel'}),
}


@pytest.mark.parametrize('name', CASES)
def test_each_remedy_that_is_named_lowers_the_forecast(name):
  config, part, keys = CASES[name]
  before = found(config)
  limit = int(before.needed * part)
  with pytest.raises(ConfigError) as error:
    found(config, available=limit)
  named = parsed(str(error.value))
  assert len(named) == 3 and keys <= {key for flags, _ in named for key in flags}
  for flags, mib in named:
    after = found(with_flags(config, flags))
    assert after.needed < before.needed
    assert mib == pytest.approx(after.needed / 2**20, abs=0.051)
  assert ('still too much' in str(error.value)) == any(mib * 2**20 > limit for _, mib in named)


def test_a_state_that_is_too_large_is_refused_without_compiling(monkeypatch):
  """Then remedies are told by the states they leave."""
  monkeypatch.setattr(jax.stages.Lowered, 'compile', None)
  config = run(8, model=LARGE)
  step = step_of(config)
  state = forecast.per_device(step.shapes.params) + forecast.per_device(step.shapes.opt_state)
  with pytest.raises(ConfigError, match='before gradients and activations') as error:
    forecast.compile_step(step, state // 20)
  named = parsed(str(error.value))
  assert {key for flags, _ in named for key in flags} == {
      'mesh.fsdp', 'mesh.expert', 'optimizer.name'}
  assert [mib for _, mib in named] == sorted(mib for _, mib in named)   # none suffices
  assert all(0 < mib < state / 2**20 for _, mib in named)


def test_remedies_that_suffice_come_first_and_in_the_order_of_their_cost():
  def measured(number):
    return dataclasses.replace(forecast.Forecast(10, 10, compiled=True, available=50),
                               activations=number)
  step = step_of(run(1024))
  before = measured(100)

  def measure(changed):
    if changed.config.mesh.fsdp > 1:
      return measured(25)
    if changed.config.execution.remat == 'full':
      return measured(5)
    if changed.config.microbatches > 1:
      return measured(60)
    return measured(28 if changed.config.data.batch_size < 1024 else 100)
  named = [str(remedy) for remedy, _ in remedies.cheapest(step, before, measure)]
  assert named == ['--config.mesh.fsdp=8', '--config.execution.scan=True '
                              '--config.execution.remat=full', '--config.data.batch_size=128']


def test_a_refusal_names_the_numbers_and_leaves_nothing(tmp_path, monkeypatch, capsys):
  config = vit_glyphs.get_config('runlocal')
  config.model.update(num_layers=2, d_model=16, d_ff=32)
  config.data.batch_size = 64
  monkeypatch.setattr(forecast, 'free', lambda devices: 300_000)
  monkeypatch.setattr(remedies, 'WANTED', 0)
  with pytest.raises(ConfigError) as error:
    loop.run(run_config.resolve(config), str(tmp_path / 'run'))
  assert re.match(r'memory: does not fit on a device: params 0\.3 MiB, optimizer .* of 0\.3 MiB, '
                  'before gradients and activations', str(error.value))
  assert not (tmp_path / 'run').exists()
  assert 'Compiling what would fit' in capsys.readouterr().err


def test_a_run_says_it_once_and_compiles_its_step_once(tmp_path, capsys, caplog, monkeypatch):
  monkeypatch.setattr(forecast, 'free', lambda devices: ROOM)
  config = vit_glyphs.get_config('runlocal')
  config.model.update(num_layers=1, d_model=16, d_ff=32)
  config.data.eval_batch_size = 2 * config.data.batch_size
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    assert loop.run(run_config.resolve(config), str(tmp_path / 'run')) == 0
  lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith('memory per device: ')]
  assert len(lines) == 1
  said = json.loads((tmp_path / 'run/run.json').read_text())['memory']
  assert f'= {forecast.size(said["needed"])} of ' in lines[0]
  assert said['needed'] == sum(said[k] for k in ('params', 'optimizer', 'gradients', 'activations'))
  for step in ('train_step', 'eval_step'):
    found = [x for x in caplog.messages if re.search(rf'XLA compilation of jit\({step}\)', x)]
    assert len(found) == 1


class Refusing:
  """A lowered step whose compiler runs out of memory."""

  def __init__(self, message):
    self.message = message

  def compile(self):
    raise jax.errors.JaxRuntimeError(self.message)


def test_a_compiler_that_finds_no_room_is_a_refusal_with_its_number(monkeypatch):
  monkeypatch.setattr(remedies, 'WANTED', 0)
  step = step_of(run(), jax.devices()[:1])
  with pytest.raises(ConfigError, match=r'activations 200\.8 = 200\.8 of 15\.8 GiB'):
    forecast.compile_step(step, int(15.75 * 2**30), lowered=Refusing(NO_ROOM))
  for available in (ROOM, None):   # no number: more than there is
    with pytest.raises(ConfigError, match='does not fit'):
      forecast.compile_step(step, available, lowered=Refusing('RESOURCE_EXHAUSTED: out of memory'))
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    forecast.compile_step(step, ROOM, lowered=Refusing('INTERNAL: a bug'))


def device(platform, stats=None, process=0):
  return types.SimpleNamespace(platform=platform, memory_stats=lambda: stats, process_index=process)


@pytest.mark.parametrize('devices, expected', [
    ([device('gpu', {'bytes_limit': 100, 'bytes_in_use': 30}),
      device('gpu', {'bytes_limit': 100, 'bytes_in_use': 10}),
      device('gpu', {'bytes_limit': 1}, process=1)], 70),
    ([device('cpu')] * 4 + [device('cpu', process=1)], 1000 // 4),
    ([device('other')], None)])
def test_what_is_free_on_a_device(devices, expected, monkeypatch):
  monkeypatch.setattr(malloc, 'free', lambda: 1000)
  mesh = types.SimpleNamespace(devices=np.array(devices, object))
  assert forecast.free(types.SimpleNamespace(mesh=mesh)) == expected


def test_processes_on_one_host_share_its_memory(monkeypatch):
  """Of three, with 4, 3 and 2 devices, the first and the last are here."""
  mesh = types.SimpleNamespace(devices=np.array(
      [device('cpu', process=n) for n in (0, 0, 0, 0, 1, 1, 1, 2, 2)], object))
  others = {1: 'another', 2: malloc.host()}
  monkeypatch.setattr(malloc, 'free', lambda: 1200)
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  monkeypatch.setattr(processes.multihost_utils, 'process_allgather', lambda own: np.stack(
      [own, *(np.frombuffer(hashlib.sha256(others[n].encode()).digest()[:8], np.int32)
              for n in (1, 2))]))
  assert forecast.free(types.SimpleNamespace(mesh=mesh)) == 1200 // (4 + 2)


@pytest.mark.parametrize('boot, expected', [(None, 'me '), ('1f-e2\n', 'me 1f-e2')])
def test_a_host_is_known_by_its_name_and_when_it_was_booted(boot, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(malloc, 'BOOT', tmp_path / 'boot_id')
  monkeypatch.setattr(malloc.socket, 'gethostname', lambda: 'me')
  if boot:
    (tmp_path / 'boot_id').write_text(boot)
  assert malloc.host() == expected


@pytest.mark.parametrize('files, expected', [
    ({}, 4 * 2**20),
    ({'memory.max': 'max', 'memory.current': '5', 'memory.stat': 'inactive_file 1'}, 4 * 2**20),
    ({'memory.max': '3000', 'memory.current': '1000',
      'memory.stat': 'anon 7\ninactive_file 200\nactive_file 9'}, 2200),
    ({'memory/memory.limit_in_bytes': '3000', 'memory/memory.usage_in_bytes': '2000',
      'memory/memory.stat': 'inactive_file 1\ntotal_inactive_file 300'}, 1300)])
def test_what_is_free_on_the_host_or_in_its_container(files, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(malloc, 'MEMINFO', tmp_path / 'meminfo')
  monkeypatch.setattr(malloc, 'CGROUPS', tmp_path)
  assert malloc.free() is None
  (tmp_path / 'meminfo').write_text('MemTotal: 9000 kB\nMemAvailable:    4096 kB\n')
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text + '\n')
  assert malloc.free() == expected
