"""Runs suites at smoke scale in this process: python -m tests.experiments.smoke FOLDER SUITE...

Every job is done as its own process would do it, but for imports and compilation, which are shared.
"""

import contextlib
import io
import json
import pathlib
import sys

from experiments import report, results, surgeries
from experiments import suite as suite_lib
from experiments.surgeries import Measure
from moejax.train import loop


def run(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Trains and reports a suite at smoke scale; the folder of its results."""
  suite = suite_lib.load(name, 'smoke')
  for job in surgeries.jobs(suite.runs()):
    if isinstance(job, Measure):
      assert surgeries.main(job.command(folder)[2:]) == 0
    elif not job.finished(folder):
      assert loop.run(job.resolved(job.parent_path(folder)), str(folder / job.name)) == 0
    assert job.finished(folder), job.label
  directory = folder / name
  results.write(results.collect(suite, folder), directory)
  report.write(results.read(directory), directory)
  return directory


def main(folder: str, *names: str) -> None:
  for name in names:
    with contextlib.redirect_stderr(io.StringIO()) as log:
      try:
        directory = run(name, pathlib.Path(folder))
      except BaseException:
        print(log.getvalue(), file=sys.__stderr__)
        raise
    print(json.dumps({'suite': name, 'results': str(directory)}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
