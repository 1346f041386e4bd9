"""Every suite, two steps an arm: from surgery to table, plot and verdicts.

On one device, as a laptop has: the other tests' eight would each compile for themselves.
"""

import json
import os
import re
import subprocess
import sys

from experiments import suites
from tests.experiments import smoke


def test_every_suite_runs_from_surgery_to_verdict(tmp_path):
  names = suites.ORDER   # in one process: runs that suites share are trained once
  flags = re.sub(r'device_count=\d+', 'device_count=1', os.environ['XLA_FLAGS'])
  done = subprocess.run([sys.executable, '-m', 'tests.experiments.smoke', tmp_path, *names],
                        env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  reported = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
  assert [line['suite'] for line in reported] == list(names)
  for name in names:
    suite = smoke.load(name)
    text = (tmp_path / name / f'{name}.md').read_text()
    for arm in suite.arms:
      assert f'| {arm.name}' in text
    for claim in suite.claims:
      assert claim.says in text
    assert (tmp_path / name / f'{name}.png').stat().st_size > 5_000
