"""From the workdirs of a suite's finished runs to results.jsonl, and back.

Everything a report says comes from this file. It has one JSON object a line, told apart by 'kind':

  suite   first, once: its name, scale, title, command, metrics and plot, how many pairs there are
          to be, how many lines of the other kinds follow, and the runs it trained, their parents
          too, each {'key', 'devices', 'seconds' of its train steps, 'cpu_seconds' of its processes}
  claim   one per claim: the fields of suite.Claim
  arm     one per arm and pair, see `_record`

Nothing in it depends on when it is made, so making it again leaves the file as it is.
"""

import dataclasses
import json
import os
import pathlib
import shlex
from typing import Any

from experiments import step0
from experiments import suite as suite_lib
from experiments.suite import Arm, Claim, Run, Suite
from moejax.config import ConfigError, fail
from moejax.train import config as run_config
from moejax.train import metrics
from moejax.train.workdir import Workdir

FILE = 'results.jsonl'


@dataclasses.dataclass(frozen=True)
class Results:
  """What a suite measured; the parts are the kinds of lines."""
  suite: dict[str, Any]
  claims: tuple[Claim, ...]
  rows: list[dict[str, Any]]


def collect(suite: Suite, folder: pathlib.Path) -> Results:
  """What the finished runs in `folder` measured.

  Args:
    suite: whose runs are all finished.
    folder: of the workdirs.
  """
  known = suite.name in suite_lib.names()
  about = {
      'suite': suite.name, 'scale': suite.scale,
      'title': suite_lib.module(suite.name).__doc__.splitlines()[0] if known else suite.name,
      'suite_command': suite.command(), 'metrics': list(suite.metrics), 'plot': suite.plot,
      'x_label': suite.x_label, 'pairs': _pairs(suite),
      'runs': [_spent(run, folder) for run in suite.runs()
               if not isinstance(run, step0.Surgery)],
  }
  return Results(about, suite.claims,
                 [_record(arm, folder) for arm in suite.arms])


def merge(suite: Suite, new: Results, old: Results) -> Results:
  """`new`, with the arms of other pairs from `old`, in the order of the suite.

  Args:
    suite: with all pairs and claims.
    new: collected of some of its pairs.
    old: what is in results.jsonl so far; its arms of the new pairs are replaced.

  Raises:
    ConfigError: `old` is of another suite or scale.
  """
  for key in ('suite', 'scale'):
    if old.suite[key] != new.suite[key]:
      fail('--results', f'a folder with results of {key} {old.suite[key]}',
           f'one of {key} {new.suite[key]}, or an empty one', 'Choose another.')
  fresh = {row['pair'] for row in new.rows}
  kept = [row for row in old.rows if row['pair'] not in fresh]
  rows = {(row['domain'], row['arm'], row['pair']): row for row in [*kept, *new.rows]}
  places = [(arm.domain, arm.name, arm.pair) for arm in suite.arms]
  runs = {(run['key'], run['seconds']): run for run in [*old.suite['runs'], *new.suite['runs']]}
  return Results({**new.suite, 'pairs': _pairs(suite), 'runs': list(runs.values())}, suite.claims,
                 [rows[place] for place in places if place in rows])


def _pairs(suite: Suite) -> int:
  """How many (dense parent, seed) pairs there are to be."""
  return len({arm.pair for arm in suite.arms})


def write(found: Results, directory: pathlib.Path) -> None:
  """Writes results.jsonl. Raises ConfigError if it cannot."""
  counts = {'claims': len(found.claims), 'arms': len(found.rows)}
  lines = [{'kind': 'suite', **found.suite, **counts},
           *({'kind': 'claim', **dataclasses.asdict(claim)} for claim in found.claims),
           *({'kind': 'arm', **row} for row in found.rows)]
  write_text(directory / FILE, ''.join(json.dumps(line) + '\n' for line in lines))


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


def read(directory: pathlib.Path) -> Results:
  """What results.jsonl holds. Raises ConfigError if there is none, or if it is not whole."""
  path = directory / FILE
  kinds: dict[str, list[dict[str, Any]]] = {'suite': [], 'claim': [], 'arm': []}
  for line in metrics.read_lines(path):
    kinds.get(line.pop('kind', ''), []).append(line)
  if not kinds['arm']:
    raise ConfigError(f'--results: no results in {path}. Train the suite first: python -m '
                      'experiments.main --suite=NAME')
  if len(kinds['suite']) != 1:
    raise ConfigError(f'--results: {path} has {len(kinds["suite"])} lines of kind "suite" in place '
                      'of one. Make it again: python -m experiments.main --suite=NAME')
  about = kinds['suite'][0]
  for kind in ('claim', 'arm'):
    if len(kinds[kind]) != about.pop(f'{kind}s', None):
      raise ConfigError(f'--results: {path} is not whole: it has {len(kinds[kind])} lines of kind '
                        f'{kind!r}, and not as many as its first line says. Make it again: '
                        f'{about["suite_command"]}')
  claims = (Claim(**{**claim, 'than': tuple(claim.get('than', ()))}) for claim in kinds['claim'])
  return Results(about, tuple(claims), kinds['arm'])


