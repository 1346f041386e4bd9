"""Steps per call: a tiny measurement for real, and its table."""

import functools

import jax

from experiments.benchmarks import steps_per_call
from moejax.train import metrics, parallel


def test_a_small_one_is_measured_and_shown(tmp_path, monkeypatch, capsys):
  # On one device: virtual ones would mostly wait for each other.
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:1]))
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  flags = ['--scale=smoke', '--models=vit_glyphs_upcycled', f'--results={tmp_path}']
  assert steps_per_call.main(flags) == 0
  (line,) = metrics.read_lines(tmp_path / steps_per_call.FILE)
  assert line['model'] == 'vit_glyphs_upcycled' and line['rounds'] == 2
  assert line['ratios']['1'] == [1, 1, 1]
  assert all(low <= middle <= high and low > 0 for low, middle, high in line['seconds'].values())
  assert '| vit_glyphs_upcycled |' in (tmp_path / steps_per_call.PAGE).read_text()
  capsys.readouterr()
  assert steps_per_call.main([*flags, '--show']) == 0
  assert '## cpu: cpu' in capsys.readouterr().out


def test_every_number_of_steps_is_of_the_same_run():
  for name in steps_per_call.MODELS:
    for per in steps_per_call.SCALES['mini'].steps:
      run = steps_per_call.config(name, per, steps_per_call.SCALES['mini'])
      assert run.steps_per_call == per and run.steps % per == 0
      assert run.init.mode == 'scratch'


def test_a_device_has_a_table_of_its_own():
  line = {'model': 'vit_glyphs', 'device': 'gpu: A', 'versions': {'jax': '1'}, 'command': 'c',
          'seconds': {'1': [1, 2e-3, 3], '25': [1, 5e-4, 3]},
          'ratios': {'1': [1, 1, 1], '25': [0.2, 0.25, 0.3]}}
  text = steps_per_call.page([line, {**line, 'device': 'gpu: B'}])
  assert text.count('| vit_glyphs | 2.00 | 0.50 (0.25, 0.20 to 0.30) |') == 2
  assert text.index('## gpu: A') < text.index('## gpu: B')
