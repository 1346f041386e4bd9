"""Three text-to-text tasks from the standard library's files that stdlib_text does not train on.

name: the name of a function, from its code. swap: whether two arguments of a call were exchanged.
module: the package that some lines come from. The tasks are mixed in proportion to their size, as
SuperGLUE's are in Komatsuzaki et al. (2023); the tasks and their rules are our own.

An item is a tuple of pairs that are kept or left out together: one pair, or two versions of a call.
"""

import ast
import hashlib
import itertools
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from moejax.data.config import DataConfig
from moejax.data.datasets import stdlib
from moejax.data.source import Source
from moejax.data.text_pairs import Pair, pair_source

TASKS = ('name', 'swap', 'module')
NAME, SWAP, MODULE = range(3)
SPLITS = ('train', 'validation', 'test')
# Files, the largest first, are dealt to splits in this order: 3 / 1 / 1 of every five.
DEAL = ('train', 'validation', 'test', 'train', 'train')
MASK = '_'               # replaces a name that would give the answer away
NAME_BYTES = 31          # longer names are left out: targets fit 32 tokens
CALL_BYTES = 96          # both arguments end within it: 'swap: ' and the call fit 113 tokens
CALL_LINES = 3           # the call's line and two more
SNIPPET_BYTES = 240      # of a snippet of `module`, in whole lines
SNIPPETS = 40            # at most, of one file, evenly spaced
SYMMETRIC = {'max', 'min'}   # functions for which either order of arguments is right

Item = tuple[Pair, ...]


def deal(files: Mapping[str, int]) -> dict[str, str]:
  """{path: size} -> {path: split}, with every package of at least three files in all splits.

  Files of such a package are dealt among themselves, all other files together.
  """
  sizes = Counter(map(package, files))
  dealt = defaultdict(list)   # package, or '' for all other files -> its files
  for path in sorted(files, key=lambda p: (-files[p], p)):
    name = package(path)
    dealt[name if sizes[name] >= len(SPLITS) else ''].append(path)
  order = sorted(dealt, key=lambda name: (not name, name))   # which examples inherit
  return {path: DEAL[n % len(DEAL)] for name in order for n, path in enumerate(dealt[name])}


def package(path: str) -> str:
  """The top-level package of a file; '' for a module outside packages."""
  return path.split('/')[0] if '/' in path else ''


def masked(text: str, word: str) -> str:
  """text with MASK in place of word, also where it has other underscores around it.

  `close` is masked in `self._close()` too, but not in `closed`.
  """
  text = re.sub(rf'(?<!\w){re.escape(word)}(?!\w)', MASK, text)
  core = word.strip('_')
  letter = '[^\\W\\d_]'
  return re.sub(f'(?<!{letter}){re.escape(core)}(?!{letter})', MASK, text) if core else text


def name_items(source: str, tree: ast.AST) -> Iterator[Item]:
  """Functions without decorators and docstring: 'name: def _(self): ...' -> 'the_name'.

  The name is masked everywhere in the code (recursion included).
  """
  lines = source.split('\n')                # ast counts lines so; a form feed ends none
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
  """line moved left by `indent` columns; a comment may start further left than its function."""
  return line.lstrip() if line[:indent].strip() else line[indent:]


def swap_items(path: str, source: str, tree: ast.AST) -> Iterator[Item]:
  """Calls with two arguments exchanged or not: 'swap: f(b, a) ...' -> 'swapped' or 'same'.

  Each call makes two examples, one of either answer, that differ in nothing but the order of the
  arguments. One call per line is taken; a hash chooses it and two of its arguments. The call's line
  comes first, then the next lines.
  """
  lines = source.encode().split(b'\n')      # ast counts columns in bytes
  calls = defaultdict(list)
  for a, b in _argument_pairs(tree):
    calls[a.lineno].append((a, b))
  for number, pairs in sorted(calls.items()):
    line = lines[number - 1]
    indent = len(line) - len(line.lstrip())
    # Parentheses around an argument are not in its span and would stay behind: f((b), a + c).
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

  Left out are calls in f-strings, whose columns older Pythons get wrong, starred arguments, and
  SYMMETRIC functions.
  """
  nodes = [tree]
  while nodes:
    node = nodes.pop()
    if isinstance(node, ast.JoinedStr):
      continue
    nodes.extend(ast.iter_child_nodes(node))
    if not isinstance(node, ast.Call) or getattr(node.func, 'id', '') in SYMMETRIC:
      continue
    plain = [x for x in node.args if not isinstance(x, ast.Starred | ast.GeneratorExp)]
    for n, a in enumerate(plain):
      for b in plain[n + 1:]:
        if a.lineno == b.end_lineno and ast.dump(a) != ast.dump(b):
          yield a, b


def module_items(name: str, source: str) -> Iterator[Item]:
  """Snippets of whole lines: 'module: ...' -> 'asyncio', with the package's name masked.

  It is masked in upper and lower case.
  """
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


def without_repeats(splits: Mapping[str, Sequence[Item]]) -> dict[str, list[Pair]]:
  """{split: its pairs}, with every input in one split only: test, else validation, else train.

  An item is left out if an input of it has two different answers anywhere.
  """
  answers = defaultdict(set)
  for items in splits.values():
    for pair in itertools.chain(*items):
      answers[pair.input].add(pair.target)
  kept, seen = {}, set()
  for split in reversed(SPLITS):
    kept[split] = []
    for item in splits[split]:
      inputs = {pair.input for pair in item}
      if not inputs & seen and all(len(answers[x]) == 1 for x in inputs):
        kept[split] += item
        seen |= inputs
  return {split: kept[split] for split in SPLITS}


def load(config: DataConfig) -> Source:
  """name, swap and module from the validation and test files of stdlib_text, split again by file.

  A file that this Python cannot parse is left out.
  """
  root = stdlib.library_root()
  sources, trees = {}, {}
  for path in stdlib.library_files(root):
    name = path.as_posix()
    if stdlib.split_of(name) != 'train':
      try:
        text = (root / path).read_bytes().decode('utf-8').replace('\r\n', '\n')
        trees[name] = ast.parse(text)
      except (SyntaxError, ValueError):
        continue
      sources[name] = text
  split_of_file = deal({name: len(text) for name, text in sources.items() if text.strip()})
  packages = defaultdict(set)
  for name, split in split_of_file.items():
    packages[package(name)].add(split)
  splits = {split: [] for split in SPLITS}
  for name, split in split_of_file.items():
    items, text = splits[split], sources[name]
    items += name_items(text, trees[name])
    items += swap_items(name, text, trees[name])
    if package(name) and len(packages[package(name)]) == len(SPLITS):
      items += module_items(package(name), text)
  return pair_source(without_repeats(splits), config.metric, TASKS)