def _record(arm: Arm, folder: pathlib.Path) -> dict[str, Any]:
  """One arm of one pair.

  Its extra steps are those after the trunk of its base, or all of them if it started from nothing:
  `start_step` is where they begin. `history` has an evaluation per entry, from there on.
  `base_steps` of its base are 100 % of dense pretraining. `time_ratio` is the run's step time over
  the base's, None until it is measured: see `timing.fill`.
  """
  run, base = arm.run, Workdir(folder / arm.base.name)
  base_facts = base.read('run.json')
  base_steps = base_facts['trunk_step'] if arm.base_step is None else arm.base_step
  measured = (step0.collect(run, folder) if isinstance(run, step0.Surgery) else
              _trained(arm, folder))
  return {
      'domain': arm.domain, 'arm': arm.name, 'pair': arm.pair, 'reference': arm.reference,
      'series': arm.series, 'x': arm.x,
      'key': run.key, 'parent': run.parent.key if run.parent else None,
      'command': shlex.join(['python', *run.command(folder)]),
      'config': json.loads(run_config.to_json(run.settings)),
      'base_steps': base_steps, 'base_flops': base_steps * base_facts['train_flops_per_step'],
      'base_seconds': _seconds(base.path, 0, base_steps),
      'time_ratio': None,
      **measured,
  }


def _trained(arm: Arm, folder: pathlib.Path) -> dict[str, Any]:
  """The part of `_record` that a run's own workdir says."""
  run, workdir = arm.run, Workdir(folder / arm.run.name)
  facts = workdir.read('run.json')
  start = facts['trunk_step'] if run.key == arm.base.key else facts['first_step']
  start = start if arm.start_step is None else arm.start_step
  lines = [line for line in metrics.read_lines(workdir.path / 'metrics.jsonl')
           if line['step'] >= start]
  return {
      'fingerprint': facts['data_fingerprint'], 'versions': facts['versions'],
      'devices': facts['devices'],
      'parameters': facts['parameters'],
      'parameters_active_per_token': facts['parameters_active_per_token'],
      'start_step': start, 'end_step': facts['end_step'],
      'flops_per_step': facts['train_flops_per_step'],
      'seconds': _lineage_seconds(run, folder, start),
      'step0': _step0(_first(run, folder, start)),
      'history': [{'step': line['step'], 'loss': line['validation/loss'],
                   'accuracy': line['validation/accuracy']}
                  for line in lines if 'validation/loss' in line],
      'final': _final(lines),
  }


def _spent(run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """What training a run took: all of its steps, those before the trunk too."""
  workdir = Workdir(folder / run.name)
  facts = workdir.read('run.json')
  return {'key': run.key, 'devices': facts['devices'],
          'seconds': _seconds(workdir.path, facts['first_step'], facts['end_step']),
          'cpu_seconds': workdir.read('status.json').get('cpu_seconds')}   # None: not recorded


def _lineage_seconds(run: Run, folder: pathlib.Path, start: int) -> float:
  """Seconds of the steps after `start`: a run's own and, before them, those of its parents."""
  seconds, until = 0.0, None
  while run is not None:
    facts = Workdir(folder / run.name).read('run.json')
    until = facts['end_step'] if until is None else until
    seconds += _seconds(folder / run.name, max(start, facts['first_step']), until)
    if start >= facts['first_step']:
      break
    run, until = run.parent, facts['first_step']
  return round(seconds, 3)


def _seconds(path: pathlib.Path, after: int, until: int) -> float:
  """Seconds of the train steps in (after, until], without compilation and evaluation."""
  return round(sum(line['seconds'] for line in metrics.read_lines(path / 'timing.jsonl')
                   if after < line['step'] <= until), 3)


def _first(run: Run, folder: pathlib.Path, start: int) -> Workdir:
  """Of the run, or that parent of it, which began the extra steps."""
  while run.parent and Workdir(folder / run.name).read('run.json')['first_step'] > start:
    run = run.parent
  return Workdir(folder / run.name)


def _step0(workdir: Workdir) -> dict[str, float] | None:
  """What surgery measured before the first step: step0_gap among it; None without a parent."""
  if not (workdir.path / 'receipt.json').exists():
    return None
  return workdir.read('receipt.json', fix='Delete the whole run and train it again.')['measured']


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
