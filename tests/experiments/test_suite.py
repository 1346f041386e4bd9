"""Keys and the sharing of runs; and what quickstart's controls cost."""

import pathlib

import pytest

from experiments import suite as suite_lib
from experiments.suite import Arm, Run, Suite
from experiments.suites import quickstart
from moejax.config import ConfigError
from tests.experiments.made_up import dense

FOLDER = pathlib.Path('elsewhere')


def upcycled(parent, label='upcycled'):
  return Run(label, 'vit_glyphs_upcycled', {}, parent, arg='runlocal')


def test_a_key_depends_on_the_config_and_not_on_the_label_or_on_how_it_was_reached():
  assert dense().key == Run('another label', 'vit_glyphs', {'steps': 8}, arg='runlocal').key
  assert dense().key != dense(steps=10).key
  assert dense().key != dense(seed=1).key


def test_a_child_key_follows_its_parents_config_and_not_its_path():
  child = upcycled(dense())
  assert child.key == upcycled(dense(), 'another label').key
  assert child.key != upcycled(dense(seed=1)).key
  assert child.settings.init.parent == dense().key
  assert f'--config.init.parent={FOLDER / dense().name}' in child.command(FOLDER)


def test_a_suite_trains_a_shared_run_once_and_parents_first():
  parent, child = dense(), upcycled(dense())
  suite = Suite('s', 'mini', (Arm('d', 'a', child, parent), Arm('d', 'b', parent, dense()),
                              Arm('d', 'c', upcycled(dense()), parent)))
  assert [run.key for run in suite.runs()] == [parent.key, child.key]


def test_a_change_of_a_key_that_does_not_exist_names_the_nearest():
  with pytest.raises(ConfigError, match="optimizer.learning_rat: .*'learning_rate'"):
    _ = dense(**{'optimizer.learning_rat': 1.0}).key


@pytest.mark.parametrize('scale', quickstart.SCALES)
def test_quickstart_spends_on_its_controls_what_it_says(scale):
  suite = suite_lib.load('quickstart', scale)
  by_domain = {}
  for arm in suite.arms:
    by_domain.setdefault(arm.domain, {})[arm.name] = arm.run
  assert len(by_domain) == 2
  for runs in by_domain.values():
    parent, steps, flops, up, scratch = runs.values()
    trunk = parent.settings.steps - parent.settings.schedule.cooldown_steps
    assert steps.settings.steps == up.settings.steps == scratch.settings.steps == trunk // 5
    assert abs(flops.settings.steps * flops.step_flops - up.settings.steps * up.step_flops
               ) <= flops.step_flops / 2
    assert up.settings.model == scratch.settings.model
    assert scratch.settings.init.mode == 'scratch' and not scratch.parent
    cooldown = [run.settings.schedule.cooldown_steps / run.settings.steps
                for run in (steps, flops, up, scratch)]
    assert max(cooldown) - min(cooldown) <= 1 / trunk * 5
    assert parent.settings.schedule.cooldown_steps == steps.settings.schedule.cooldown_steps
    assert {run.parent.key for run in (steps, flops, up)} == {parent.key}
