"""Breaks the code on purpose, one known trap at a time, and finds the test that notices.

    python -m tests.mutations.run               all of edits.py; writes table.md
    python -m tests.mutations.run --only=WORD   traps that contain WORD; other lines stay

Each mutation is one edit of a copy of the tree, on which its tests run until the first failure. At
the end the tests that failed run on the unbroken tree: only one that passes there has caught
anything. A mutation that no test notices is a hole in the tests: exit code 1.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

from tqdm import tqdm

from tests import house
from tests.mutations import edits

ROOT = house.ROOT
TABLE = ROOT / 'tests/mutations/table.md'
COPIED = ('moejax', 'configs', 'experiments', 'tests', 'pyproject.toml')
SKIP_GUARD = 'tests/conftest.py::pytest_sessionfinish'   # fails a session that skipped a test
WILDCARDS = {'$': '(.*)', '@': r'([\w.]+)'}
SURVIVED = '**nothing**'
HEAD = '''# Mutations: the traps, and the test that catches each

Each line is one small edit that makes a known mistake, and the first test that failed on it; the
test passes without the edit. `make mutations` writes this file from [edits.py](edits.py). A line
that ends in **nothing** is a hole in the tests.

| trap | in | edit | caught by |
|---|---|---|---|
'''


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One edit; see edits.py."""
  trap: str
  where: str
  pattern: str
  replacement: str
  tests: str

  @property
  def cells(self) -> str:
    """The line of the table, but for the test that caught it."""
    code = lambda text: '`' + ' ⏎ '.join(text.split('\n')).replace('|', r'\|') + '`'
    return f'| {self.trap} | `{self.where}` | {code(self.pattern)} → {code(self.replacement)} | '


MUTATIONS = tuple(Mutation(trap, *edit) for group in (edits.TRAPS, edits.OTHERS)
                  for trap, listed in group.items() for edit in listed)


@functools.cache
def definitions(root: pathlib.Path) -> dict[str, list[tuple[pathlib.Path, ast.AST]]]:
  """{dotted name: [(file, node)]} of modules, classes, functions and constants of a tree."""
  found = {}
  def walk(node, name, path):
    found.setdefault(name, []).append((path, node))
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
        walk(child, f'{name}.{child.name}', path)
      elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
        found.setdefault(f'{name}.{child.targets[0].id}', []).append((path, child))
  for file in house.read(root).values():
    walk(file.tree, file.name, root / file.path)
  return found


def named(where: str, root: pathlib.Path) -> list[tuple[pathlib.Path, ast.AST]]:
  """(file, node) of each definition whose name ends in `where`, or of each module below it."""
  return [place for name, places in definitions(root).items() for place in places
          if name.startswith('tests.') == where.startswith('tests.')
          and (f'.{name}'.endswith(f'.{where}')
               or name.startswith(f'{where}.') and isinstance(place[1], ast.Module))]


def mutate(mutation: Mutation, root: pathlib.Path) -> tuple[pathlib.Path, str]:
  """(file, its text after the edit). Raises ValueError unless the edit applies exactly once."""
  pattern = ''.join(WILDCARDS.get(part) or re.escape(part)
                    for part in re.split('([$@])', mutation.pattern))
  places = named(mutation.where, root)
  found = [(path, node, source) for path, node in places
           for source in [ast.unparse(node)] for _ in re.findall(pattern, source)]
  if len(found) != 1:
    raise ValueError(f'{mutation.trap}: found {len(found)} times, not once: {mutation.pattern!r} '
                     f'in {mutation.where}, which is the name of {len(places)}:\n'
                     + '\n'.join(ast.unparse(node) for _, node in places))
  [(path, node, source)] = found
  def replace(match):
    texts = iter(match.groups())
    return re.sub('[$@]', lambda _: next(texts), mutation.replacement)
  changed = re.sub(pattern, replace, source)
  if changed == source:
    raise ValueError(f'{mutation.trap}: the edit of {mutation.where} changes nothing')
  if isinstance(node, ast.Module):
    return path, changed
  lines = path.read_text().splitlines(keepends=True)
  first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', []))]) - 1
  margin = ' ' * node.col_offset
  lines[first:node.end_lineno] = [f'{margin}{line}\n' for line in changed.splitlines()]
  return path, ''.join(lines)


