"""The house stands as README draws it: imports run one way, and files stay small."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [p for p in sorted((ROOT / 'moejax').rglob('*.py')) if p.parent != ROOT / 'moejax'
           or p.name != '__init__.py']

# Each row may import the rows above it and its own row; a name stands for everything under it.
ORDER = [
    ['trees', 'config', 'moe.routing', 'flops'],
    ['sharding', 'moe.balance'],
    ['moe.dispatch', 'moe.grouped_matmul', 'moe.grouped_matmul_gpu'],
    ['moe', 'models.layers'],
    ['models'],
    ['losses'],
    ['evaluation'],
    ['train', 'cluster'],
    ['aot'],
    ['main'],
]
# Rooms beside that order: what each may import, apart from itself.
APART = {'surgery': {'trees', 'config'}, 'checkpoints': {'trees', 'config'}, 'data': {'config'}}
# Where the rooms beside the order are allowed in.
GUESTS = {
    'train.config': {'data'},
    'train.loop': {'data', 'checkpoints'},
    'train.initialize': {'surgery', 'checkpoints'},
}


def name_of(path):
  parts = path.relative_to(ROOT / 'moejax').with_suffix('').parts
  return '.'.join(p for p in parts if p != '__init__')


def imports(path):
  """Names within moejax that a module imports, as 'moe.routing'."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'moejax':
      base = node.module.removeprefix('moejax').strip('.')
      for alias in node.names:
        full = '.'.join(filter(None, [base, alias.name]))
        is_module = (ROOT / 'moejax' / full.replace('.', '/')).with_suffix('.py').exists()
        is_package = (ROOT / 'moejax' / full.replace('.', '/') / '__init__.py').exists()
        found.add(full if is_module or is_package else base)
    elif isinstance(node, ast.Import):
      found |= {a.name.removeprefix('moejax.') for a in node.names if a.name.startswith('moejax.')}
  return found - {''}


def row(name):
  """Index in ORDER of the longest entry that name falls under; None for the rooms apart."""
  best = None
  for i, entries in enumerate(ORDER):
    for entry in entries:
      if (name == entry or name.startswith(entry + '.')) and (not best or len(entry) > best[0]):
        best = (len(entry), i)
  return None if best is None else best[1]


def room(name):
  return name.split('.')[0]


def violations(name, imported):
  if room(name) in APART:
    allowed = APART[room(name)] | {room(name)}
    return {i for i in imported if room(i) not in allowed}
  bad = set()
  for i in imported:
    if room(i) in APART:
      if room(i) not in GUESTS.get(name, set()):
        bad.add(i)
    elif row(i) is None or row(name) is None or row(i) > row(name):
      bad.add(i)
  return bad


@pytest.mark.parametrize('path', MODULES, ids=name_of)
def test_imports_run_one_way(path):
  name = name_of(path)
  assert path.read_text().startswith('"""'), 'no module docstring'
  assert not violations(name, imports(path))


def test_a_wrong_import_is_seen():
  assert violations('moe.dispatch', {'models'}) == {'models'}
  assert violations('surgery.upcycle', {'train.step'}) == {'train.step'}
  assert violations('train.step', {'data'}) == {'data'}
  assert not violations('moe.layer', {'moe.dispatch', 'sharding', 'config'})


def test_moejax_does_not_import_what_uses_it():
  for path in MODULES:
    for node in ast.walk(ast.parse(path.read_text())):
      names = [node.module] if isinstance(node, ast.ImportFrom) else (
          [a.name for a in node.names] if isinstance(node, ast.Import) else [])
      assert not any((n or '').split('.')[0] in ('experiments', 'configs', 'tests') for n in names)


@pytest.mark.parametrize('path', MODULES + sorted((ROOT / 'experiments').rglob('*.py')),
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 500
  for node in ast.walk(ast.parse('\n'.join(lines))):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno < 60, f'{node.name} has over 60 lines'
