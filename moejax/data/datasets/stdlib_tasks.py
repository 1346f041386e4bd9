"""Three text-to-text tasks from the standard library's files that stdlib_text does not train on.

name: the name of a function, from its code. swap: whether two arguments of a call were exchanged.
module: the package that some lines come from. They are mixed in proportion to their size, as
SuperGLUE's are in Komatsuzaki et al. (2023); the tasks and their rules are our own.
"""

import ast
import hashlib
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from moejax.data.config import DataConfig
from moejax.data.datasets import embedded
from moejax.data.source import Source
from moejax.data.text_pairs import Pair, pair_source

TASKS = ('name', 'swap', 'module')
NAME, SWAP, MODULE = range(3)
SPLITS = ('train', 'validation', 'test')
# Files of a group, the largest first, are dealt in this order: 3 / 1 / 1 of every five.
DEAL = ('train', 'validation', 'test', 'train', 'train')
MASK = '_'               # stands for a name that would give the answer away
NAME_BYTES = 31          # longer names are left out: targets fit 32 tokens
CALL_BYTES = 96          # both arguments end within it: 'swap: ' and the call fit 113 tokens
CALL_LINES = 3           # the call's line and two more
SNIPPET_BYTES = 240      # of a snippet of `module`, in whole lines
SNIPPETS = 40            # at most, of one file, evenly spaced
SYMMETRIC = {'max', 'min'}   # either order is right

# Examples that are kept or left out together: the two versions of a call.
Group = tuple[Pair, ...]


def deal(files: Mapping[str, int]) -> dict[str, str]:
  """Files (path -> size) -> path -> split, so that every package with three files is in all three.

  Files of a package with at least three are dealt among themselves, all others together.
  """
  packages = defaultdict(list)
  for path in files:
    packages[package(path)].append(path)
  groups, rest = [], []
  for name, paths in sorted(packages.items()):
    (groups.append if name and len(paths) >= len(SPLITS) else rest.extend)(paths)
  split = {}
  for paths in [*groups, rest]:
    paths = sorted(paths, key=lambda p: (-files[p], p))
    split |= {path: DEAL[n % len(DEAL)] for n, path in enumerate(paths)}
  return split


def package(path: str) -> str:
  """The top-level package of a file; '' for a module that stands alone."""
  return path.split('/')[0] if '/' in path else ''


def masked(text: str, word: str) -> str:
  """text with MASK for word, and for word less its outer underscores, except within other words.

  `close` goes from `self._close()` too, but not from `closed`.
  """
  text = re.sub(rf'(?<!\w){re.escape(word)}(?!\w)', MASK, text)
  core = word.strip('_')
  letter = '[^\\W\\d_]'
  return re.sub(f'(?<!{letter}){re.escape(core)}(?!{letter})', MASK, text) if core else text


def name_groups(source: str, tree: ast.AST) -> Iterator[Group]:
  """Functions: 'name: def _(self): ...' -> 'the_name'; without decorators and docstring.

  The name is masked wherever it stands (recursion included).
  """
  lines = source.split('\n')                # as ast counts them; a form feed ends none
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    kept = list(range(node.lineno - 1, node.end_lineno))
    if ast.get_docstring(node, clean=False) is not None:
      doc = node.body[0]
      if len(node.body) == 1 or node.body[1].lineno == doc.end_lineno:
        continue                                                   # no code, or on the same line
      kept = [n for n in kept if not doc.lineno - 1 <= n < doc.end_lineno]
    if node.name.strip('_') and len(node.name.encode()) <= NAME_BYTES:
      code = '\n'.join(_outdented(lines[n], node.col_offset) for n in kept if lines[n].strip())
      yield (Pair(f'name: {masked(code, node.name)}'.encode(), node.name.encode(), NAME),)


def _outdented(line: str, indent: int) -> str:
  """line, `indent` columns to the left; a comment may start further left than its function."""
  return line.lstrip() if line[:indent].strip() else line[indent:]