def copy_tree(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what tests need."""
  for name in COPIED:
    if (source / name).is_dir():
      shutil.copytree(source / name, target / name,
                      ignore=shutil.ignore_patterns('__pycache__', '.*'))
    elif (source / name).exists():
      shutil.copy(source / name, target / name)


def pytest(root: pathlib.Path, base: pathlib.Path, arguments: list[str]) -> tuple[list[str], bool]:
  """Runs tests of the tree at root.

  Returns:
    The tests that failed, with their parameters, and whether the session passed.

  Raises:
    RuntimeError: they could not be run: there are none, or a file does not import.
    subprocess.TimeoutExpired: they took longer than ten minutes.
  """
  env = os.environ | {
      'PYTHONPATH': str(root), 'PYTHONDONTWRITEBYTECODE': '1', 'COLUMNS': '200',
      'JAX_COMPILATION_CACHE_DIR': str(base / '.cache')}   # most programs are unchanged
  done = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-rfE', '--tb=no', '-p', 'no:cacheprovider', '-n0',
       *arguments], cwd=root, env=env, capture_output=True, text=True, timeout=600)
  failed = re.findall(r'^(?:FAILED|ERROR) (.+?)(?: - .*)?$', done.stdout, re.MULTILINE)
  if done.returncode not in (0, 1):
    raise RuntimeError(f'{arguments}: pytest could not run\n{done.stdout}\n{done.stderr}')
  return failed, not done.returncode


def judge(mutation: Mutation, base: pathlib.Path) -> str:
  """The first test that fails on a mutated copy of base, with its parameters; '' if none does.

  Raises ValueError where the edit does not apply, and what `pytest` raises.
  """
  path, text = mutate(mutation, base)
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    copy_tree(base, root)
    (root / path.relative_to(base)).write_text(text)
    failed, passed = pytest(root, base, ['-x', *shlex.split(f'tests/{mutation.tests}')])
  return '' if passed else failed[0] if failed else SKIP_GUARD


def unmask(caught: dict[Mutation, str], base: pathlib.Path) -> dict[Mutation, str]:
  """Without the tests that fail on the unbroken tree too: they have caught nothing."""
  chosen = {word for mutation, test in caught.items() if test for word in (
      shlex.split(f'tests/{mutation.tests}') if test == SKIP_GUARD else [test])}
  failed, passed = pytest(base, base, sorted(chosen)) if chosen else ([], True)
  if not passed and not failed:
    raise RuntimeError('the unbroken tree skips a test')
  for test in failed:
    print(f'fails without any mutation: {test}', file=sys.stderr)
  return {mutation: '' if test in failed else test for mutation, test in caught.items()}


def table(caught: dict[Mutation, str], old: str = '') -> str:
  """table.md; lines of mutations that were not judged are those of the old one."""
  rows = []
  for m in MUTATIONS:
    kept = [line for line in old.splitlines() if line.startswith(m.cells)]
    rows += [m.cells + (f'`{caught[m].split("[")[0]}` |' if caught[m] else f'{SURVIVED} |')
             ] if m in caught else kept
  return HEAD + ''.join(f'{row}\n' for row in rows)


def judge_all(mutations: list[Mutation], workers: int) -> dict[Mutation, str]:
  """{mutation: the test that caught it, or ''}."""
  with tempfile.TemporaryDirectory() as folder:
    base = pathlib.Path(folder)   # so that edits of the tree meanwhile are not taken for mutations
    copy_tree(ROOT, base)
    caught = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, tqdm(
        total=len(mutations), unit='mutation') as bar:
      jobs = {pool.submit(judge, m, base): m for m in mutations}
      for job in concurrent.futures.as_completed(jobs):
        try:
          caught[jobs[job]] = job.result()
        except BaseException:
          pool.shutdown(cancel_futures=True)
          raise
        bar.update()
        bar.write(f'{jobs[job].trap}: {jobs[job].where}: {job.result() or "SURVIVED"}')
    return unmask(caught, base)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--only', default='', help='mutations whose trap contains this word')
  parser.add_argument('--workers', type=int, default=2, help='mutations at a time')
  flags = parser.parse_args(argv)
  chosen = [m for m in MUTATIONS if flags.only.lower() in m.trap.lower()]
  if not chosen:
    sys.exit(f'--only: no trap contains {flags.only!r}; there are: '
             + '; '.join(dict.fromkeys(m.trap for m in MUTATIONS)))
  caught = judge_all(chosen, flags.workers)
  TABLE.write_text(table(caught, TABLE.read_text() if TABLE.exists() else ''))
  return int(not all(caught.values()))


if __name__ == '__main__':
  sys.exit(main())
