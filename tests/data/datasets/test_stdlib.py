"""The standard library's source text: its files, its chunks, its splits."""

from moejax import data
from moejax.data.datasets import stdlib


def test_chunks_give_room_for_a_window_at_any_offset():
  # A file of 10 bytes at stride 4: chunks 0..6 and 4..9; one of 3 bytes is left out.
  chunks = stdlib.TextChunks([b'0123456789', b'abc', b'ABCD'], 4)
  assert [chunks[i]['text'] for i in range(len(chunks))] == [b'0123456', b'456789', b'ABCD']


def test_files_leave_out_tests_and_builds(tmp_path):
  for name in ('a.py', 'b/c.py', 'b/test/d.py', 'tests/e.py', 'idlelib/idle_test/f.py', 'g.txt',
               'site-packages/h.py', '__pycache__/i.py', '_sysconfigdata__linux.py',
               'config-3.11-x/j.py'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text('')
  assert [f.as_posix() for f in stdlib.library_files(tmp_path)] == ['a.py', 'b/c.py']


def test_splits_are_by_file():
  source = stdlib.load(data.DataConfig(source='stdlib_text'))   # windows of 127 bytes
  sizes = {name: len(chunks) for name, chunks in source.splits.items()}
  assert sizes['train'] > 50_000 and min(sizes['validation'], sizes['test']) > 1000
  # A line of one file only; its windows are all in one split.
  line = b'class ThreadPoolExecutor(_base.Executor):'
  homes = {name for name, chunks in source.splits.items() if line in chunks._text}
  assert len(homes) == 1
  example = source.splits['train'][123]['text']
  assert 127 <= len(example) <= 253
