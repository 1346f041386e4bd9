"""A session that skips fails; one that leaves tests out names them; what takes long exists."""

import shutil
import sys

import pytest

from tests import conftest, fork_server, house


@pytest.mark.parametrize('workers', [0, 2])
def test_a_skip_fails_the_session_and_what_is_left_out_is_named(tmp_path, workers):
  (tmp_path / 'tests').mkdir()
  for name, mark in (('a', 'skip'), ('b', 'runs'), ('c', 'usefixtures')):
    (tmp_path / f'tests/test_{name}.py').write_text(
        f'import pytest\n\n@pytest.mark.{mark}\ndef test_{name}():\n  pass\n')
  for name in ('tests/conftest.py', 'tests/xla.py', 'pyproject.toml'):
    shutil.copy(house.ROOT / name, tmp_path / name)
  pytest_with = lambda *arguments: fork_server.run(
      [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', f'-n{workers}', '-m', 'not runs',
       *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
  done = pytest_with()
  assert done.returncode == 1, done.stdout
  assert 'skipped, which counts as failure: tests/test_a.py::test_a' in done.stdout
  assert 'not run: 1 tests of tests/test_b.py' in done.stdout
  (tmp_path / 'tests/test_a.py').unlink()
  if not workers:
    assert pytest_with().returncode == 0


def test_what_takes_long_exists():
  files = [file for file in house.within(house.read(), 'tests').values()]
  for start, _, _ in conftest.LONG:
    name, _, test = start.partition('::')
    assert any(file.path.startswith(f'tests/{name}') and f'def {test}' in file.text
               for file in files), start
