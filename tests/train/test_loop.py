"""Whole runs of a few steps: how they begin, branch, resume, diverge and end."""

import contextlib
import dataclasses
import io
import json
import shutil

import pytest

from moejax import models
from moejax.checkpoints import orbax
from moejax.cluster import processes
from moejax.config import ConfigError
from moejax.models import t5
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import loop, metrics
from tests.train import small

STEPS = 8
MOE = MoEConfig(layers='last_1', num_experts=2, renormalize=True)
OTHERS = "moe settings other than the parent's: "
FILES = ('config.json', 'run.json', 'status.json')


def config(parent='', moe=MOE, **changes):
  """A run of a sparse block on digits, from scratch or continuing a parent."""
  init = {'init.mode': 'continue', 'init.parent': str(parent)} if parent else {}
  return small.digits(moe, **{'steps': STEPS, 'checkpoint_every': STEPS, 'log_every': 2,
                              'eval_every': 4, **init, **changes})


TRUNK = {'branch_steps': (4,), 'keep_checkpoints': 1, 'data.eval_examples': 48,
         'probe.source': 'digits', 'probe.shots': (1000,)}   # more than there are of a class


@pytest.fixture(scope='module')
def trunk(tmp_path_factory):
  """(workdir of a run that others branch from, what it printed, where it was)."""
  path, progress, printed = tmp_path_factory.mktemp('loop') / 'trunk', [], io.StringIO()
  hosts = processes.Hosts()
  hosts.moved = progress.append
  with contextlib.redirect_stderr(printed):
    assert loop.run(config(**TRUNK), str(path), hosts) == 0
  return path, printed.getvalue(), progress


def phase(path):
  return json.loads((path / 'status.json').read_text())['phase']


def saved(path):
  return orbax.finished_steps(path / orbax.SUBDIR)


def losses(path):
  """{(step, 'train/loss'): value}."""
  return {(line['step'], k): v for line in metrics.read_lines(path / 'metrics.jsonl')
          for k, v in line.items() if k.endswith('/loss')}


def test_each_batch_of_an_evaluation_is_a_sign_of_life(trunk):
  *_, progress = trunk
  assert {f'evaluating, batch {n}, step {STEPS}' for n in (1, 2, 3)} <= set(progress)


def test_a_probe_whose_data_do_not_suffice_costs_a_line_and_not_the_run(trunk):
  path, printed, _ = trunk
  assert 'no probe: probe.shots: got 1000, allowed: at most' in printed
  assert phase(path) == 'finished'
  assert not any(key.startswith('probe/') for line in metrics.read_lines(path / 'metrics.jsonl')
                 for key in line)
  facts = json.loads((path / 'run.json').read_text())
  assert len(facts['probe_fingerprint']) == len(facts['data_fingerprint']) == 64
  assert facts['branch_steps'] == [4] and saved(path) == [4, 8]


