"""Measures the code: rooms, imports, sizes; and prints them, before and after.

    python -m tests.house            the working tree
    python -m tests.house REVISION   that revision of git beside the working tree

A room is a package (moejax/moe) or a folder of tests (tests/moe). `tests/test_layout.py` holds the
working tree to the rules; this file only finds out.
"""

import argparse
import ast
import collections
import contextlib
import dataclasses
import functools
import io
import pathlib
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ('moejax', 'configs', 'experiments', 'tests')   # each may import those before it
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
MANY = 7   # parameters
REASON = 'Many parameters: '   # in a docstring: why there are more
FAMILY_CLASSES = ('T5Config', 'ViTConfig', 'DecoderOnlyConfig')


@dataclasses.dataclass(frozen=True)
class File:
  """A Python file of the tree.

  Attributes:
    path: from the root, as 'moejax/moe/layer.py'.
    text: its content.
  """
  path: str
  text: str

  @property
  def name(self) -> str:
    """Dotted name, as 'moejax.moe.layer'; a package has the name of its folder."""
    return self.path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')

  @property
  def is_package(self) -> bool:
    return self.path.endswith('/__init__.py')

  @functools.cached_property
  def tree(self) -> ast.Module:
    return ast.parse(self.text)

  @functools.cached_property
  def imported(self) -> list[tuple[str, str]]:
    """(module, module.name) of each name that is imported from one; (module, module) of modules."""
    found = []
    for node in ast.walk(self.tree):
      if isinstance(node, ast.ImportFrom) and node.module:
        found += [(node.module, f'{node.module}.{alias.name}') for alias in node.names]
      elif isinstance(node, ast.Import):
        found += [(alias.name, alias.name) for alias in node.names]
    return found

  @property
  def lines(self) -> int:
    return len(self.text.splitlines())

  @property
  def room(self) -> str:
    """Its folder, at most two deep: 'moejax/data' for moejax/data/datasets/glyphs.py."""
    return '/'.join(self.path.split('/')[:-1][:2])


def read(root: pathlib.Path = ROOT) -> dict[str, File]:
  """{name: File} of all Python files below root/PACKAGES."""
  files = [File(str(path.relative_to(root)), path.read_text()) for package in PACKAGES
           for path in sorted((root / package).rglob('*.py'))]
  return {file.name: file for file in files}


def is_command(text: str) -> bool:
  """Whether a file can be run by python -m."""
  return bool(re.search("^if __name__ == '__main__'", text, re.MULTILINE))


def imports(file: File, names: Iterable[str]) -> set[str]:
  """Those of `names` that a file imports, at its top or within a function."""
  return {full if full in names else module for module, full in file.imported} & set(names) - {
      file.name}


def circles(files: dict[str, File]) -> list[tuple[str, ...]]:
  """Sets of files that all reach each other by imports, each sorted."""
  direct = {name: imports(file, files) for name, file in files.items()}
  reached = {name: _reachable(name, direct) for name in files}
  return sorted({tuple(sorted(n for n in reached[name] if name in reached[n]))
                 for name in files if name in reached[name]})


def _reachable(name: str, direct: dict[str, set[str]]) -> set[str]:
  seen, ahead = set(), [*direct[name]]
  while ahead:
    if (other := ahead.pop()) not in seen:
      seen.add(other)
      ahead += direct[other]
  return seen


def functions(file: File) -> Iterator[tuple[str, FUNCTION, str]]:
  """(qualified name, node, docstring) of each function; an __init__'s docstring is the class's."""
  def walk(node, prefix, of_class):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.ClassDef):
        yield from walk(child, f'{prefix}{child.name}.', ast.get_docstring(child) or '')
      elif isinstance(child, FUNCTION):
        doc = (ast.get_docstring(child) or '') + (of_class if child.name == '__init__' else '')
        yield f'{prefix}{child.name}', child, doc
        yield from walk(child, f'{prefix}{child.name}.', '')
      else:
        yield from walk(child, prefix, of_class)
  return walk(file.tree, '', '')


def parameters(node: FUNCTION) -> int:
  """How many parameters a function has, without self and cls."""
  names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
  return len([name for name in names if name not in ('self', 'cls')])


def long_functions(file: File, limit: int = 60) -> set[str]:
  """Names of functions with `limit` lines or more."""
  return {f'{file.name}:{name}' for name, node, _ in functions(file)
          if node.end_lineno - node.lineno >= limit}


