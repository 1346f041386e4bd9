"""Cases on a GPU: their configs, the page's numbers, resuming, a tiny one for real."""

import contextlib
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from experiments.benchmarks import common, gpu_breakdown, gpu_step
from moejax.config import ConfigError
from moejax.train import metrics
from moejax.train.compiled import Program

H100 = 'gpu: NVIDIA H100 80GB HBM3'
SMOKE = gpu_step.SCALES['smoke']
DENSE = gpu_step.Case('vit_b16', 'dense', 0, 'plain')


def test_cases_are_what_they_are_called():
  by_name = {case.name: case for case in gpu_step.all_cases(gpu_step.SCALES['gpu'])}
  assert len(by_name) == 2 * 9 + 2 * 18   # dense, and 2 sizes of 4 routings; ViT both ways
  config = by_name['t5_large-expert_choice-e32'].config(gpu_step.SCALES['gpu'], 64)
  assert config.model.encoder_moe.router == 'expert_choice'
  assert config.model.decoder_moe.router == 'top_k'   # an expert must not see later tokens
  config = by_name['vit_b16-dropless-e8-fused'].config(gpu_step.SCALES['gpu'], 64)
  assert (config.model.moe.dispatch, config.model.moe.k, config.model.moe.num_experts) == (
      'grouped', 2, 8)
  assert config.execution.attention == 'fused' and config.model.dtype == 'bfloat16'
  assert config.execution.remat == 'none' and config.mesh.expert == 1


def test_a_dropless_t5_on_synthetic_data_and_random_weights(monkeypatch):
  """Without its step, which takes long to compile; below, that of a ViT is timed."""
  case = gpu_step.Case('t5_base', 'dropless', 4, 'plain')
  monkeypatch.setattr(gpu_step.memory, 'measure', lambda programs, available: (
      gpu_step.memory.Forecast(1, 1, activations=1, available=9, compiled=True)))
  programs, _ = gpu_step._largest(case, SMOKE)
  batch = gpu_step.synthetic(programs.run.config)
  assert batch['encoder_input'].shape == (16, 114) and batch['target'].shape == (16, 32)
  assert batch['encoder_input'].min() > 0 and (batch['weight'] == 1).all()
  np.testing.assert_array_equal(batch['index'], np.arange(16))

  state = gpu_step.random_state(programs.shapes)
  same = lambda s, x: (s.shape, s.dtype, s.sharding) == (x.shape, x.dtype, x.sharding)
  assert jax.tree.all(jax.tree.map(same, programs.shapes, state))
  assert all(float(abs(x).max()) > 0 for x in jax.tree.leaves(state.params))

  timed = []
  monkeypatch.setattr(gpu_step, '_timed', lambda programs, scale: ([1.0, 2.0, 3.0], None))
  monkeypatch.setattr(Program, 'compiled', types.SimpleNamespace(as_text=str))
  monkeypatch.setattr(gpu_breakdown, 'bytes_moved', lambda text: 0)
  monkeypatch.setattr(gpu_breakdown, 'seconds', lambda operation, *_, **__: timed.append(
      operation) or 1.0)
  line = gpu_step.measure(case, SMOKE)
  assert (line['low'], line['seconds'], line['high'], line['batch_size']) == (1.0, 2.0, 3.0, 16)
  assert line['parameters'] > line['parameters_active_per_token'] > 0
  assert (line['matmuls'], line['attention_alone']) == tuple(
      float(sum(isinstance(x, kind) for x in timed))
      for kind in (gpu_breakdown.Matmul, gpu_breakdown.Attention))
  assert timed == gpu_step._operations(programs.run.config)


def line(case, device=H100, **changes):
  return {'key': case.key(SMOKE, device), 'command': 'c', 'name': case.name, 'model': case.model,
          'routing': case.routing, 'experts': case.experts, 'attention': case.attention,
          'batch_size': 100, 'parameters': 86_000_000, 'flops': 989e12 * 0.05, 'seconds': 0.1,
          'matmuls': 0.07, 'attention_alone': 0.01, 'peak_bytes': 3 * 2**30,
          'forecast': dict.fromkeys(('params', 'optimizer', 'gradients', 'activations'), 2**30),
          'device': device, 'versions': {'jax': '1.2'}, **changes}


