"""Every mutation can be made, no trap is left out, and the harness tells hit from miss."""

import ast
import collections
import re

import pytest

from tests import house
from tests.mutations import edits, run
from tests.mutations.run import MUTATIONS, Mutation

mutations = pytest.mark.mutations


def test_every_edit_can_be_made_and_is_tested():
  """Mends are due where this fails: the code has changed under a mutation."""
  broken = {}
  for mutation in MUTATIONS:
    try:
      _, text = run.mutate(mutation, house.ROOT)
      ast.parse(text)
      for name in re.findall(r'[\w/]+\.py', mutation.tests):
        assert (house.ROOT / 'tests' / name.removeprefix('tests/')).exists(), f'no {name}'
    except (ValueError, SyntaxError, AssertionError) as error:
      broken[mutation] = str(error)
  assert not broken


def test_no_trap_is_left_out():
  assert len(edits.TRAPS) >= 37 and all(edits.TRAPS.values())
  assert max(collections.Counter(m.cells for m in MUTATIONS).values()) == 1


@pytest.fixture
def tree(tmp_path):
  """A tree with one function, of which a test sees whether it returns 1."""
  for path, text in {
      'moejax/value.py': 'import math\n\n\nclass A:\n\n  def value(self):  # a comment\n'
                         '    return math.floor(\n        1.0)\n',
      'tests/test_value.py': 'import pytest\nfrom moejax.value import A\n\n'
                             'def test_value():\n  assert A().value() == 1\n',
      'tests/test_other.py': 'def test_other():\n  pass\n'}.items():
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(text)
  (tmp_path / 'tests/conftest.py').write_text((house.ROOT / 'tests/conftest.py').read_text())
  (tmp_path / 'tests/xla.py').write_text((house.ROOT / 'tests/xla.py').read_text())
  return tmp_path


def of_value(old, new, where='A.value', tests='test_value.py'):
  return Mutation('value', where, old, new, tests)


def test_edits_are_found_by_name_and_pattern(tree):
  path, text = run.mutate(of_value('floor($)', 'ceil($ + 1)'), tree)
  assert path == tree / 'moejax/value.py'
  assert text == ('import math\n\n\nclass A:\n\n  def value(self):\n'
                  '      return math.ceil(1.0 + 1)\n')
  for wrong in (of_value('2', '3'), of_value('e', 'f'), of_value('1', '2', 'B.value')):
    with pytest.raises(ValueError, match='value: found . times, not once'):
      run.mutate(wrong, tree)


@mutations
def test_verdicts(tree):
  """A test that fails has caught it, unless it fails on the unbroken tree too."""
  hit, miss = of_value('1.0', '2.0'), of_value('1.0', '1.5')
  skip = of_value('import pytest\n', "import pytest\npytest.importorskip('no_such')\n",
                  'tests.test_value', 'test_value.py tests/test_other.py')
  caught = {m: run.judge(m, tree) for m in (hit, miss, skip)}
  assert caught == {hit: 'tests/test_value.py::test_value', miss: '', skip: run.SKIP_GUARD}
  assert run.unmask(caught, tree) == caught
  with pytest.raises(RuntimeError, match='could not run'):   # nothing imports: no verdict
    run.judge(of_value('value', 'other', tests='no_such.py'), tree)
  (tree / 'moejax/value.py').write_text('class A:\n  def value(self):\n    return 3\n')
  assert run.unmask({hit: caught[hit]}, tree) == {hit: ''}


@mutations
def test_the_command_writes_the_table(tree, monkeypatch):
  hit, miss = of_value('1.0', '2.0'), of_value('1.0', '1.5')
  monkeypatch.setattr(run, 'MUTATIONS', (hit, miss))
  monkeypatch.setattr(run, 'ROOT', tree)
  monkeypatch.setattr(run, 'TABLE', tree / 'table.md')
  assert run.main([]) == 1
  text = run.TABLE.read_text()
  assert text == run.HEAD + (
      '| value | `A.value` | `1.0` → `2.0` | `tests/test_value.py::test_value` |\n'
      '| value | `A.value` | `1.0` → `1.5` | **nothing** |\n')
  anew = run.table({miss: 'tests/x.py::test_y[1]'}, text)   # the other line stays
  assert anew == text.removesuffix(f'{run.SURVIVED} |\n') + '`tests/x.py::test_y` |\n'
  with pytest.raises(SystemExit, match="no trap contains 'jitter'; there are: value"):
    run.main(['--only=jitter'])


@mutations
def test_every_trap_was_caught():
  """The committed table has a line for each mutation; its tests exist."""
  rows = [line for line in run.TABLE.read_text().splitlines() if line.startswith('| ')][1:]
  assert [row[:len(m.cells)] for row, m in zip(rows, MUTATIONS, strict=True)] == [
      m.cells for m in MUTATIONS]
  caught = [row.removesuffix('` |').rpartition('`')[2].split('::') for row in rows]
  for path, name in caught:
    assert f'def {name}(' in (house.ROOT / path).read_text(), (path, name)
