"""The house is as the design draws it: imports run one way, and files and functions stay small."""

import pytest

from tests import house
from tests.house import File

FILES = house.read()
CODE = house.within(FILES, 'moejax', 'experiments')
MOEJAX = house.within(FILES, 'moejax')

# A room may import its own row and those above it.
ORDER = (
    ('trees', 'config'),
    ('sharding', 'flops', 'nn'),
    ('moe',),
    ('models',),
    ('losses',),
    ('evaluation', 'analysis'),
    ('train', 'cluster'),
    ('aot',),
    ('command_line', 'main', 'convert', 'predict', 'analyze', ''),   # '': the Python API
)
# Rooms beside that order, and what each may import apart from itself.
APART = {'surgery': {'trees', 'config'}, 'checkpoints': {'trees', 'config'}, 'data': {'config'}}
# Files that meet the rooms beside the order; commands and the API may meet all.
MEET = {
    'moejax.train.config': {'data', 'surgery'},
    'moejax.train.initialize': {'surgery', 'checkpoints'},
    'moejax.train.loop': {'checkpoints'},
    'moejax.train.validate': {'data'},
}



def room(name: str) -> str:
  """'moe' of 'moejax.moe.layer'; '' of 'moejax'."""
  return (name.split('.') + [''])[1]


def may_import(name: str, other: str) -> bool:
  """Whether a file of moejax may import another."""
  own, theirs = room(name), room(other)
  rows = {entry: i for i, row in enumerate(ORDER) for entry in row}
  if own == theirs or own in APART:
    return own == theirs or theirs in APART[own]
  if theirs in APART:
    return rows[own] == len(ORDER) - 1 or theirs in MEET.get(name, ())
  return rows[theirs] <= rows[own]


@pytest.mark.parametrize('file', MOEJAX.values(), ids=MOEJAX)
def test_imports_run_one_way(file):
  upward = {(file.name, other) for other in house.imports(file, MOEJAX)
            if not may_import(file.name, other)}
  assert not upward


def test_a_wrong_import_is_seen():
  wrong = File('moejax/moe/x.py', 'def f():\n  from moejax import flops\nimport moejax.train.loop')
  assert house.imports(wrong, MOEJAX) == {'moejax.flops', 'moejax.train.loop'}
  for name, other in (('moe.dispatch', 'models.t5'), ('surgery.upcycle', 'train.step'),
                      ('train.step', 'data'), ('data.text', 'trees'), ('train.loop', 'aot.hlo')):
    assert not may_import(f'moejax.{name}', f'moejax.{other}')
  for name, other in (('moe.layer', 'moe.dispatch'), ('moe.layer', 'config'), ('main', 'aot.hlo'),
                      ('convert', 'surgery.upcycle'), ('train.loop', 'cluster.processes')):
    assert may_import(f'moejax.{name}', f'moejax.{other}')


def test_packages_are_not_imported_back():
  """moejax imports neither configs nor experiments nor tests; and so on down the list."""
  rank = house.PACKAGES.index
  back = {(file.name, other) for file in FILES.values() for other in house.imports(file, FILES)
          if rank(other.split('.')[0]) > rank(file.name.split('.')[0])}
  assert not back


def test_no_circle_between_files():
  assert not house.circles(CODE)
  three = [File(f'{name}.py', f'import {other}') for name, other in ('ab', 'bc', 'ca', 'da')]
  assert house.circles({file.name: file for file in three}) == [('a', 'b', 'c')]


@pytest.mark.parametrize('file', FILES.values(), ids=FILES)
def test_files_and_functions_are_small_and_explained(file):
  assert file.lines <= 500, 'a file past 500 lines is two things'
  if file.path in {code.path for code in CODE.values()}:
    assert file.text.startswith('"""'), 'no module docstring'
    assert not house.long_functions(file), 'a function has less than 60 lines'


def test_many_parameters_have_a_reason():
  """More than 7 need a line 'Many parameters: WHY' in the docstring, or one value for several."""
  many = set().union(*map(house.many_parameters, CODE.values()))
  assert not many
  eight = 'def f(self, a, b, c, d, *, e, f, g, h):\n  """Does.\n\n  {}\n  """'
  assert house.many_parameters(File('x.py', eight.format('No word.'))) == {'x:f'}
  assert not house.many_parameters(File('x.py', eight.format('Many parameters: they differ.')))


def test_no_fragments():
  """A file under 60 lines with one importer is part of that importer."""
  assert not house.fragments(CODE)


def test_nothing_asks_for_the_family_outside_models():
  found = [f'{file.path}:{line}' for name, file in CODE.items()
           if not name.startswith('moejax.models') for line in house.family_branches(file)]
  assert not found, 'use config.stacks(), or a field of the model'
  text = "if c.family == 'vit': pass\nisinstance(c, (int, models.T5Config))\nX[c.family]\n"
  assert house.family_branches(File('x.py', text)) == [1, 2]


def test_the_table_of_rooms():
  text = house.table(FILES, {'moejax.moe.x': File('moejax/moe/x.py', 'a\nb\n')})
  assert '| circles between files |  | ' in text and text.count('\n') > 30
  assert [line for line in text.splitlines() if line.startswith('| moejax/moe |')][0].endswith(
      ' | 1 | 2 |')