def test_the_page_has_the_numbers_and_marks_what_is_above_the_limit():
  dense, *upcycled = [case for case in gpu_step.all_cases(SMOKE) if case.model == 'vit_b16'][:3]
  kernels = {'products': 0.065, 'other': 0.0215, 'launched': 1700.0}
  lines = [line(upcycled[0], seconds=0.12, batch_size=50),
           line(upcycled[1], seconds=0.091, kernels=kernels, other_bytes=75.4e9),
           line(dense), line(dense, name='gone'), line(dense, 'cpu: cpu', peak_bytes=None)]
  rows = {}
  for row in gpu_step.page(lines).splitlines():
    if row.startswith(('| vit', '| gone')):
      name, *cells = [c.strip() for c in row.split('|')[1:-1]]
      rows.setdefault(name, []).append(cells)
  on_cpu, on_gpu = rows[dense.name]
  assert on_gpu == ['86 M', '100', '100.0', '70.0', '10.0', '1.25', '–', '–', '–', '0.50', '1,000',
                    '1.00', '3.0', '4.0']
  assert on_cpu[9] == on_cpu[-2] == '–'
  (first,), (second,) = rows[upcycled[0].name], rows[upcycled[1].name]
  assert first[5] == '1.50!' and first[11] == '2.40'   # 2.4 ms an example, and 1 ms
  assert second[5:9] == ['1.14', '65.0', '21.5', '75']
  assert list(rows)[-1] == 'gone'   # of a case that is no more


@pytest.fixture
def children(monkeypatch):
  """Names of cases that were measured, on a device that can be changed; 'top_2' cannot be."""
  class Children(list):
    device, prepared = H100, ()
  measured = Children()
  measured.prepared = []
  by_name = {case.name: case for case in gpu_step.all_cases(SMOKE)}

  def child(*flags, cache=''):
    if flags == ('--device',):
      return measured.device
    flag, _, name = flags[0].partition('=')
    if flag == '--prepare':
      measured.prepared.append(name)
      return 'null'
    measured.append(name)
    if 'top_2' in name:
      raise ConfigError('out of memory')
    whole = line(by_name[name], measured.device)
    return json.dumps({k: v for k, v in whole.items() if k not in ('key', 'command')})
  monkeypatch.setattr(gpu_step, '_child', child)
  return measured


def test_what_is_measured_is_not_measured_again_and_failures_are_reported(
    children, tmp_path, monkeypatch, capsys):
  flags = ['--scale=smoke', '--models=t5_base', f'--results={tmp_path}']
  assert gpu_step.main(flags) == 1 and len(children) == 5
  assert 't5_base-top_2-e4: out of memory' in capsys.readouterr().err
  assert gpu_step.main(flags) == 1 and children[5:] == ['t5_base-top_2-e4']
  children.device = 'gpu: another'
  assert gpu_step.main([*flags, '--only=dense']) == 0 and children[6:] == ['t5_base-dense']
  assert len(metrics.read_lines(tmp_path / gpu_step.FILE)) == 5   # one per case and device
  assert '## gpu: another' in (tmp_path / gpu_step.PAGE).read_text()
  monkeypatch.setattr(gpu_step.jax, '__version__', '99.9')
  assert gpu_step.main([*flags, '--only=dense']) == 0 and children[7:] == ['t5_base-dense']


def test_a_few_cases_are_compiled_side_by_side_before_they_are_measured(children, tmp_path,
                                                                        monkeypatch):
  monkeypatch.setattr(gpu_step, 'TOGETHER', 2)
  seen = []
  monkeypatch.setattr(common.Measurements, 'add', lambda output, lines: seen.append(
      [len(children.prepared), len(children)]))
  gpu_step.main(['--scale=smoke', '--models=vit_b16', f'--results={tmp_path}'])
  assert sorted(children.prepared) == sorted(children)
  assert seen[:2] == [[2, 1], [2, 2]] and seen[-1] == [6, 6]


