"""A session that skips fails; one that leaves tests out names them; what takes long exists."""

import shutil
import sys

import pytest

from tests import conftest, fork_server, house

TESTS = {'tests/test_a.py': 'import pytest\n\n@pytest.mark.{mark}\ndef test_a():\n  pass\n',
         'tests/test_b.py': 'def test_b():\n  pass\n'}


def session(folder, mark, *arguments):
  """pytest's exit code and output on two files of one test each; `mark` is that of the first."""
  for path, text in TESTS.items():
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(text.format(mark=mark))
  for name in ('tests/conftest.py', 'tests/xla.py', 'pyproject.toml'):
    shutil.copy(house.ROOT / name, folder / name)
  done = fork_server.run([sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *arguments],
                         cwd=folder, capture_output=True, text=True, timeout=60)
  return done.returncode, done.stdout


@pytest.mark.parametrize('arguments', [(), ('-n', '2')], ids=['one process', 'workers'])
def test_a_skipped_test_fails_the_session(tmp_path, arguments):
  code, text = session(tmp_path, 'skip', *arguments)
  assert code == 1 and 'skipped, which counts as failure: tests/test_a.py::test_a' in text


@pytest.mark.parametrize('arguments', [(), ('-n', '2')], ids=['one process', 'workers'])
def test_tests_that_were_left_out_are_named(tmp_path, arguments):
  code, text = session(tmp_path, 'runs', '-m', 'not runs', *arguments)
  assert code == 0 and 'not run: 1 tests of tests/test_a.py' in text and '1 passed' in text


def test_what_takes_long_exists():
  files = [file for file in house.within(house.read(), 'tests').values()]
  for start, _, _ in conftest.LONG:
    name, _, test = start.partition('::')
    assert any(file.path.startswith(f'tests/{name}') and f'def {test}' in file.text
               for file in files), start
