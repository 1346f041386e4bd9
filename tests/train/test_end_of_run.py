"""How a run ends: what is measured once, a signal at the last step, a loss that is no number."""

import json

import pytest

from configs.pretrain import vit_glyphs
from moejax import models
from moejax.checkpoints import orbax
from moejax.cluster import processes
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import loop, metrics

STEPS = 8   # of :runlocal


def config(**changes):
  found = vit_glyphs.get_config('runlocal')
  found.model.update(num_layers=1, d_model=16, d_ff=32)
  found.update_from_flattened_dict(changes)
  return run_config.resolve(found)


def status(path):
  return json.loads((path / 'status.json').read_text())['phase']


def test_a_probe_whose_data_do_not_suffice_costs_a_line_and_not_the_run(tmp_path, capsys):
  run = config(**{'probe.source': 'digits', 'probe.shots': (1000,)})
  assert loop.run(run, str(tmp_path / 'run')) == 0
  assert 'no probe: probe.shots: got 1000, allowed: at most' in capsys.readouterr().err
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR)[-1] == STEPS
  assert not any(key.startswith('probe/') for line in metrics.read_lines(
      tmp_path / 'run/metrics.jsonl') for key in line)
  facts = json.loads((tmp_path / 'run/run.json').read_text())
  assert len(facts['probe_fingerprint']) == 64 and (
      facts['probe_fingerprint'] != facts['data_fingerprint'])


def test_a_probe_that_does_not_exist_is_refused_under_its_name(tmp_path):
  with pytest.raises(ConfigError, match="config.probe.source=digit: data.source: got 'digit'"):
    loop.run(config(**{'probe.source': 'digit'}), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('step, code, phase', [(STEPS, 0, 'finished'), (5, 143, 'stopped')])
def test_told_to_stop_in_its_last_step_a_run_is_finished(step, code, phase, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(processes.Hosts, 'stop', lambda self, signal: (
      calls.append(signal), 15 if len(calls) == step else None)[1])
  assert loop.run(config(), str(tmp_path / 'run')) == code
  assert status(tmp_path / 'run') == phase and len(calls) == step


def test_a_run_that_diverges_ends_before_its_checkpoint(tmp_path):
  with pytest.raises(ConfigError, match='train/loss: got nan.*There is no checkpoint yet'):
    loop.run(config(**{'optimizer.learning_rate': 1e30}), str(tmp_path / 'run'))
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR) == []


@pytest.mark.parametrize('stopped, step', [(3, 3), (None, 4)], ids=['at a stop', 'as trunk'])
def test_a_diverged_run_saves_nothing_between_two_lines_either(
    stopped, step, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(processes.Hosts, 'stop', lambda self, signal: (
      calls.append(signal), 15 if len(calls) == stopped else None)[1])
  run = config(**{'optimizer.learning_rate': 1e30, 'log_every': STEPS, 'eval_every': STEPS,
                  'checkpoint_every': STEPS})
  with pytest.raises(ConfigError, match=f'step {step}: train/loss: got nan'):
    loop.run(run, str(tmp_path / 'run'))
  assert orbax.finished_steps(tmp_path / 'run' / orbax.SUBDIR) == []


def test_a_finished_run_writes_a_file_anew_that_is_damaged_once_it_is_deleted(tmp_path, capsys):
  path = tmp_path / 'run'
  assert loop.run(config(), str(path)) == 0
  names = ('config.json', 'run.json', 'status.json')
  before = {name: (path / name).read_text() for name in (*names, 'metrics.jsonl')}
  for name in names:
    text = (path / name).read_text()
    (path / name).write_text(text[:len(text) // 2])
    with pytest.raises(ConfigError, match=f'whose {name} can be read.*delete that|Delete that'):
      loop.run(config(), str(path))
    (path / name).unlink()
    assert loop.run(config(), str(path)) == 0
    assert (path / name).exists() and status(path) == 'finished'
  (path / 'status.json').write_text('{}')   # says nothing, and so not that it is finished
  assert loop.run(config(), str(path)) == 0 and status(path) == 'finished'
  after = {name: (path / name).read_text() for name in before}
  for name in ('config.json', 'metrics.jsonl'):
    assert after[name] == before[name]
  same = lambda text: {k: v for k, v in json.loads(text).items() if k != 'memory'}
  assert same(after['run.json']) == same(before['run.json'])
  capsys.readouterr()
  assert loop.run(config(), str(path)) == 0   # and now it only says that it is finished
  assert capsys.readouterr().out.startswith(f'{path}: finished at step {STEPS}. validation')


def test_each_batch_of_an_evaluation_is_a_sign_of_life(tmp_path):
  moved = []
  told = processes.Hosts()
  told.moved = moved.append
  assert loop.run(config(**{'data.eval_examples': 48}), str(tmp_path / 'run'), told) == 0
  assert {f'evaluating, batch {n}, step {STEPS}' for n in (1, 2, 3)} <= set(moved)


def test_a_parent_is_evaluated_with_plain_attention_though_its_child_has_the_fused(
    tmp_path, monkeypatch):
  """On a GPU fused attention is refused in float32, and a parent may well be in that."""
  assert loop.run(config(), str(tmp_path / 'parent')) == 0
  build, parents = models.build, []

  def noted(model, *execution):
    if execution and model.moe.layers == 'none':   # to be run, and not the child
      parents.append(execution[0].attention)
    return build(model, *execution)
  monkeypatch.setattr(models, 'build', noted)
  child = config(**{
      'init.mode': 'upcycle', 'init.parent': str(tmp_path / 'parent'),
      'execution.attention': 'fused', 'model.moe.layers': '0', 'model.moe.num_experts': 4})
  assert loop.run(child, str(tmp_path / 'child')) == 0
  assert parents == ['plain']
