"""Makes tables, plots and the results page from results.jsonl alone.

  python -m experiments.report --suite=quickstart [--results=DIR]

writes NAME.md, NAME.csv and NAME.png beside a suite's results.jsonl and prints the table;

  python -m experiments.report [--results=experiments/results]

does so for every DIR/*/results.jsonl and writes DIR/README.md: the verdict on each claim. The same
results give the same files, byte for byte.
"""

import pathlib

from experiments import cli, plots, results, results_page, tables
from experiments import suite as suite_lib
from experiments.benchmarks import train_step
from experiments.results import Results


def write(found: Results, directory: pathlib.Path) -> str:
  """Writes NAME.md, NAME.csv and NAME.png into directory; returns the Markdown."""
  name = found.suite['suite']
  markdown = tables.to_markdown(found)
  results.write_text(directory / f'{name}.md', f'{markdown}\n![Plot]({name}.png)\n')
  results.write_text(directory / f'{name}.csv', tables.to_csv(found))
  plots.plot(found, directory / f'{name}.png')
  return markdown


def _timed(directory: pathlib.Path, found: Results) -> Results:
  """Results with what step times were measured since they were written; writes them too."""
  name = found.suite['suite']
  if name not in suite_lib.names():
    return found
  filled = train_step.fill(found, suite_lib.load(name, found.suite['scale']))
  if filled != found:
    results.write(filled, directory)
  return filled


def main(argv: list[str] | None = None) -> int:
  parser = cli.Parser('python -m experiments.report', __doc__)
  parser.add_suite()
  args = parser.parse(argv, suite_required=False)
  if args.suite:
    directory = cli.results_folder(args)
    print(write(_timed(directory, results.read(directory)), directory))
    print(f'Written to {directory}')
    return 0
  folder = args.results or results_page.FOLDER
  suites = {directory: _timed(directory, found)
            for directory, found in results_page.find(folder).items()}
  for directory, found in suites.items():
    write(found, directory)
  print(results_page.write(folder, suites))
  print(f'Written to {folder}')
  return 0


if __name__ == '__main__':
  cli.run(main)