def swap_groups(path: str, source: str, tree: ast.AST) -> Iterator[Group]:
  """Calls: 'swap: f(b, a) ...' -> 'swapped', and the same lines untouched -> 'same'.

  Both versions of every call are examples, of the same characters: nothing but the order of the
  arguments tells them apart, and the answers are balanced. One call of a line is taken; which, and
  which two of its arguments, is drawn by a hash. The call's line comes first, then the next lines.
  """
  lines = source.encode().split(b'\n')      # ast counts columns in bytes
  calls = defaultdict(list)
  for a, b in _argument_pairs(tree):
    calls[a.lineno].append((a, b))
  for number, pairs in sorted(calls.items()):
    line = lines[number - 1]
    indent = len(line) - len(line.lstrip())
    # Parentheses around an argument are not in its span, and would stay: f((b), a + c).
    pairs = [(a, b) for a, b in pairs if b.end_col_offset - indent <= CALL_BYTES
             and line[a.end_col_offset:].lstrip().startswith(b',')
             and line[:b.col_offset].rstrip().endswith(b',')]
    if not pairs:
      continue
    draw = hashlib.sha256(f'{path}:{number}'.encode()).digest()
    a, b = pairs[int.from_bytes(draw[:4], 'big') % len(pairs)]
    first, second = line[a.col_offset:a.end_col_offset], line[b.col_offset:b.end_col_offset]
    swapped = (line[:a.col_offset] + second + line[a.end_col_offset:b.col_offset] + first
               + line[b.end_col_offset:])
    after = [x for x in lines[number:number + CALL_LINES - 1] if x.strip()]
    yield tuple(
        Pair(b'swap: ' + textwrap.dedent(b'\n'.join([x, *after]).decode()).strip().encode(),
             answer, SWAP) for x, answer in ((line, b'same'), (swapped, b'swapped')))


def _argument_pairs(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
  """Pairs of different positional arguments of one call, both on one line, in order.

  Not within f-strings, whose columns older Pythons get wrong; not starred; not where either order
  is right.
  """
  todo = [tree]
  while todo:
    node = todo.pop()
    if isinstance(node, ast.JoinedStr):
      continue
    todo.extend(ast.iter_child_nodes(node))
    if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') in SYMMETRIC:
      continue
    plain = [x for x in node.args if not isinstance(x, ast.Starred | ast.GeneratorExp)]
    for n, a in enumerate(plain):
      for b in plain[n + 1:]:
        if a.lineno == b.end_lineno and ast.dump(a) != ast.dump(b):
          yield a, b


def module_groups(name: str, source: str) -> Iterator[Group]:
  """Runs of lines: 'module: ...' -> 'asyncio'; the package's own name is masked, in any case."""
  snippets, lines, size = [], [], 0
  for line in filter(str.strip, source.split('\n')):
    line = re.sub(re.escape(name), MASK, line, flags=re.IGNORECASE)
    if lines and size + len(line) + 1 > SNIPPET_BYTES:
      snippets.append('\n'.join(lines))
      lines, size = [], 0
    lines.append(line)
    size += len(line) + 1
  snippets += ['\n'.join(lines)] if lines else []
  step = max(len(snippets) / SNIPPETS, 1)
  for n in range(min(len(snippets), SNIPPETS)):
    text = textwrap.dedent(snippets[int(n * step)])
    yield (Pair(f'module: {text}'.encode(), name.encode(), MODULE),)


def without_repeats(splits: Mapping[str, Sequence[Group]]) -> dict[str, list[Pair]]:
  """Split -> its pairs, with every input once in all: in test, else validation, else train.

  An input that has two different answers anywhere is left out, and with it its group.
  """
  answers = defaultdict(set)
  for groups in splits.values():
    for pair in (pair for group in groups for pair in group):
      answers[pair.input].add(pair.target)
  kept, seen = {}, set()
  for split in reversed(SPLITS):
    kept[split] = []
    for group in splits[split]:
      inputs = {pair.input for pair in group}
      if not inputs & seen and all(len(answers[x]) == 1 for x in inputs):
        kept[split] += group
        seen |= inputs
  return {split: kept[split] for split in SPLITS}


def stdlib_tasks(config: DataConfig, window_bytes: int) -> Source:
  """name, swap and module from the validation and test files of stdlib_text, split again by file.

  A file that this Python cannot parse is left out.
  """
  del config, window_bytes
  root = embedded.stdlib_root()
  sources, trees = {}, {}
  for path in embedded.stdlib_files(root):
    name = path.as_posix()
    if embedded.stdlib_split(name) != 'train':
      try:
        text = (root / path).read_bytes().decode('utf-8').replace('\r\n', '\n')
        trees[name] = ast.parse(text)
      except (SyntaxError, ValueError):
        continue
      sources[name] = text
  where = deal({name: len(text) for name, text in sources.items() if text.strip()})
  packages = defaultdict(set)
  for name, split in where.items():
    packages[package(name)].add(split)
  splits = {split: [] for split in SPLITS}
  for name, split in where.items():
    groups, text = splits[split], sources[name]
    groups += name_groups(text, trees[name])
    groups += swap_groups(name, text, trees[name])
    if package(name) and len(packages[package(name)]) == len(SPLITS):
      groups += module_groups(package(name), text)
  return pair_source(without_repeats(splits), 'exact_match', TASKS)
