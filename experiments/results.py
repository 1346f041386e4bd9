"""Collects a suite's finished runs into results.jsonl, and computes what reports show from it.

Every report is made from results.jsonl alone. Each of its lines is a JSON object with a 'kind':

  suite   first, once: its name, scale, title, command, metrics and plot; the planned number of
          pairs; how many lines of the other kinds follow; and the runs it trained with their
          parents, each {'key', 'devices', 'seconds' of its train steps, 'cpu_seconds' of its
          processes}
  claim   one per claim: the fields of suite.Claim
  arm     one per arm and pair, a `Record`: see `_record`

The file does not depend on the time when it is made: made again, it is equal.
"""

import dataclasses
import json
import math
import os
import pathlib
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from experiments import suite as suite_lib
from experiments import untrained
from experiments.suite import Arm, Claim, Run, Suite
from moejax.config import ConfigError, fail
from moejax.train import config as run_config
from moejax.train import metrics
from moejax.train.workdir import Workdir

FILE = 'results.jsonl'
Record = dict[str, Any]   # one arm of one pair: a line of kind 'arm'


@dataclasses.dataclass(frozen=True)
class Results:
  """The content of results.jsonl, by kind of line."""
  suite: dict[str, Any]
  claims: tuple[Claim, ...]
  records: list[Record]


def collect(suite: Suite, folder: pathlib.Path) -> Results:
  """Results of a suite whose runs are all finished, with their workdirs in `folder`."""
  known = suite.name in suite_lib.names()
  about = {
      'suite': suite.name, 'scale': suite.scale,
      'title': suite_lib.module(suite.name).__doc__.splitlines()[0] if known else suite.name,
      'suite_command': suite.command(), 'metrics': list(suite.metrics), 'plot': suite.plot,
      'x_label': suite.x_label, 'pairs': _planned_pairs(suite),
      'runs': [_spent(run, folder) for run in suite.runs()
               if not isinstance(run, untrained.UntrainedRun)],
  }
  return Results(about, suite.claims, [_record(arm, folder) for arm in suite.arms])


def merge(suite: Suite, new: Results, old: Results) -> Results:
  """`new`, with the arms of other pairs from `old`, in the order of the suite.

  Args:
    suite: with all pairs and claims.
    new: of some of its pairs.
    old: the present content of results.jsonl; `new` replaces its arms of the pairs that it has.

  Raises:
    ConfigError: `old` is of another suite or scale.
  """
  for key in ('suite', 'scale'):
    if old.suite[key] != new.suite[key]:
      fail('--results', f'a folder with results of {key} {old.suite[key]}',
           f'one of {key} {new.suite[key]}, or an empty one', 'Choose another.')
  new_pairs = {record['pair'] for record in new.records}
  kept = [record for record in old.records if record['pair'] not in new_pairs]
  records = {(r['domain'], r['arm'], r['pair']): r for r in [*kept, *new.records]}
  identities = [(arm.domain, arm.name, arm.pair) for arm in suite.arms]
  runs = {(run['key'], run['seconds']): run for run in [*old.suite['runs'], *new.suite['runs']]}
  about = {**new.suite, 'pairs': _planned_pairs(suite), 'runs': list(runs.values())}
  return Results(about, suite.claims,
                 [records[identity] for identity in identities if identity in records])


def _planned_pairs(suite: Suite) -> int:
  """Number of (dense parent, seed) pairs that the suite has when all are trained."""
  return len({arm.pair for arm in suite.arms})


def write(results: Results, directory: pathlib.Path) -> None:
  """Writes results.jsonl. Raises ConfigError if it cannot."""
  counts = {'claims': len(results.claims), 'arms': len(results.records)}
  write_lines(directory / FILE, [
      {'kind': 'suite', **results.suite, **counts},
      *({'kind': 'claim', **dataclasses.asdict(claim)} for claim in results.claims),
      *({'kind': 'arm', **record} for record in results.records)])


