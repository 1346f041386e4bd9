"""A teacher that cannot say anything of a student's batches is refused."""

import dataclasses
import json
import types

import pytest

from moejax.config import ConfigError
from moejax.losses import TaskConfig
from moejax.models import vit
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import initialize, parallel
from moejax.train.teacher import Teacher

STUDENT = run_config.RunConfig(model=vit.config('tiny'),
                             task=TaskConfig(teacher='runs/x', distill_weight=0.5))


@pytest.mark.parametrize('changes, said', [
    ({'image_size': 16}, r"student's image_size and channels, \(8, 1\)\. That one has \(16, 1\)"),
    ({'channels': 3}, r"\(8, 1\)\. That one has \(8, 3\)"),
    ({'num_classes': 11}, 'a run with num_classes 10. That one has num_classes 11')])
def test_a_teacher_of_other_images_or_classes(changes, said, monkeypatch):
  its = run_config.RunConfig(model=dataclasses.replace(STUDENT.model, **changes))
  run = types.SimpleNamespace(config=json.loads(run_config.to_json(its)))
  monkeypatch.setattr(initialize, 'open_run', lambda *args: run)
  with pytest.raises(ConfigError, match=f"config.task.teacher: got 'runs/x'.*{said}"):
    Teacher(STUDENT, parallel.make('mesh', MeshConfig()), {})
