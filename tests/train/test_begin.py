"""How a run begins that continues another: it says in which MoE settings it differs."""

import dataclasses
import json

import pytest

from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import loop

MOE = MoEConfig(layers='last_1', num_experts=2, renormalize=True)
SAID = "moe settings other than the parent's: "


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A folder in which `parent` is a finished run of two steps, with expert choice."""
  home = tmp_path_factory.mktemp('begin')
  assert loop.run(config(), str(home / 'parent')) == 0
  return home


def config(parent='', **moe):
  edited = run_config.default(vit.config('tiny', num_layers=1))
  edited.data.source, edited.data.image.size = 'digits', 8
  edited.data.batch_size = edited.data.eval_batch_size = edited.data.eval_examples = 16
  edited.steps = edited.log_every = edited.eval_every = edited.checkpoint_every = 2
  edited.schedule.warmup_steps, edited.eval_splits = 1, ()
  edited.model.moe.update(dataclasses.asdict(dataclasses.replace(MOE, **moe)))
  if parent:
    edited.init.update(mode='continue', parent=str(parent))
  return run_config.resolve(edited)


@pytest.mark.parametrize('moe, said', [
    ({}, []),
    ({'router': 'top_k', 'capacity_factor': 1.5},
     [SAID + "model.moe.capacity_factor: 2.0 -> 1.5, model.moe.router: 'expert_choice' -> "
      "'top_k'"])], ids=['the same', 'others'])
def test_a_run_says_once_what_its_parent_had_otherwise(home, moe, said, capsys):
  path = str(home / f'child{len(moe)}')
  assert loop.run(config(home / 'parent', **moe), path) == 0
  lines = capsys.readouterr().err.splitlines()
  assert [line for line in lines if line.startswith(SAID)] == said


@pytest.mark.parametrize('layers, init, said', [
    ('none', {}, 'do not account for every leaf'),
    ('last_1', {'mode': 'upcycle', 'optimizer': 'carry'}, 'no layer of the wanted model is a new')
    ], ids=['sparse to dense', 'sparse upcycled once more'])
def test_surgery_that_cannot_be_is_refused_before_the_workdir_is_taken(home, layers, init, said,
                                                                       tmp_path, monkeypatch):
  monkeypatch.setattr(loop.Program, 'compile', lambda _: pytest.fail('compiled'))
  run = config(home / 'parent', layers=layers, renormalize=layers != 'none')
  run = dataclasses.replace(run, init=dataclasses.replace(run.init, **init))
  with pytest.raises(ConfigError, match=said):
    loop.run(run, str(tmp_path / 'child'))
  assert not list(tmp_path.iterdir())


def changes(ours, theirs):
  """Of two models, of which the parent's stands in JSON."""
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
