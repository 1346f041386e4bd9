"""Lists the benchmarks: python -m experiments.benchmarks."""

import ast
import pathlib

from experiments import cli


def main() -> int:
  """Prints the command and the first line of the docstring of each benchmark."""
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    tree = ast.parse(path.read_text())
    is_command = any(isinstance(node, ast.FunctionDef) and node.name == 'main'
                     for node in tree.body)
    if is_command and path.stem != '__main__':
      print(f'python -m experiments.benchmarks.{path.stem}\n    '
            + ast.get_docstring(tree).splitlines()[0])
  return 0


if __name__ == '__main__':
  cli.start(main)
