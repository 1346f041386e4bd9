"""The README's numbers are those of the committed results, and its commands exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_the_quickstart_table_is_the_committed_one():
  results = (ROOT / 'experiments' / 'results' / 'quickstart' / 'quickstart.md').read_text()
  rows = [line for line in results.splitlines() if line.startswith(('|', '**'))]
  assert len(rows) > 10
  assert all(row in README for row in rows)


def test_the_commands_name_what_is_there():
  modules = re.findall(r'python -m ((?:moejax|experiments)[\w.]*)', README)
  assert {'moejax.main', 'experiments.main', 'experiments.report'} <= set(modules)
  assert all((ROOT / m.replace('.', '/')).with_suffix('.py').exists() for m in modules)
  files = re.findall(r'(?:configs|tests|moejax|experiments)/[\w/]+\.py', README)
  assert files and all((ROOT / f).exists() for f in files)
  targets = set(re.findall(r'make (\w+)', README)) & {'quickstart', 'test', 'parity', 'tpu'}
  makefile = (ROOT / 'Makefile').read_text()
  assert len(targets) == 4 and all(re.search(rf'^{t}:', makefile, re.M) for t in targets)
