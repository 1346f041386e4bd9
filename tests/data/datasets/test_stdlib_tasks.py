"""Tasks from the standard library: inputs, targets, what is masked; splits that share no file."""

import ast
import collections
import re
import subprocess
import sys

import pytest

from moejax import data
from moejax.data.datasets import stdlib
from moejax.data.datasets import stdlib_tasks as tasks
from moejax.data.text_pairs import Pair

CONFIG = data.DataConfig(source='stdlib_tasks')

FUNCTIONS = '''\
class Tree:
  @walk.register
  def walk(self, depth):
    """Walks it.

    More on walk.
    """
    # walks on

    for child in self.children:
  # of old
      child.walk(depth + 1)
      self._walk(walker)

  def __enter__(self): return super().__enter__()

def empty():
  """Nothing but words."""
'''


@pytest.fixture(scope='module')
def source():
  return tasks.load(CONFIG)


def examples(source, split, task):
  return [e for e in source.splits[split] if e['task'] == task]


def test_names_by_hand():
  assert list(tasks.name_items(FUNCTIONS, ast.parse(FUNCTIONS))) == [
      (Pair(b'name: def _(self, depth):\n  # walks on\n  for child in self.children:\n'
            b'# of old\n    child._(depth + 1)\n    self.__(walker)', b'walk', tasks.NAME),),
      (Pair(b'name: def _(self): return super()._()', b'__enter__', tasks.NAME),)]


def test_calls_by_hand():
  code = ('if f(b, max(a, b)):\n  g(*x, y)\n  h((p), q + 1)\n\n  k(m[0], s="é", *z)\n'
          '  é = call("é",  n, key=0)\n  two(1,\n      2)\n'
          '  say(f"{f(x, y)}")\n')
  # Line 1: b with max(a, b); max itself is symmetric. g has one plain argument; in h parentheses
  # would stay behind; k has one; columns after é are bytes; two's arguments are on two lines; say's
  # call in an f-string is left alone.
  got = [[(p.input.decode(), p.target) for p in item]
         for item in tasks.swap_items('f.py', code, ast.parse(code))]
  assert got == [
      [('swap: if f(b, max(a, b)):\n  g(*x, y)\n  h((p), q + 1)', b'same'),
       ('swap: if f(max(a, b), b):\n  g(*x, y)\n  h((p), q + 1)', b'swapped')],
      [('swap: é = call("é",  n, key=0)\ntwo(1,\n    2)', b'same'),
       ('swap: é = call(n,  "é", key=0)\ntwo(1,\n    2)', b'swapped')]]


def test_modules_by_hand():
  # 9 bytes (masked, with its end of line), 224 and 8: 241 are one too many for one snippet.
  code = f'import asyncio\n\nx = asyncio_one  # AsyncIO{" " * 209}\n  y = 1\n{"z" * 300}'
  got = [item[0] for item in tasks.module_items('asyncio', code)]
  assert [p.input for p in got] == [
      b'module: import _\nx = __one  # _' + b' ' * 209, b'module: y = 1',
      b'module: ' + b'z' * 300]
  assert {(p.target, p.task) for p in got} == {(b'asyncio', tasks.MODULE)}
  many = '\n'.join(f'{n:0239d}' for n in range(100))
  kept = [int(item[0].input.split()[1]) for item in tasks.module_items('m', many)]
  assert len(kept) == tasks.SNIPPETS and kept[:4] == [0, 2, 5, 7] and kept[-1] == 97


def test_files_are_dealt_by_size_within_packages():
  sizes = {'p/a.py': 9, 'p/b.py': 8, 'p/c.py': 7, 'p/d.py': 6, 'q/a.py': 5, 'q/b.py': 30,
           'x.py': 20, 'y.py': 10, 'z.py': 10}
  assert tasks.deal(sizes) == {
      'p/a.py': 'train', 'p/b.py': 'validation', 'p/c.py': 'test', 'p/d.py': 'train',
      # Two files are no package to learn: they go among the others.
      'q/b.py': 'train', 'x.py': 'validation', 'y.py': 'test', 'z.py': 'train', 'q/a.py': 'train'}


