"""docs/methods.md speaks of what is there, and leaves no preset and no MoE setting out."""

import dataclasses
import pathlib
import re

import pytest

from moejax.moe import presets
from moejax.moe.config import MoEConfig
from moejax.train.config import RunConfig

ROOT = pathlib.Path(__file__).parent.parent
MENU = (ROOT / 'docs' / 'methods.md').read_text()
WORDS = set(re.findall(r'`([^`\n]+)`', MENU))
MOE = {f.name for f in dataclasses.fields(MoEConfig)}
# Sizes and floors, which are not methods.
PLAIN = {'num_experts', 'eval_capacity_factor', 'min_capacity', 'group_size', 'router_init_std'}


@pytest.mark.parametrize('name', sorted(set(presets.BY_NAME) - {'sparse_upcycling_decoder'}))
def test_every_preset_is_on_the_menu(name):
  assert name in WORDS


@pytest.mark.parametrize('key', sorted(MOE - PLAIN))
def test_every_moe_setting_is_on_the_menu(key):
  assert any(re.search(rf'\b{key}\b', word) for word in WORDS)


def test_every_key_on_the_menu_exists():
  rooms = {f.name: f.default for f in dataclasses.fields(RunConfig)}
  found = 0
  for word in WORDS:
    match = re.fullmatch(r'(\w+)\.(\w+)(=\w+)?', word)
    if match and match[1] in rooms and dataclasses.is_dataclass(rooms[match[1]]):
      assert hasattr(rooms[match[1]], match[2]), word
      found += 1
    setting = re.fullmatch(r'(\w+)=(\w+)', word)
    if setting and setting[1] in MOE:
      kind = {f.name: f.type for f in dataclasses.fields(MoEConfig)}[setting[1]]
      assert kind is not str or setting[2] in _choices(setting[1]), word
      found += 1
  assert found > 30


def _choices(key):
  """What MoEConfig says it allows."""
  with pytest.raises(ValueError) as error:
    MoEConfig(**{key: '?'})
  return str(error.value)


def test_links_lead_somewhere():
  links = re.findall(r'\]\(([^)#]+)\)', MENU)
  assert links and all((ROOT / 'docs' / link).exists() for link in links)