def many_parameters(file: File) -> set[str]:
  """Names of functions with more than 7 parameters and no 'Many parameters: WHY' in docstrings."""
  return {f'{file.name}:{name}' for name, node, doc in functions(file)
          if parameters(node) > MANY and REASON not in doc}


def fragments(files: dict[str, File], limit: int = 60) -> set[str]:
  """Files under `limit` lines that exactly one file imports, and that are no command.

  No fragment is a file whose importer is its package, which hands its names on.
  """
  importers = collections.defaultdict(set)
  for name, file in files.items():
    for other in imports(file, files):
      importers[other].add(name)
  return {name for name, file in files.items()
          if file.lines < limit and len(importers[name]) == 1 and not file.is_package
          and not any(files[n].is_package for n in importers[name])
          and not is_command(file.text)}


def family_branches(file: File) -> list[int]:
  """Lines where code asks which family of model it has: x.family == 'vit', isinstance(x, T5Config).

  A `match` on the family is one too; a table {family: value} is not.
  """
  def asks(node):
    if isinstance(node, ast.Compare):
      return any(_is_family(side) for side in (node.left, *node.comparators))
    if isinstance(node, ast.Match):
      return _is_family(node.subject)
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'isinstance':
      return any(getattr(n, 'attr', getattr(n, 'id', '')) in FAMILY_CLASSES
                 for n in ast.walk(node.args[1]))
    return False
  return sorted(node.lineno for node in ast.walk(file.tree) if asks(node))


def _is_family(node: ast.AST) -> bool:
  return isinstance(node, ast.Attribute) and node.attr == 'family'


def within(files: dict[str, File], *packages: str) -> dict[str, File]:
  """The files of some packages."""
  return {name: file for name, file in files.items() if file.path.split('/')[0] in packages}


def totals(files: dict[str, File]) -> dict[str, int]:
  """What the tree is measured by, beside its lines."""
  code = within(files, 'moejax', 'experiments')
  return {
      'circles between files': len(circles(code)),
      f'functions with over {MANY} parameters': sum(
          parameters(node) > MANY for file in code.values() for _, node, _ in functions(file)),
      '... and no reason given': sum(len(many_parameters(file)) for file in code.values()),
      'functions of 60 lines or more': sum(len(long_functions(f)) for f in code.values()),
      'files over 500 lines': sum(file.lines > 500 for file in files.values()),
      'fragments (under 60 lines, one importer)': len(fragments(code)),
      'branches on the family outside models/': sum(
          len(family_branches(file)) for name, file in code.items()
          if not name.startswith('moejax.models'))}


def rooms(files: dict[str, File]) -> dict[str, tuple[int, int]]:
  """{room: (files, lines)}."""
  found = collections.defaultdict(lambda: (0, 0))
  for file in files.values():
    count, lines = found[file.room]
    found[file.room] = count + 1, lines + file.lines
  return dict(sorted(found.items()))


def table(*trees: dict[str, File]) -> str:
  """Markdown: files and lines of each room and package, and the totals; trees side by side."""
  measured = [rooms(files) for files in trees]
  for files, measure in zip(trees, measured):
    for package in PACKAGES:
      own = within(files, package).values()
      measure[f'**{package}**'] = len(own), sum(file.lines for file in own)
    measure['**all**'] = len(files), sum(file.lines for file in files.values())
  names = sorted(set().union(*measured), key=lambda room: (room.startswith('*'), room))
  rows = [[name, *(str(n) for measure in measured for n in measure.get(name, ('', '')))]
          for name in names]
  every = [totals(files) for files in trees]
  rows += [[name, *(text for total in every for text in ('', str(total[name])))]
           for name in every[0]]
  head = [['room', *(['files', 'lines'] * len(trees))], ['---', *['---:'] * (2 * len(trees))]]
  return '\n'.join(f'| {" | ".join(row)} |' for row in head + rows)


@contextlib.contextmanager
def at(revision: str) -> Iterator[pathlib.Path]:
  """The tree of a revision, in a temporary folder."""
  packed = subprocess.run(['git', 'archive', '--format=tar', revision, *PACKAGES], cwd=ROOT,
                          capture_output=True, check=True).stdout
  with tempfile.TemporaryDirectory() as folder:
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
      tar.extractall(folder, filter='data')
    yield pathlib.Path(folder)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('revision', nargs='?', help='a revision of git to compare with')
  flags = parser.parse_args()
  trees = [read()]
  if flags.revision:
    with at(flags.revision) as folder:
      trees.insert(0, read(folder))
  print(table(*trees))


if __name__ == '__main__':
  main()