def test_repeats_and_ambiguous_inputs():
  def one(text, target):
    return (Pair(text, target),)
  both = (Pair(b'f(a, b)', b'same'), Pair(b'f(b, a)', b'swapped'))
  mirrored = (Pair(b'f(b, a)', b'same'), Pair(b'f(a, b)', b'swapped'))
  got = tasks.without_repeats({
      'train': [one(b'1', b'x'), one(b'2', b'x'), one(b'2', b'x'), both, one(b'4', b'x')],
      'validation': [one(b'1', b'x'), one(b'4', b'y')],
      'test': [mirrored, one(b'3', b'x')]})
  assert got == {'train': [Pair(b'2', b'x')], 'validation': [Pair(b'1', b'x')],
                 'test': [Pair(b'3', b'x')]}


def test_every_example_comes_from_files_of_its_split_and_none_that_stdlib_text_trains_on(source):
  root, text = stdlib.library_root(), {}
  for path in stdlib.library_files(root):
    if stdlib.split_of(path.as_posix()) != 'train':
      text[path.as_posix()] = (root / path).read_bytes().decode()
  split_of = tasks.deal({path: len(t) for path, t in text.items() if t.strip()})
  assert len(split_of) > 40
  assert {split_of[path] for path in split_of if path.startswith('asyncio/')} == set(tasks.SPLITS)
  trained = stdlib.load(CONFIG).splits['train']._text
  assert b'class ThreadPoolExecutor(_base.Executor):' in trained
  assert not any(text[path].encode() in trained for path in split_of if len(text[path]) > 500)
  whole = {s: '\n'.join(text[p] for p in split_of if split_of[p] == s) for s in tasks.SPLITS}
  inputs = {s: {e['input'] for e in source.splits[s]} for s in tasks.SPLITS}
  for s in tasks.SPLITS:
    calls = [e for e in examples(source, s, tasks.SWAP) if e['target'] == b'same']
    defined = set(re.findall(r'def\s+(\w+)', whole[s]))
    assert {e['target'].decode() for e in examples(source, s, tasks.NAME)} <= defined
    assert all(e['input'].decode().removeprefix('swap: ').split('\n')[0] in whole[s]
               for e in calls)
    assert all(not inputs[s] & inputs[t] for t in tasks.SPLITS if t != s)


def test_sizes(source):
  """On this Python; other versions differ by a few per cent."""
  for split, least in (('train', (500, 1000, 300)), ('validation', (80, 150, 80)),
                       ('test', (80, 150, 60))):
    count = collections.Counter(e['task'] for e in source.splits[split])
    assert all(count[task] >= n for task, n in enumerate(least)), (split, count)
  labels = [{e['target'] for e in examples(source, s, tasks.MODULE)} for s in tasks.SPLITS]
  assert labels[0] == labels[1] == labels[2] and len(labels[0]) >= 5


def test_no_answer_is_left_in_its_input(source):
  checked = 0
  for split in tasks.SPLITS:
    for e in examples(source, split, tasks.MODULE):
      assert e['target'] not in e['input'].removeprefix(b'module: ').lower()
    for e in examples(source, split, tasks.NAME):
      text, name = e['input'].decode().removeprefix('name: '), e['target'].decode()
      assert re.match(r'(async )?def _ ?\(', text), text
      assert name not in re.findall(r'\w+', text)
      core = name.strip('_')
      if core.isalpha():   # between underscores or digits too: _close, close2
        assert core not in re.findall('[^\\W\\d_]+', text)
        checked += 1
      assert len(name) <= tasks.NAME_BYTES
  assert checked > 500


def test_swapped_calls_differ_in_order_alone(source):
  for split in tasks.SPLITS:
    spelt = {answer: collections.Counter(
        bytes(sorted(e['input'])) for e in examples(source, split, tasks.SWAP)
        if e['target'] == answer) for answer in (b'same', b'swapped')}
    # The same number, the same lengths, the same characters; and no text has both answers.
    assert spelt[b'same'] == spelt[b'swapped']
    texts = [e['input'] for e in examples(source, split, tasks.SWAP)]
    assert len(set(texts)) == len(texts) == 2 * sum(spelt[b'same'].values())
    for e in examples(source, split, tasks.SWAP):
      assert len(e['input'].split(b'\n')[0]) - len(b'swap: ') >= 6


def test_another_process_makes_the_same_tasks(source):
  code = ('from moejax.data import DataConfig, registry\n'
          "print(registry.load(DataConfig(source='stdlib_tasks')).digest)")
  again = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                         env={'PYTHONHASHSEED': '7', 'PATH': '', 'PYTHONPATH': ':'.join(sys.path)})
  assert again.stdout.strip() == source.digest