def write_lines(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
  """Writes a file of one JSON object a line, whole or not at all. Raises ConfigError."""
  write_text(path, ''.join(json.dumps(line) + '\n' for line in lines))


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
  """The content of results.jsonl. Raises ConfigError if there is none, or if it is not whole."""
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


def _record(arm: Arm, folder: pathlib.Path) -> Record:
  """One arm of one pair.

  Its extra steps are those after the trunk of its base, or all of them if it started from nothing:
  `start_step` is where they begin, and where `history`, an evaluation per entry, begins.
  `base_steps` of its base are 100 % of dense pretraining. `time_ratio` is the run's step time over
  the base's; None until benchmarks.train_step.fill knows it.
  """
  run, base = arm.run, Workdir(folder / arm.base.name)
  base_facts = base.read('run.json')
  base_steps = base_facts['trunk_step'] if arm.base_step is None else arm.base_step
  facts = (untrained.facts(run, folder) if isinstance(run, untrained.UntrainedRun) else
           _facts(arm, folder))
  return {
      'domain': arm.domain, 'arm': arm.name, 'pair': arm.pair, 'reference': arm.reference,
      'series': arm.series, 'x': arm.x,
      'key': run.key, 'parent': run.parent.key if run.parent else None,
      'command': shlex.join(['python', *run.command(folder)]),
      'config': json.loads(run_config.to_json(run.settings)),
      'base_steps': base_steps, 'base_flops': base_steps * base_facts['train_flops_per_step'],
      'base_seconds': _seconds(base.path, 0, base_steps),
      'time_ratio': None,
      **facts,
  }


def _facts(arm: Arm, folder: pathlib.Path) -> dict[str, Any]:
  """The part of `_record` that the run's own workdir holds."""
  run, workdir = arm.run, Workdir(folder / arm.run.name)
  facts = workdir.read('run.json')
  start = facts['trunk_step'] if run.key == arm.base.key else facts['first_step']
  start = start if arm.start_step is None else arm.start_step
  seconds, first_extra = _extra(run, folder, start)
  lines = [line for line in metrics.read_lines(workdir.path / 'metrics.jsonl')
           if line['step'] >= start]
  return {
      'fingerprint': facts['data_fingerprint'], 'versions': facts['versions'],
      'devices': facts['devices'],
      'parameters': facts['parameters'],
      'parameters_active_per_token': facts['parameters_active_per_token'],
      'start_step': start, 'end_step': facts['end_step'],
      'flops_per_step': facts['train_flops_per_step'],
      'seconds': seconds,
      'step0': _step0(first_extra),
      'history': [{'step': line['step'], 'loss': line['validation/loss'],
                   'accuracy': line['validation/accuracy']}
                  for line in lines if 'validation/loss' in line],
      'final': _final(lines),
  }


def _spent(run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """Time that training a run took: all of its steps, those before the trunk too."""
  workdir = Workdir(folder / run.name)
  facts = workdir.read('run.json')
  return {'key': run.key, 'devices': facts['devices'],
          'seconds': _seconds(workdir.path, facts['first_step'], facts['end_step']),
          'cpu_seconds': workdir.read('status.json').get('cpu_seconds')}   # None: not recorded


def _seconds(path: pathlib.Path, after: int, until: float) -> float:
  """Seconds of the train steps in (after, until], without compilation and evaluation."""
  return round(sum(line['seconds'] for line in metrics.read_lines(path / 'timing.jsonl')
                   if after < line['step'] <= until), 3)


def _extra(run: Run, folder: pathlib.Path, start: int) -> tuple[float, Workdir]:
  """Seconds of the steps after `start`; and the workdir of the run that took the first of them.

  These are the run's own steps, and those that its ancestors took after `start` and before them.
  """
  seconds, until = 0.0, math.inf
  while True:
    workdir = Workdir(folder / run.name)
    first = workdir.read('run.json')['first_step']
    seconds += _seconds(workdir.path, max(start, first), until)
    if first <= start or not run.parent:
      return round(seconds, 3), workdir
    run, until = run.parent, first


def _step0(workdir: Workdir) -> dict[str, float] | None:
  """Measurements after surgery, 'step0_gap' among them; None without a parent."""
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


def metric(record: Record, path: str) -> float | None:
  """'split/name' of the last evaluation, 'step0/name' of the first; None if not measured."""
  split, _, name = path.partition('/')
  values = record['step0'] if split == 'step0' else record['final'].get(split)
  return (values or {}).get(name)


def metric_paths(record: Record) -> list[str]:
  """Every path of a record that `metric` takes."""
  splits = {**record['final'], 'step0': record['step0'] or {}}
  return [f'{split}/{name}' for split, values in splits.items() for name in values]


def extra_steps(record: Record) -> int:
  """Steps after the trunk, or all of them if the arm began from nothing."""
  return record['end_step'] - record['start_step']


def extra_flops(record: Record, steps: int | None = None) -> float:
  """FLOPs of the extra steps (or of that many), in % of the dense pretraining."""
  steps = extra_steps(record) if steps is None else steps
  return 100 * steps * record['flops_per_step'] / record['base_flops']


def extra_time(record: Record) -> float | None:
  """Time of the extra steps in % of the dense pretraining's; None if step times are not known."""
  if record['time_ratio'] is None:
    return None
  return 100 * extra_steps(record) * record['time_ratio'] / record['base_steps']


@dataclasses.dataclass(frozen=True)
class TableArm:
  """The arms of one name in a domain, of all pairs: a line of the table.

  Attributes:
    domain, name: of these arms.
    records: {pair: record}, in the order of the pairs.
    delta: {metric: {pair: metric - metric of the reference}}, over the pairs that both have; empty
      for the reference itself and in a domain without one.
  """
  domain: str
  name: str
  records: dict[int, Record]
  delta: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)

  @property
  def first(self) -> Record:
    """The record of one pair, for what all pairs have in common."""
    return next(iter(self.records.values()))

  def values(self, path: str) -> dict[int, float]:
    """{pair: metric}, over the pairs that measured it."""
    values = {pair: metric(record, path) for pair, record in self.records.items()}
    return {pair: value for pair, value in values.items() if value is not None}


def by_domain(records: Sequence[Record], paths: Sequence[str]) -> dict[str, list[TableArm]]:
  """{domain: its arms}, in the order of the records.

  Args:
    records: of one suite.
    paths: metrics that are given relative to the reference too.

  Raises:
    ConfigError: the records of a domain were measured on different data.
  """
  domains: dict[str, dict[str, dict[int, Record]]] = {}
  for record in records:
    arms = domains.setdefault(record['domain'], {})
    arms.setdefault(record['arm'], {})[record['pair']] = record
  return {domain: _table_arms(domain, arms, paths) for domain, arms in domains.items()}


def _table_arms(domain: str, records: dict[str, dict[int, Record]], paths: Sequence[str]
                ) -> list[TableArm]:
  data = {record['fingerprint'] for by_pair in records.values() for record in by_pair.values()}
  if len(data) > 1:
    raise ConfigError(f'{domain}: results of different data cannot stand in one table '
                      f'(fingerprints {", ".join(sorted(f[:12] for f in data))}). Was Python or '
                      'matplotlib changed in between? Train again with --runs=NEWDIR.')
  arms = [TableArm(domain, name, dict(sorted(by_pair.items())))
          for name, by_pair in records.items()]
  reference = next((arm for arm in arms if arm.first['reference']), None)
  if reference is None:
    return arms
  return [arm if arm is reference else
          dataclasses.replace(arm, delta={path: _differences(arm, reference, path)
                                          for path in paths})
          for arm in arms]


def _differences(a: TableArm, b: TableArm, path: str) -> dict[int, float]:
  """{pair: metric of a - metric of b}, over the pairs that both have."""
  left, right = a.values(path), b.values(path)
  return {pair: left[pair] - right[pair] for pair in left if pair in right}


def measured_paths(arms: Sequence[TableArm], paths: Sequence[str], claims: Iterable[Claim] = ()
                   ) -> list[str]:
  """Those of the metrics that any arm of the domain measured; plots show the first.

  Metrics that the suite makes a claim about in this domain come before the others.
  """
  claimed = [claim.metric for claim in claims if claim.domain == arms[0].domain]
  return [path for path in dict.fromkeys([*claimed, *paths])
          if path in paths and any(arm.values(path) for arm in arms)]
