"""From the workdirs of a suite's finished runs to results.jsonl: one JSON object per arm.

Nothing in it depends on when it is made, so making it again leaves the file as it is.
"""

import json
import os
import pathlib
import shlex
from typing import Any

from experiments.suite import Arm, Suite
from moejax.config import ConfigError, fail
from moejax.train import metrics, settings
from moejax.train.workdir import Workdir

FILE = 'results.jsonl'


def collect(suite: Suite, folder: pathlib.Path) -> list[dict[str, Any]]:
  """What the finished runs in `folder` measured; one dict per arm, see `_record`."""
  return [_record(arm, suite, folder) for arm in suite.arms]


def write(rows: list[dict[str, Any]], directory: pathlib.Path) -> None:
  """Writes results.jsonl. Raises ConfigError if it cannot."""
  write_text(directory / FILE, ''.join(json.dumps(row) + '\n' for row in rows))


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all. Raises ConfigError if it cannot."""
  temporary = path.with_name(path.name + '.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)
  except OSError as error:
    fail('--results', str(path.parent), 'a folder that can be written',
         f'{type(error).__name__}: {error.strerror}. Choose another.')


def read(directory: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of results.jsonl. Raises ConfigError if there are none."""
  path = directory / FILE
  rows = metrics.read_lines(path)
  if not rows:
    raise ConfigError(f'--results: no results in {path}. Train the suite first: python -m '
                      'experiments.main --suite=NAME')
  return rows


def _record(arm: Arm, suite: Suite, folder: pathlib.Path) -> dict[str, Any]:
  """One arm.

  Its extra steps are those after the trunk of its base, or all of them if it started from nothing:
  `start_step` is where they begin. `history` has an evaluation per entry, from there on.
  """
  run, base = arm.run, arm.base
  workdir = Workdir(folder / run.name)
  facts, base_facts = workdir.read('run.json'), Workdir(folder / base.name).read('run.json')
  start = facts['trunk_step'] if run.key == base.key else facts['first_step']
  lines = [line for line in metrics.read_lines(workdir.path / 'metrics.jsonl')
           if line['step'] >= start]
  return {
      'suite': suite.name, 'scale': suite.scale, 'suite_command': suite.command(),
      'domain': arm.domain, 'arm': arm.name, 'reference': arm.reference,
      'key': run.key, 'parent': run.parent.key if run.parent else None,
      'command': shlex.join(['python', *run.command(folder)]),
      'config': json.loads(settings.to_json(run.settings)),
      'fingerprint': facts['data_fingerprint'], 'versions': facts['versions'],
      'devices': facts['devices'],
      'parameters': facts['parameters'],
      'parameters_active_per_token': facts['parameters_active_per_token'],
      'start_step': start, 'end_step': facts['end_step'],
      'flops_per_step': facts['train_flops_per_step'],
      'base_steps': base_facts['trunk_step'],
      'base_flops': base_facts['trunk_step'] * base_facts['train_flops_per_step'],
      'base_seconds': _seconds(folder / base.name, 0, base_facts['trunk_step']),
      'seconds': _seconds(workdir.path, start, facts['end_step']),
      'step0': _step0(workdir),
      'history': [{'step': line['step'], 'loss': line['validation/loss'],
                   'accuracy': line['validation/accuracy']}
                  for line in lines if 'validation/loss' in line],
      'final': _final(lines),
  }


def _seconds(path: pathlib.Path, after: int, until: int) -> float:
  """Seconds of the train steps in (after, until], without compilation and evaluation."""
  return round(sum(line['seconds'] for line in metrics.read_lines(path / 'timing.jsonl')
                   if after < line['step'] <= until), 3)


def _step0(workdir: Workdir) -> dict[str, float] | None:
  """What surgery measured before the first step: step0_gap among it; None without a parent."""
  if not (workdir.path / 'receipt.json').exists():
    return None
  return workdir.read('receipt.json')['measured']


def _final(lines: list[dict]) -> dict[str, dict[str, float]]:
  """{split: {metric: value}} of the last step, telemetry of the MoE layers included."""
  final: dict[str, dict[str, float]] = {}
  for line in lines:
    if line['step'] == lines[-1]['step']:
      for name, value in line.items():
        split, _, metric = name.partition('/')
        if metric:
          final.setdefault(split, {})[metric] = value
  return final
