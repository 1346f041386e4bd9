"""Breaks the code on purpose, one known trap at a time, and asks which test notices.

    python -m tests.mutate                 all of tests/mutations.py; writes docs/mutations.md
    python -m tests.mutate --only=jitter   those whose trap contains the word; the lines of the
                                           others stay as they are

Each mutation is one edit of a copy of the tree, on which the tests it names run until the first
failure. At the end the tests that failed run on the unbroken tree: only one that passes there has
caught anything. A mutation that no test notices is a hole in the tests: exit code 1.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

from tests.mutations import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / 'docs' / 'mutations.md'
COPIED = ('moejax', 'configs', 'experiments', 'tests', 'docs', 'README.md', 'pyproject.toml')
SKIP_GUARD = 'tests/conftest.py::pytest_sessionfinish'   # fails a session that skipped a test
SURVIVED = '**nothing**'
HEAD = (
    '# Mutations: the traps, and the test that catches each',
    '',
    'Each line is one small edit that puts a mistake into the code which somebody, somewhere, once',
    'made (or which this code invites), and the first test that failed on it. That test passes',
    'without the edit. The table is written by',
    '',
    '    python -m tests.mutate',
    '',
    'from [tests/mutations.py](../tests/mutations.py), where the edits stand. A line that ended in',
    f'{SURVIVED} would be a hole in the tests; `tests/test_mutations.py` allows none.',
    '',
    '| trap | broken on purpose | in | caught by |', '|---|---|---|---|')
LIMIT = 600   # seconds of one run of pytest


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What became of a mutation.

  Attributes:
    test: the first test that failed, with its parameters; '' if none did.
    why: the last word of that test.
    seconds: of the run.
  """
  test: str
  why: str
  seconds: float

  @property
  def name(self) -> str:
    """The test without its parameters: 'tests/x.py::test_y'."""
    return self.test.split('[')[0]


def copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what tests need."""
  for name in COPIED:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name,
                      ignore=shutil.ignore_patterns('__pycache__', '.*'))
    elif (source / name).exists():
      shutil.copy(source / name, target / name)


def apply(mutation: Mutation, root: pathlib.Path) -> None:
  """Edits the file under root; ValueError unless `old` occurs in it exactly once."""
  path = root / mutation.file
  text = path.read_text()
  if text.count(mutation.old) != 1:
    raise ValueError(f'{mutation.trap}: found {text.count(mutation.old)} times, not once, in '
                     f'{mutation.file}: {mutation.old!r}')
  path.write_text(text.replace(mutation.old, mutation.new))


def pytest(root: pathlib.Path, base: pathlib.Path,
           arguments: list[str]) -> subprocess.CompletedProcess:
  """Runs tests of the tree at root in a process of their own; what it compiles is kept in base."""
  command = [sys.executable, '-m', 'pytest', '-q', '-rfE', '--tb=no', '-p', 'no:cacheprovider']
  env = os.environ | {'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1', 'COLUMNS': '200'}
  env |= {'JAX_COMPILATION_CACHE_DIR': str(base / '.cache'),   # most stays the same
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1'}
  return subprocess.run(command + arguments, cwd=root, env=env, capture_output=True, text=True,
                        timeout=LIMIT, check=False)


def failures(done: subprocess.CompletedProcess) -> list[tuple[str, str]]:
  """(test with its parameters, why) of each one that failed."""
  return re.findall(r'^(?:FAILED|ERROR) (.+?)(?: - (.*))?$', done.stdout, re.MULTILINE)


def judge(mutation: Mutation, base: pathlib.Path) -> Verdict:
  """Runs the mutation's tests on a mutated copy of base.

  Raises:
    ValueError: the edit does not apply.
    RuntimeError: the tests could not be run: there are none, or a file does not import.
    subprocess.TimeoutExpired: they took too long.
  """
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    copy_tree(base, root)
    apply(mutation, root)
    done = pytest(root, base, ['-x', *shlex.split(mutation.tests)])
  if done.returncode not in (0, 1):
    raise RuntimeError(f'{mutation.trap}: pytest could not run\n{done.stdout}\n{done.stderr}')
  # 1 without a failed test: conftest.py refused the session.
  test, why = (failures(done) or [(SKIP_GUARD, 'skipped')])[0] if done.returncode else ('', '')
  return Verdict(test, why, time.perf_counter() - start)


def unmask(results: list[tuple[Mutation, Verdict]],
           base: pathlib.Path) -> list[tuple[Mutation, Verdict]]:
  """The results, without the tests that fail on the unbroken tree too: they have caught nothing."""
  chosen = set()
  for mutation, verdict in results:
    if verdict.test:
      chosen |= set(shlex.split(mutation.tests) if verdict.test == SKIP_GUARD else [verdict.test])
  if not chosen:
    return results
  done = pytest(base, base, sorted(chosen))
  failed = {test for test, _ in failures(done)}
  if done.returncode not in (0, 1) or (done.returncode and not failed):
    raise RuntimeError(f'pytest could not run on the unbroken tree\n{done.stdout}\n{done.stderr}')
  for test in sorted(failed):
    print(f'fails without any mutation: {test}', file=sys.stderr)
  return [(m, dataclasses.replace(v, test='') if v.test in failed else v) for m, v in results]


def line(mutation: Mutation, test: str) -> str:
  """A line of the table; test is the name of the one that caught it, or ''."""
  cells = [mutation.trap, mutation.change, f'`{mutation.file}`', f'`{test}`' if test else SURVIVED]
  return '| ' + ' | '.join(cell.replace('|', r'\|') for cell in cells) + ' |'


def table(results: list[tuple[Mutation, Verdict]], old: str = '') -> str:
  """docs/mutations.md; of mutations without a result the lines are taken from the old one."""
  before = old.splitlines()
  after = {m: line(m, v.name) for m, v in results}
  kept = {m: row for m in MUTATIONS for row in before
          if row.startswith(line(m, '').removesuffix(f'{SURVIVED} |'))}
  rows = [after.get(m) or kept[m] for m in MUTATIONS if m in after or m in kept]
  return '\n'.join([*HEAD, *rows]) + '\n'


def run(mutations: list[Mutation], workers: int) -> list[tuple[Mutation, Verdict]]:
  """Judges all, several at a time, and checks the tests that caught them on the unbroken tree."""
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)   # so that nobody's edits meanwhile are taken for mutations
    copy_tree(ROOT, base)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, tqdm(
        total=len(mutations), unit='mutation') as bar:
      def one(mutation):
        verdict = judge(mutation, base)
        bar.update()
        bar.write(f'{mutation.trap}: {mutation.change}: {verdict.test or "SURVIVED"} '
                  f'({verdict.seconds:.0f} s) {verdict.why[:120]}')
        return mutation, verdict
      try:
        results = list(pool.map(one, mutations))
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    print('the tests that failed, on the unbroken tree ...', file=sys.stderr)
    return unmask(results, base)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='mutations whose trap contains this word')
  parser.add_argument('--workers', type=int, default=2, help='mutations at a time')
  flags = parser.parse_args(argv)
  chosen = [m for m in MUTATIONS if flags.only.lower() in m.trap.lower()]
  if not chosen:
    print(f'--only: no trap contains {flags.only!r}; there are: '
          + '; '.join(dict.fromkeys(m.trap for m in MUTATIONS)), file=sys.stderr)
    return 1
  results = run(chosen, flags.workers)
  TABLE.parent.mkdir(exist_ok=True)
  TABLE.write_text(table(results, TABLE.read_text() if TABLE.exists() else ''))
  return int(any(not verdict.test for _, verdict in results))


if __name__ == '__main__':
  sys.exit(main())
