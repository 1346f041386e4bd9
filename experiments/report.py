"""Makes tables, plots and the results page from results.jsonl alone.

  python -m experiments.report --suite=quickstart [--results=DIR]

writes NAME.md, NAME.csv and NAME.png beside a suite's results.jsonl and prints the table;

  python -m experiments.report [--results=experiments/results]

does so for every DIR/*/results.jsonl and writes DIR/README.md: the verdict on each claim. Equal
results give equal files, byte for byte.
"""

import pathlib

from experiments import cli, plots, results_page, tables
from experiments import results as results_lib
from experiments import suite as suite_lib
from experiments.benchmarks import train_step
from experiments.results import Results


def write(results: Results, directory: pathlib.Path) -> str:
  """Writes NAME.md, NAME.csv and NAME.png into directory; returns the Markdown."""
  name = results.suite['suite']
  markdown = tables.to_markdown(results)
  results_lib.write_text(directory / f'{name}.md', f'{markdown}\n![Plot]({name}.png)\n')
  results_lib.write_text(directory / f'{name}.csv', tables.to_csv(results))
  plots.plot(results, directory / f'{name}.png')
  return markdown


def _with_times(directory: pathlib.Path, results: Results) -> Results:
  """Results with the step times measured since they were written; writes these too."""
  name = results.suite['suite']
  if name not in suite_lib.names():
    return results
  filled = train_step.fill(results, suite_lib.load(name, results.suite['scale']))
  if filled != results:
    results_lib.write(filled, directory)
  return filled


def main(argv: list[str] | None = None) -> int:
  """Makes the reports; returns the exit code. Raises ConfigError on what cannot work."""
  parser = cli.Parser('python -m experiments.report', __doc__)
  parser.add_suite()
  args = parser.parse(argv)
  if args.suite:
    folder = cli.results_folder(args, args.suite)
    print(write(_with_times(folder, results_lib.read(folder)), folder))
  else:
    folder = args.results or results_page.FOLDER
    suites = {directory: _with_times(directory, results)
              for directory, results in results_page.find(folder).items()}
    for directory, results in suites.items():
      write(results, directory)
    print(results_page.write(folder, suites))
  print(f'Written to {folder}')
  return 0


if __name__ == '__main__':
  cli.start(main)
