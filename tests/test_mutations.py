"""The mutation check: no trap is left out, its table is up to date, and it tells hit from miss."""

import ast
import collections
import pathlib
import re

import pytest

from tests import mutate
from tests.mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parent.parent
# What others fell into, and what each method that was added since invites.
TRAPS = """
top-1 without router gradient
softmax twice in the balance loss
balance loss never added to the total
padding counted in the balance loss
padding taking capacity
dropped tokens leaking scaled inputs
jitter leaking into expert inputs
reported loss including auxiliary losses
balance strength changing with devices
an MoE of one expert differing from its dense twin
mixed dense and MoE stacks failing in surgery
names that fail to match become random
a later key overwriting an earlier one
experts from scratch sharing one key
fan-in over stacked experts
resume picking an unfinished save
resume losing rng
async save errors swallowed
a test file skipped as a whole
uniform load taken for health
ragged_dot off TPU
three-dimensional activations around matmuls

loss-free bias entering the weights
loss-free bias moved by its own batch
loss-free bias moved by local load
carried Adam count over fresh slots
Drop-Upcycling with independent index sets
granular router columns tiled, not repeated
second choices placed before first
batch priority ignored
top-p always takes k
all choices counted in GShard's balance loss
label smoothing in the reported loss
frozen leaves decayed
decoding position off by one
cache not causal
KL of a distillation the wrong way round
shared experts scaled by routing weights
dropless padding rows leaking
renormalising before the mask
"""
NUMBERED = [f'{i} {m.trap}' for i, m in enumerate(MUTATIONS)]


def test_no_trap_is_left_out():
  assert set(filter(None, TRAPS.splitlines())) <= {m.trap for m in MUTATIONS}
  assert all(n == 1 for n in collections.Counter((m.trap, m.change) for m in MUTATIONS).values())


@pytest.mark.parametrize('mutation', MUTATIONS, ids=NUMBERED)
def test_the_edit_is_one_that_can_be_made(mutation):
  text = (ROOT / mutation.file).read_text()
  assert text.count(mutation.old) == 1, 'the code has changed: write the edit anew'
  mutated = text.replace(mutation.old, mutation.new)
  assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
  for path in re.findall(r'tests/\S+', mutation.tests):
    assert (ROOT / path).exists()


def test_the_table_has_a_line_for_each_and_names_tests_that_exist():
  rows = [line.strip('| ').split(' | ') for line in mutate.TABLE.read_text().splitlines()
          if line.startswith('| ')][1:]
  assert [row[:3] for row in rows] == [[m.trap, m.change, f'`{m.file}`'] for m in MUTATIONS]
  functions = {}
  for *_, caught in rows:
    path, name = caught.strip('`').split('::')   # a mutation that survived has none
    if path not in functions:
      tree = ast.parse((ROOT / path).read_text())
      functions[path] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert name in functions[path]


def test_what_is_broken_is_caught_and_what_is_not_survives(monkeypatch, tmp_path):
  """On the real tree, by the command itself."""
  [skip] = [m for m in MUTATIONS if m.trap == 'a test file skipped as a whole']
  broken = Mutation('a', 'paths come unsorted', 'moejax/trees/paths.py',
                    'dict(sorted(flat.items()))',
                    'dict(flat.items())', 'tests/trees/test_paths.py')
  harmless = Mutation('b', 'a comment', 'moejax/trees/paths.py', '\nimport jax\n',
                      '\nimport jax  # the library\n', 'tests/trees/test_paths.py')
  monkeypatch.setattr(mutate, 'MUTATIONS', (broken, harmless, skip))
  monkeypatch.setattr(mutate, 'TABLE', tmp_path / 'docs' / 'mutations.md')
  assert mutate.main([]) == 1
  text = mutate.TABLE.read_text()
  assert ('| a | paths come unsorted | `moejax/trees/paths.py` | '
          '`tests/trees/test_paths.py::test_flatten_sorts_by_path_and_unflatten_undoes_it` |'
          ) in text
  assert '| b | a comment | `moejax/trees/paths.py` | **nothing** |' in text
  assert '| `tests/trees/test_paths.py` | `tests/conftest.py::pytest_sessionfinish` |' in text
  lines = text.splitlines()
  assert mutate.table([(harmless, mutate.Verdict('tests/x.py::test_y[1]', '', 0))], text) == (
      text.replace(mutate.SURVIVED + ' |', '`tests/x.py::test_y` |'))   # one line anew
  assert lines[-1].startswith('| a test file') and mutate.table([], text) == text


@pytest.fixture
def tree(tmp_path):
  """A tree with one file and one test of it, which sees whether VALUE is 1."""
  for path, text in {'moejax/value.py': 'VALUE = 1\n',
                     'tests/test_value.py': 'from moejax.value import VALUE\n\n'
                                            'def test_value():\n  assert VALUE == 1\n'}.items():
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(text)
  return tmp_path


def of_value(old, new):
  return Mutation('value', f'{old} to {new}', 'moejax/value.py', old, new, 'tests')


def test_verdicts(tree):
  caught = mutate.judge(of_value('1', '2'), tree)
  assert caught.name == 'tests/test_value.py::test_value' and 'assert 2 == 1' in caught.why
  assert mutate.judge(of_value('1', '1.0'), tree).test == ''
  with pytest.raises(RuntimeError, match='could not run'):   # nothing imports: says nothing
    mutate.judge(of_value('VALUE', 'OTHER'), tree)
  with pytest.raises(ValueError, match='found 0 times'):
    mutate.judge(of_value('3', '2'), tree)
  assert (tree / 'moejax/value.py').read_text() == 'VALUE = 1\n'


def test_a_test_that_fails_anyway_catches_nothing(tree):
  results = [(of_value('1', '2'), mutate.judge(of_value('1', '2'), tree))]
  assert mutate.unmask(results, tree) == results
  (tree / 'moejax/value.py').write_text('VALUE = 3\n')
  [(_, verdict)] = mutate.unmask(results, tree)
  assert not verdict.test


def test_an_unknown_trap_is_named_with_those_there_are(capsys):
  assert mutate.main(['--only=no such trap']) == 1
  assert "no trap contains 'no such trap'" in capsys.readouterr().err