def test_a_probe_that_does_not_exist_is_refused_under_its_name(tmp_path):
  with pytest.raises(ConfigError, match="config.probe.source=digit: data.source: got 'digit'"):
    loop.run(config(**{'probe.source': 'digit'}), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_branches_start_where_the_trunk_was_and_end_elsewhere(trunk, tmp_path, capsys):
  """Same parameters, optimizer state, data and rate: the trunk bit for bit until they cool down."""
  path, *_ = trunk
  routed = dataclasses.replace(MOE, capacity_factor=1.5, z_weight=0.1)   # in training alone
  branch = {'steps': 4, 'schedule.cooldown_steps': 2, 'data.eval_examples': 48}
  printed = {}
  for name, moe, step in (('early', MOE, 4), ('late', routed, -1)):
    run = config(path, moe, **branch, **{'init.step': step})
    assert loop.run(run, str(tmp_path / name)) == 0
    printed[name] = [x for x in capsys.readouterr().err.splitlines() if x.startswith(OTHERS)]
  long, early, late = map(losses, (path, tmp_path / 'early', tmp_path / 'late'))
  assert min(early) == (4, 'validation/loss') and min(late) == (8, 'validation/loss')
  assert early[min(early)] == long[min(early)] and late[min(late)] == long[min(late)]
  assert early[6, 'train/loss'] == long[6, 'train/loss']   # two updates, then it cools down
  assert len({long[8, 'validation/loss'], early[8, 'validation/loss'],
              late[12, 'validation/loss']}) == 3
  # A run prints once in which MoE settings its parent differs.
  assert printed == {'early': [], 'late': [
      OTHERS + 'model.moe.capacity_factor: 2.0 -> 1.5, model.moe.z_weight: 0.0 -> 0.1']}


@pytest.mark.parametrize('moe, init, message', [
    (MoEConfig(), {}, 'do not account for every leaf'),
    (MOE, {'init.mode': 'upcycle'}, 'no layer of the model is a new')],
    ids=['sparse to dense', 'sparse upcycled once more'])
def test_surgery_that_cannot_be_is_refused_before_the_workdir_is_claimed(
    moe, init, message, trunk, tmp_path, monkeypatch):
  monkeypatch.setattr(loop.Trainer, 'compile', lambda _: pytest.fail('compiled'))
  with pytest.raises(ConfigError, match=message):
    loop.run(config(trunk[0], moe, **init), str(tmp_path / 'child'))
  assert not list(tmp_path.iterdir())


def test_a_parent_is_opened_once_and_its_surgery_planned_once(trunk, tmp_path, monkeypatch):
  counts = {'open_run': 0, '_plan': 0}

  def counted(name, original):
    def run(*args):
      counts[name] += 1
      return original(*args)
    return run
  for name in counts:
    original = getattr(loop.initialize, name)
    monkeypatch.setattr(loop.initialize, name, counted(name, original))
  assert loop.run(config(trunk[0], steps=2, log_every=2), str(tmp_path / 'child')) == 0
  assert counts == {'open_run': 1, '_plan': 1}


def changes(ours, theirs):
  """Settings in which two models differ, that of the parent as it is in JSON."""
  return run_config.moe_changes(run_config.RunConfig(model=ours),
                                json.loads(run_config.to_json(run_config.RunConfig(model=theirs))))


def test_only_sparse_stacks_and_keys_that_both_have_are_compared():
  decoder = dataclasses.replace(MOE, router='top_k', experts_per_layer=(2,))
  model = t5.config('tiny', decoder_moe=decoder)
  other = t5.config('tiny', encoder_moe=MoEConfig(k=3), num_heads=1,
                    decoder_moe=dataclasses.replace(decoder, experts_per_layer=(4,)))
  assert changes(model, model) == []
  assert changes(model, other) == ['model.decoder_moe.experts_per_layer: [4] -> [2]']
  assert run_config.moe_changes(run_config.RunConfig(model=model), {'model': {'decoder_moe': {
      'layers': 'last_1', 'routers': 'top_k'}}}) == []


def stop_at(monkeypatch, step):
  """Makes hosts agree to stop, by SIGTERM, at the call `step`; returns what they were asked."""
  calls = []
  monkeypatch.setattr(processes.Hosts, 'stop', lambda self, signal: (
      calls.append(signal), 15 if len(calls) == step else None)[1])
  return calls


def test_a_run_that_is_stopped_in_its_last_step_is_finished(tmp_path, monkeypatch):
  calls = stop_at(monkeypatch, STEPS)
  assert loop.run(config(), str(tmp_path / 'run')) == 0
  assert phase(tmp_path / 'run') == 'finished' and len(calls) == STEPS


@pytest.mark.parametrize('log_every, stopped, step', [(2, None, 4), (STEPS, 3, 3)],
                         ids=['at a line of metrics', 'at a stop'])
def test_a_run_that_diverges_ends_before_its_checkpoint(log_every, stopped, step, tmp_path,
                                                        monkeypatch):
  stop_at(monkeypatch, stopped)
  run = config(**{'optimizer.learning_rate': 1e30, 'log_every': log_every, 'eval_every': STEPS,
                  'schedule.cooldown_steps': 4})
  with pytest.raises(ConfigError, match=f'step {step}: train/(loss|grad_norm): got (nan|inf).*'
                                        'There is no checkpoint yet'):
    loop.run(run, str(tmp_path / 'run'))
  assert saved(tmp_path / 'run') == []


def test_a_finished_run_writes_a_damaged_file_anew_once_it_is_deleted(trunk, tmp_path, capsys):
  path, run = tmp_path / 'run', config(**TRUNK)
  shutil.copytree(trunk[0], path)
  before = {name: (path / name).read_text() for name in (*FILES, 'metrics.jsonl')}
  for name in FILES:
    (path / name).write_text(before[name][:len(before[name]) // 2])
    with pytest.raises(ConfigError, match=f'whose {name} can be read.*delete that|Delete that'):
      loop.run(run, str(path))
    (path / name).unlink()
  assert loop.run(run, str(path)) == 0   # all three at once
  assert phase(path) == 'finished'
  (path / 'status.json').write_text('{}')   # killed before it could write that it is finished
  assert loop.run(run, str(path)) == 0 and phase(path) == 'finished'
  after = {name: (path / name).read_text() for name in before}
  for name in ('config.json', 'metrics.jsonl'):
    assert after[name] == before[name]
  same = lambda text: {k: v for k, v in json.loads(text).items() if k != 'memory'}
  assert same(after['run.json']) == same(before['run.json'])
  capsys.readouterr()
  assert loop.run(run, str(path)) == 0   # and now it only prints that it is finished
  assert capsys.readouterr().out.startswith(f'{path}: finished at step {STEPS}. validation')


def test_a_workdir_with_the_old_name_of_a_key_resumes(trunk, tmp_path, capsys):
  """config.steps_per_call was config.steps_per_dispatch."""
  path = tmp_path / 'run'
  shutil.copytree(trunk[0], path)
  shutil.rmtree(path / orbax.SUBDIR / str(STEPS))
  text = (path / 'config.json').read_text()
  (path / 'config.json').write_text(text.replace('"steps_per_call"', '"steps_per_dispatch"'))
  assert loop.run(config(**TRUNK), str(path)) == 0
  assert f'resumed at step 4 of {STEPS}' in capsys.readouterr().err
  assert (path / 'config.json').read_text() == text and 'steps_per_call' in text
  assert (path / 'metrics.jsonl').read_bytes() == (trunk[0] / 'metrics.jsonl').read_bytes()


def test_a_parent_is_evaluated_with_plain_attention_though_its_child_has_the_fused(
    trunk, tmp_path, monkeypatch):
  """On a GPU fused attention is refused in float32, and a parent may well be in that."""
  build, executions = models.build, []

  def noted(model, *execution):
    executions.extend(x.attention for x in execution)
    return build(model, *execution)
  monkeypatch.setattr(models, 'build', noted)
  child = config(trunk[0], steps=2, **{'execution.attention': 'fused'})
  assert loop.run(child, str(tmp_path / 'child')) == 0
  assert executions == ['fused', 'plain']
