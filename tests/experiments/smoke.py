"""Runs suites at smoke scale in this process: python -m tests.experiments.smoke FOLDER SUITE...

Every job is done as its own process would do it, but for imports and compilation, which are shared.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import sys

from experiments import report, results, untrained
from experiments import suite as suite_lib
from experiments.untrained import EvaluationJob
from experiments.suite import Suite
from moejax.train import loop

BOTH = ('dense_vs_upcycled',)   # the others in one domain each, for the sake of time


def load(name: str) -> Suite:
  """A suite at smoke scale with the arms its claims name; of several domains, the ViT's."""
  suite = suite_lib.load(name, 'smoke')
  last = suite.arms[-1].domain
  claims = [c for c in suite.claims if name in BOTH or c.domain == last]
  named = {(c.domain, arm) for c in claims for arm in c.terms}
  arms = [arm for arm in suite.arms if (arm.domain, arm.name) in named]
  return dataclasses.replace(suite, arms=tuple(arms), claims=tuple(claims))


def run(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Trains and reports a suite at smoke scale; the folder of its results."""
  suite = load(name)
  for job in untrained.jobs(suite.runs()):
    if isinstance(job, EvaluationJob):
      assert untrained.main(job.command(folder)[2:]) == 0
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
