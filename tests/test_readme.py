"""The README's numbers are those of the committed results; commands of all docs can be typed."""

import ast
import pathlib
import re
import shlex

import pytest

from configs import common
from moejax.train import config as run_config

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_quickstart_table_is_the_committed_one():
  results = (ROOT / 'experiments' / 'results' / 'quickstart' / 'quickstart.md').read_text()
  rows = [line for line in results.splitlines() if line.startswith(('|', '**'))]
  assert len(rows) > 10
  assert all(row in README for row in rows)


def test_the_commands_name_what_is_there():
  modules = re.findall(r'python -m ((?:moejax|experiments)[\w.]*)', README)
  assert {'moejax.main', 'experiments.main', 'experiments.report'} <= set(modules)
  assert all((ROOT / m.replace('.', '/')).with_suffix('.py').exists() for m in modules)
  files = re.findall(r'(?:configs|tests|moejax|experiments)/[\w/]+\.py', README)
  assert files and all((ROOT / f).exists() for f in files)
  targets = set(re.findall(r'make (\w+)', README)) & {'quickstart', 'test', 'parity', 'tpu'}
  makefile = (ROOT / 'Makefile').read_text()
  assert len(targets) == 4 and all(re.search(rf'^{t}:', makefile, re.M) for t in targets)


TEXTS = [ROOT / 'README.md', *(path for room in ('docs', 'configs', 'experiments', 'moejax')
                               for end in ('md', 'py') for path in (ROOT / room).rglob(f'*.{end}'))]


def test_what_is_called_a_command_is_one():
  """A module without a main would do nothing, and say so with exit code 0."""
  found = {name for path in TEXTS for name in re.findall(
      r'python -m\s+((?:moejax|experiments|tests)(?:\.\w+)+)', path.read_text())}
  assert len(found) > 8
  for name in found:
    assert "__name__ == '__main__'" in (ROOT / f'{name.replace(".", "/")}.py').read_text(), name


def runs(text):
  """[(config's name, its argument, {key: value}, workdir)] of the training commands in a text."""
  found = []
  for line in re.findall(r'^ *python -m moejax\.main (.+)', text.replace('\\\n', ' '), re.M):
    flags = dict(word.removeprefix('--').split('=', 1) for word in shlex.split(line, comments=True))
    name, _, arg = flags.pop('config').partition(':')
    changes = {key.removeprefix('config.'): value for key, value in flags.items()
               if key.startswith('config.')}
    if 'workdir' in flags:
      found.append((pathlib.PurePath(name).stem, arg, changes, flags['workdir']))
  return found


@pytest.mark.parametrize('text', [
    README, (ROOT / 'docs/methods.md').read_text(),
    ast.get_docstring(ast.parse((ROOT / 'moejax/main.py').read_text()))],
    ids=['README', 'methods', 'help'])
def test_runs_can_be_typed_and_find_their_parents(text):
  """Parents are runs of the same text, or have their default name: that of a config."""
  found, there = runs(text), set()
  assert len(found) >= 2
  for name, arg, changes, workdir in found:
    config = common.load(name, arg)
    for key, value in changes.items():
      number = re.fullmatch(r'[\d.]+', value)
      config.update_from_flattened_dict({key: ast.literal_eval(value) if number else value})
    run = run_config.resolve(config)
    if not arg and not changes:
      assert workdir == f'runs/{name}'
    if 'init.parent' in changes:
      assert run.init.parent in there
    elif run.init.mode != 'scratch':
      assert common.path(run.init.parent.removeprefix('runs/'))
    there.add(workdir)