def test_a_tiny_scale_replaces_nothing_that_was_measured(children, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  real = line(DENSE, command='c --scale=gpu')
  monkeypatch.setattr(gpu_step, 'FOLDER', tmp_path)
  (tmp_path / gpu_step.FILE).write_text(json.dumps(real) + '\n')
  flags = ['--scale=smoke', '--models=vit_b16', '--only=dense']
  assert gpu_step.main(flags) == 0
  assert metrics.read_lines(tmp_path / gpu_step.FILE) == [real]
  assert not (tmp_path / gpu_step.PAGE).exists()
  assert len(metrics.read_lines(tmp_path / 'runs/smoke_gpu' / gpu_step.FILE)) == 2
  gpu_step.main([*flags, f'--results={tmp_path}'])
  assert metrics.read_lines(tmp_path / gpu_step.FILE)[0] == real


@pytest.mark.parametrize('flags, words', [
    (['--scale=smoke', '--models=t5_large'], "--models: got 't5_large', allowed: t5_base, vit_b16"),
    (['--scale=smoke', '--only=top_2,dorpless'], "--only: got 'dorpless', allowed: t5_base-dense"),
    (['--models=vit_b17'], "--models: got 'vit_b17'.*vit_b16"),
    (['--case=nope'], "--case: got 'nope', allowed: t5_base-dense"),
    ([], "--scale: got 'gpu'.*smoke, on 'cpu: cpu'")])   # no GPU
def test_what_cannot_be_measured_is_refused(flags, words, children, tmp_path):
  children.device = 'cpu: cpu'
  with pytest.raises(ConfigError, match=words):
    gpu_step.main([*flags, f'--results={tmp_path}'])
  assert not children and not list(tmp_path.iterdir())


def test_a_tiny_case_from_the_command_to_the_page(tmp_path, monkeypatch):
  """And what is prepared is what is then run: matmuls, attentions, the step."""
  cache, compiled, real = tmp_path / 'cache', {}, gpu_step._child

  def child(*flags, **options):
    before = set(cache.glob('*-cache'))
    try:
      return real(*flags, **options)
    finally:
      compiled[flags[0].partition('=')[0]] = {
          path.name.split('-')[0] for path in set(cache.glob('*-cache')) - before}
  monkeypatch.setattr(gpu_step, '_child', child)
  cache.mkdir()
  monkeypatch.setattr(gpu_step.tempfile, 'TemporaryDirectory',
                      lambda: contextlib.nullcontext(str(cache)))
  flags = ['--scale=smoke', '--models=vit_b16', '--only=fused', f'--results={tmp_path}']
  assert gpu_step.main(flags) == 0
  assert {'jit_train_step', 'jit_both'} <= compiled['--prepare']
  assert not {'jit_train_step', 'jit_both'} & compiled['--case'] and compiled['--case']

  (measured,) = metrics.read_lines(tmp_path / gpu_step.FILE)
  assert measured['name'] == 'vit_b16-dense-fused' and measured['device'].startswith('cpu')
  assert 0 < measured['low'] <= measured['seconds'] <= measured['high']
  assert measured['matmuls'] > 0 and measured['attention_alone'] > 0
  assert measured['forecast']['compiled'] and measured['command'].endswith('--scale=smoke')
  assert all(0 < measured['attention_errors'][how] < 0.02 for how in ('fused', 'plain'))
  page = (tmp_path / gpu_step.PAGE).read_text()
  assert '| vit_b16-dense-fused |' in page and 'Attention, output and gradients, is off' in page


@pytest.mark.parametrize('device, peak', [
    ('gpu: NVIDIA A100-SXM4-40GB', 312e12), ('gpu: NVIDIA H100 80GB HBM3', 989e12),
    ('gpu: NVIDIA H100 PCIe', 756e12), ('gpu: NVIDIA L4', 121e12), ('gpu: NVIDIA L40S', None),
    ('cpu: cpu', None)])
def test_peaks_are_found_by_whole_names(device, peak):
  assert gpu_step.peak_of(device) == peak


def test_the_next_batch_that_is_tried_is_the_one_that_should_fit(monkeypatch):
  """Of 64 examples at 10 bytes each beside 100 fixed ones, in 300 bytes: 16 fit."""
  tried = []

  def measure(programs, available):
    size = programs.run.config.data.batch_size
    tried.append(size)
    return gpu_step.memory.Forecast(100, 0, activations=10 * size, available=available,
                                    compiled=True)
  monkeypatch.setattr(gpu_step.memory, 'free', lambda devices: 300)
  monkeypatch.setattr(gpu_step.memory, 'measure', measure)
  scale = dataclasses.replace(SMOKE, batches={'vit_b16': 64})
  programs, _ = gpu_step._largest(DENSE, scale)
  assert tried == [64, 16] and programs.run.config.data.batch_size == 16
  monkeypatch.setattr(gpu_step.memory, 'free', lambda devices: 150)
  with pytest.raises(ConfigError, match='a batch of 8'):
    gpu_step._largest(DENSE, scale)
