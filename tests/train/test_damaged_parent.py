"""A parent whose files are damaged: one line says which, and what to do."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moejax import models
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.surgery.config import InitConfig
from moejax.train import config as settings
from moejax.train import initialize
from tests.train.test_initialize import DENSE, STEP, one_device, run_config, with_writer


@pytest.fixture(scope='module')
def parent(tmp_path_factory):
  """Workdir of a dense run, saved at 3, 5 and STEP."""
  workdir, config = tmp_path_factory.mktemp('parent'), run_config(DENSE['vit'])
  state, _ = initialize.first_state(config, models.build(config.model), one_device(), None)
  for step in (3, 5, STEP):
    with_writer(workdir, step, {**state.as_dict(), 'step': np.int32(step)}, keep=3)
  (workdir / 'config.json').write_text(settings.to_json(config))
  (workdir / 'run.json').write_text(json.dumps({'trunk_step': STEP, 'end_step': STEP}))
  return workdir


@pytest.mark.parametrize('there, remedy', [
    ((3, 5), 'Older finished steps there: 3, 5. Set config.init.step=5. Or: Start that run again '
             'after renaming it to 7.damaged: it resumes from step 5.'),
    ((), 'Older finished steps there: none. Start that run again after renaming it to 7.damaged: '
         'it begins anew.')])
def test_a_parent_whose_checkpoint_is_damaged(parent, there, remedy, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(parent, other)
  steps = other / orbax.SUBDIR
  for step in {3, 5} - {*there}:
    shutil.rmtree(steps / str(step))
  (steps / str(STEP) / 'state/_METADATA').write_text('{"tree')
  init = InitConfig(mode='upcycle', parent=str(other))
  with pytest.raises(ConfigError) as error:
    initialize.open_parent(init)
  assert str(error.value).startswith(f"config.init.parent: got '{steps}/7', allowed: a checkpoint ")
  assert str(error.value).endswith(remedy)
  if there:
    assert initialize.open_parent(dataclasses.replace(init, step=5)).reader.step == 5
  with pytest.raises(ConfigError, match=r'^config.task.teacher: .* Start that run again') as error:
    initialize.open_run(str(other), 'config.task.teacher', STEP)
  assert 'init.step' not in str(error.value)


@pytest.mark.parametrize('name', ['config.json', 'run.json'])
def test_a_parent_whose_json_is_damaged(parent, name, tmp_path):
  for file in ('config.json', 'run.json'):
    shutil.copy(parent / file, tmp_path / file)
  (tmp_path / name).write_text('{"a')
  with pytest.raises(ConfigError, match=f'^config.init.parent: .*{name} can be read. It is da'):
    initialize.open_parent(InitConfig(mode='continue', parent=str(tmp_path)))


@pytest.mark.parametrize('step, name', [(initialize.TRUNK, 'trunk_step'),
                                        (initialize.END, 'end_step')])
def test_a_parent_that_does_not_say_where_its_trunk_or_its_end_is(parent, step, name, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(parent, other)
  (other / 'run.json').write_text('{}')
  init = InitConfig(mode='continue', parent=str(other), step=step)
  with pytest.raises(ConfigError, match=f'^config.init.parent: .*damaged: it has no {name}. '):
    initialize.open_parent(init)
  assert initialize.open_parent(dataclasses.replace(init, step=STEP)).reader.step == STEP
