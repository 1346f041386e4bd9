"""Cells on a GPU: what they are, what stands beside their time, resuming, a tiny one for real."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.benchmarks import gpu_step, gpu_table, step_floor
from moejax import flops
from moejax.config import ConfigError
from moejax.train import metrics

H100 = 'gpu: NVIDIA H100 80GB HBM3'
SMOKE = gpu_step.SCALES['smoke']


def lengths(config):
  text = config.data.text
  return () if config.model.family == 'vit' else (text.encoder_length, text.decoder_length)


@pytest.mark.parametrize('scale', gpu_step.SCALES)
def test_the_parts_of_a_step_are_all_its_flops(scale):
  scale = gpu_step.SCALES[scale]
  for cell in gpu_step.cells(scale):
    config = cell.config(scale, 16)
    found = step_floor.parts(config.model, 16, *lengths(config))
    assert sum(p.flops for p in found) == flops.forward_flops(config.model, 16, *lengths(config))


def test_cells_are_what_they_are_called():
  found = {cell.name: cell for cell in gpu_step.cells(gpu_step.SCALES['gpu'])}
  assert len(found) == 2 * 9 + 2 * 18   # dense, and 2 sizes of 4 routings; ViT both ways
  config = found['t5_large-expert_choice-e32'].config(gpu_step.SCALES['gpu'], 64)
  assert config.model.encoder_moe.router == 'expert_choice'
  assert config.model.decoder_moe.router == 'top_k'   # an expert must not see later tokens
  config = found['vit_b16-dropless-e8-fused'].config(gpu_step.SCALES['gpu'], 64)
  assert (config.model.moe.dispatch, config.model.moe.k, config.model.moe.num_experts) == (
      'grouped', 2, 8)
  assert config.execution.attention == 'fused' and config.model.dtype == 'bfloat16'
  assert config.execution.remat == 'none' and config.mesh.expert == 1


@pytest.mark.parametrize('part, wanted', [
    (step_floor.Matmul(5, 3, 8, 16, 32), [(3, 8, 32), (3, 8, 16), (3, 16, 32)]),
    (step_floor.Attend(5, 2, 6, 4, 3, 8, bias=True, mask=True),
     [(2, 6, 3, 8), (2, 6, 3, 8), (2, 4, 3, 8), (2, 4, 3, 8), (1, 3, 6, 4)]),
    (step_floor.Attend(5, 2, 6, 6, 3, 8), [(2, 6, 3, 8)] * 4)])
@pytest.mark.parametrize('fused', [False, True])
def test_parts_are_timed_in_both_passes_as_often_as_they_occur(part, wanted, fused, monkeypatch):
  seen, kernel = [], []
  real = step_floor.attention.fused
  monkeypatch.setattr(step_floor.attention, 'fused', lambda *qkv: kernel.append(1) or real(*qkv))

  def per_call(run, **_):
    seen.extend(x.shape for x in jax.tree.leaves(run()))
    return [1.0, 2.0, 3.0]
  monkeypatch.setattr(step_floor, 'per_call', per_call)
  assert step_floor.seconds(part, fused) == 5 * 2.0
  assert seen == wanted   # the value, and the gradient of each operand
  assert bool(kernel) == (fused and isinstance(part, step_floor.Attend) and not part.bias)


def test_seconds_of_a_call_are_those_of_a_round_over_its_calls(monkeypatch):
  """A call takes 0.25 s, the first, which compiles, 10 s more: 4 calls a round of one second."""
  clock, calls = [0.0], []

  def run():
    clock[0] += 0.25 if calls else 10.25
    calls.append(1)
    return 0.0
  monkeypatch.setattr(step_floor.time, 'perf_counter', lambda: clock[0])
  assert step_floor.per_call(run, rounds=3, least=1.0) == [0.25] * 3
  assert len(calls) == 1 + 1 + 3 * 4


def test_a_synthetic_batch_is_one_that_the_data_could_make():
  cell = gpu_step.Cell('t5_base', 'dense', 0, 'plain')
  batch = gpu_step.synthetic(cell.config(SMOKE, 16))
  assert batch['encoder_input'].shape == (16, 114) and batch['target'].shape == (16, 32)
  assert batch['encoder_input'].min() > 0 and (batch['weight'] == 1).all()
  np.testing.assert_array_equal(batch['index'], np.arange(16))


def test_a_random_state_is_one_that_the_step_takes():
  cell = gpu_step.Cell('vit_b16', 'expert_choice', 4, 'plain')
  compiled, step, _ = gpu_step._largest(cell, SMOKE)
  state = gpu_step.random_state(step.shapes)
  same = lambda s, x: (s.shape, s.dtype, s.sharding) == (x.shape, x.dtype, x.sharding)
  assert jax.tree.all(jax.tree.map(same, step.shapes, state))
  assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(state.params))
  after, _ = compiled(state, step.devices.put(gpu_step.synthetic(step.config)))
  assert int(after.step) == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.params))


DENSE = gpu_step.Cell('vit_b16', 'dense', 0, 'plain')


def line(cell, device=H100, **changes):
  return {'key': cell.key(SMOKE, device), 'command': 'c', 'name': cell.name, 'model': cell.model,
          'routing': cell.routing, 'experts': cell.experts, 'attention': cell.attention,
          'batch_size': 100, 'parameters': 86_000_000, 'flops': 989e12 * 0.05, 'seconds': 0.1,
          'matmuls': 0.07, 'attention_alone': 0.01, 'peak_bytes': 3 * 2**30,
          'forecast': dict.fromkeys(('params', 'optimizer', 'gradients', 'activations'), 2**30),
          'device': device, 'versions': {'jax': '1.2'}, **changes}


def test_the_page_has_the_numbers_and_marks_what_is_above_the_limit():
  dense, *upcycled = [cell for cell in gpu_step.cells(SMOKE) if cell.model == 'vit_b16'][:3]
  inside = {'products': 0.065, 'other': 0.0215, 'launched': 1700.0}
  lines = [line(upcycled[0], seconds=0.12, batch_size=50),
           line(upcycled[1], seconds=0.091, kernels=inside, other_bytes=75.4e9),
           line(dense), line(dense, 'cpu: cpu', peak_bytes=None)]
  text = gpu_step.page(lines)
  rows = {}
  for row in text.splitlines():
    if row.startswith('| vit'):
      name, *cells = [c.strip() for c in row.split('|')[1:-1]]
      rows.setdefault(name, []).append(cells)
  on_cpu, on_gpu = rows[dense.name]
  assert on_gpu == ['86 M', '100', '100.0', '70.0', '10.0', '1.25', '–', '–', '–', '0.50', '1,000',
                    '1.00', '3.0', '4.0']
  assert on_cpu[9] == on_cpu[-2] == '–'
  (first,), (second,) = rows[upcycled[0].name], rows[upcycled[1].name]
  assert first[5] == '1.50!' and first[11] == '2.40'   # 2.4 ms an example, and 1 ms
  assert second[5:9] == ['1.14', '65.0', '21.5', '75']


@pytest.fixture
def children(monkeypatch):
  """Flags that cells were measured with, on a device that can be changed; 'top_2' cannot be."""
  class Children(list):
    device = H100
  found = Children()
  found.prepared = []
  by_name = {cell.name: cell for cell in gpu_step.cells(SMOKE)}

  def child(*flags, cache=''):
    if flags == ('--device',):
      return found.device
    if flags[0].startswith('--prepare='):
      found.prepared.append(flags[0].removeprefix('--prepare='))
      return 'null'
    name = flags[0].removeprefix('--cell=')
    found.append(name)
    if 'top_2' in name:
      raise ConfigError('out of memory')
    whole = line(by_name[name], found.device)
    return json.dumps({k: v for k, v in whole.items() if k not in ('key', 'command')})
  monkeypatch.setattr(gpu_step, '_child', child)
  return found


def test_what_is_there_is_not_measured_again_and_what_fails_is_told(children, tmp_path, capsys):
  flags = ['--scale=smoke', '--models=t5_base', f'--results={tmp_path}']
  assert gpu_step.main(flags) == 1 and len(children) == 5
  assert 't5_base-top_2-e4: out of memory' in capsys.readouterr().err
  assert gpu_step.main(flags) == 1 and children[5:] == ['t5_base-top_2-e4']
  children.device = 'gpu: another'
  assert gpu_step.main([*flags, '--only=dense']) == 0 and children[6:] == ['t5_base-dense']
  assert len(metrics.read_lines(tmp_path / gpu_step.FILE)) == 5   # one per cell and device
  assert '## gpu: another' in (tmp_path / gpu_step.PAGE).read_text()


def test_a_few_cells_are_compiled_side_by_side_before_they_are_measured(children, tmp_path,
                                                                         monkeypatch):
  monkeypatch.setattr(gpu_step, 'TOGETHER', 2)
  both = [children.prepared, children]
  seen = []
  monkeypatch.setattr(gpu_step, 'keep', lambda line, _: seen.append([len(x) for x in both]))
  gpu_step.main(['--scale=smoke', '--models=vit_b16', f'--results={tmp_path}'])
  assert sorted(children.prepared) == sorted(children)
  assert seen[:2] == [[2, 1], [2, 2]] and seen[-1] == [6, 6]


def test_cells_that_were_prepared_compile_nothing_large(tmp_path):
  """What is compiled side by side is what is then run: matmuls, attentions, the step."""
  found = {}
  for flag in ('--prepare', '--cell'):
    before = set(tmp_path.glob('*-cache'))
    gpu_step._child(f'{flag}=t5_base-top_2-e4', '--scale=smoke', cache=str(tmp_path))
    found[flag] = {path.name.split('-')[0] for path in set(tmp_path.glob('*-cache')) - before}
  assert {'jit_train_step', 'jit_both'} <= found['--prepare']
  assert not {'jit_train_step', 'jit_both'} & found['--cell'] and found['--cell']


def test_a_tiny_scale_replaces_nothing_that_was_measured(children, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  real = line(DENSE, command='c --scale=gpu')
  monkeypatch.setattr(gpu_step, 'FOLDER', tmp_path)
  (tmp_path / gpu_step.FILE).write_text(json.dumps(real) + '\n')
  assert gpu_step.main(['--scale=smoke', '--models=vit_b16', '--only=dense']) == 0
  assert metrics.read_lines(tmp_path / gpu_step.FILE) == [real]
  assert not (tmp_path / gpu_step.PAGE).exists()
  assert len(metrics.read_lines(tmp_path / 'runs/smoke_gpu' / gpu_step.FILE)) == 2
  gpu_step.main(['--scale=smoke', '--models=vit_b16', '--only=dense', f'--results={tmp_path}'])
  assert metrics.read_lines(tmp_path / gpu_step.FILE)[0] == real


def test_another_version_of_jax_is_measured_again(children, tmp_path, monkeypatch):
  flags = ['--scale=smoke', '--models=t5_base', '--only=dense', f'--results={tmp_path}']
  assert gpu_step.main(flags) == gpu_step.main(flags) == 0 and len(children) == 1
  monkeypatch.setattr(gpu_step.jax, '__version__', '99.9')
  assert gpu_step.main(flags) == 0 and len(children) == 2


def test_a_line_of_a_cell_that_is_no_more_is_shown_last():
  rows = gpu_step.page([line(DENSE, name='gone'), line(DENSE)]).splitlines()
  assert [row.split('|')[1].strip() for row in rows if row.startswith('| ')][1:] == [
      'vit_b16-dense', 'gone']


@pytest.mark.parametrize('flags, said', [
    (['--scale=smoke', '--models=t5_large'], "--models: got 't5_large', allowed: t5_base, vit_b16"),
    (['--scale=smoke', '--only=top_2,dorpless'], "--only: got 'dorpless', allowed: t5_base-dense"),
    (['--cell=nope'], "--cell: got 'nope', allowed: t5_base-dense")])
def test_flags_that_name_nothing_are_refused(flags, said, tmp_path):
  with pytest.raises(ConfigError, match=said):
    gpu_step.main([*flags, f'--results={tmp_path}'])


def test_without_a_gpu_it_says_so(children, tmp_path):
  children.device = 'cpu: cpu'
  with pytest.raises(ConfigError, match="--scale: got 'gpu'.*smoke"):
    gpu_step.main([f'--results={tmp_path}'])
  with pytest.raises(ConfigError, match="--models: got 'vit_b17'.*vit_b16"):
    gpu_step.main(['--models=vit_b17', f'--results={tmp_path}'])
  assert not children and not list(tmp_path.iterdir())


def test_a_tiny_cell_from_the_command_to_the_page(tmp_path):
  flags = ['--scale=smoke', '--models=vit_b16', '--only=fused', f'--results={tmp_path}']
  assert gpu_step.main(flags) == 0
  (found,) = metrics.read_lines(tmp_path / gpu_step.FILE)
  assert found['name'] == 'vit_b16-dense-fused' and found['device'].startswith('cpu')
  assert 0 < found['low'] <= found['seconds'] <= found['high']
  assert found['matmuls'] > 0 and found['attention_alone'] > 0
  assert found['forecast']['compiled'] and found['command'].endswith('--scale=smoke')
  assert all(0 < found['attention_errors'][how] < 0.02 for how in ('fused', 'plain'))
  page = (tmp_path / gpu_step.PAGE).read_text()
  assert '| vit_b16-dense-fused |' in page and 'Attention, output and gradients, is off' in page


def test_a_fused_kernel_that_is_wrong_shows(monkeypatch):
  part = step_floor.Attend(1, 2, 12, 12, 3, 8)
  assert step_floor.errors(part)['fused'] < 0.02
  real = step_floor.attention.fused
  for wrong in (lambda q, k, v: real(q, k, v[:, ::-1]),                        # in its output
                lambda q, k, v: real(jax.lax.stop_gradient(q), k, v)):         # in a gradient
    monkeypatch.setattr(step_floor.attention, 'fused', wrong)
    found = step_floor.errors(part)
    assert found['fused'] > 0.5 and found['plain'] < 0.02


def test_a_tiny_dropless_t5_is_measured():
  found = gpu_step.measure(gpu_step.Cell('t5_base', 'dropless', 4, 'plain'), SMOKE)
  assert found['seconds'] > 0 and found['attention_alone'] > 0 and found['batch_size'] == 16
  assert found['parameters'] > found['parameters_active_per_token'] > 0


@pytest.mark.parametrize('device, peak', [
    ('gpu: NVIDIA A100-SXM4-40GB', 312e12), ('gpu: NVIDIA H100 80GB HBM3', 989e12),
    ('gpu: NVIDIA H100 PCIe', 756e12), ('gpu: NVIDIA L4', 121e12), ('gpu: NVIDIA L40S', None),
    ('cpu: cpu', None)])
def test_peaks_go_by_whole_names(device, peak):
  assert gpu_table.peak_of(device) == peak


def test_the_next_batch_that_is_tried_is_the_one_that_should_fit(monkeypatch):
  """Of 64 examples at 10 bytes each beside 100 fixed ones, in 300 bytes: 16 fit."""
  tried = []

  def measure(step, available):
    size = step.config.data.batch_size
    tried.append(size)
    found = gpu_step.memory.Forecast(100, 0, activations=10 * size, available=available,
                                     compiled=True)
    return object(), found
  monkeypatch.setattr(gpu_step.memory, 'free', lambda devices: 300)
  monkeypatch.setattr(gpu_step.memory, 'measure', measure)
  cell = {cell.name: cell for cell in gpu_step.cells(SMOKE)}['vit_b16-dense']
  scale = dataclasses.replace(SMOKE, batches={'vit_b16': 64})
  step = gpu_step._largest(cell, scale)[1]
  assert tried == [64, 16] and step.config.data.batch_size == 16
  monkeypatch.setattr(gpu_step.memory, 'free', lambda devices: 150)
  with pytest.raises(ConfigError, match='a batch of 8'):
    gpu_step._largest(cell, scale)
