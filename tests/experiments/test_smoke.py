"""Every suite, two steps an arm: from surgery to table, plot and verdicts; and every run's command.

Every job is done as its own process would do it, but for imports and compilation, which are shared.
Compilation takes most of the time, so each suite has one of its claims: of those about ViT, if
there are any (T5 takes twice as long), the one that needs the fewest runs that no suite before it
had, at least one. And only four suites train continuations. Those of the others are evaluated
before their first step, as untrained.py does it: what a setting does in training is tested in
tests/moe and tests/train.
"""

import dataclasses
import functools

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import report, results, suites, untrained
from experiments import suite as suite_lib
from experiments.suite import Suite
from experiments.untrained import EvaluationJob, UntrainedRun
from moejax.train import config as run_config
from moejax.train import loop, parallel

NAMES = ('quickstart', *suites.ORDER)
TRAINED = ('quickstart', 'dense_vs_upcycled', 'finetuning', 'scratch_vs_upcycled')
load = functools.cache(functools.partial(suite_lib.load, scale='smoke'))


def chosen(name: str, known: set[str]) -> Suite:
  """A suite with one of its claims and the arms it names; quickstart, which has none, with ViT's.

  known: keys of runs that are trained.
  """
  suite = load(name)
  if not suite.claims:
    return dataclasses.replace(suite, arms=tuple(
        arm for arm in suite.arms if arm.domain.startswith('ViT')))

  def only(claim):
    return dataclasses.replace(suite, claims=(claim,), arms=tuple(
        arm for arm in suite.arms if arm.domain == claim.domain and arm.name in claim.terms))
  new = lambda suite: len({run.key for run in suite.runs()} - known)
  is_t5 = lambda suite: suite.claims[0].domain.startswith('T5')
  return min(filter(new, map(only, suite.claims)), key=lambda suite: (is_t5(suite), new(suite)))


def untrained_arms(suite: Suite) -> Suite:
  """A suite whose runs that start from a checkpoint are evaluated there and not trained."""
  def first_state(run):
    return UntrainedRun(run.label, run.config, run.changes, run.parent, run.arg) if (
        run.parent) else run
  return dataclasses.replace(suite, arms=tuple(
      dataclasses.replace(arm, run=first_state(arm.run)) for arm in suite.arms))


def test_suites_run_from_surgery_to_verdict(tmp_path, monkeypatch):
  # One device, as a laptop has: several would each compile for themselves.
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:1]))
  known = set()
  for name in NAMES:
    suite = chosen(name, known)
    known |= {run.key for run in suite.runs()}
    if name not in TRAINED:
      suite = untrained_arms(suite)
    for job in untrained.jobs(suite.runs()):
      if isinstance(job, EvaluationJob):
        assert untrained.main(job.command(tmp_path)[2:]) == 0
      elif not job.finished(tmp_path):
        config = job.resolved(job.parent_path(tmp_path))
        assert loop.run(config, str(tmp_path / job.name)) == 0
      assert job.finished(tmp_path), job.label
    results.write(results.collect(suite, tmp_path), tmp_path / name)
    found = results.read(tmp_path / name)
    assert found.suite['title'] == suite_lib.module(name).__doc__.splitlines()[0]
    text = report.write(found, tmp_path / name)
    assert all(f'| {arm.name}' in text for arm in suite.arms)
    assert all(claim.says in text for claim in suite.claims)
    assert (tmp_path / name / f'{name}.png').stat().st_size > 5_000

  # What quickstart's arms cost, and their gaps.
  records = {r['arm']: r for r in results.read(tmp_path / 'quickstart').records}
  assert list(records) == ['dense parent, cooled', 'dense, equal steps', 'dense, equal FLOPs',
                           'upcycled', 'MoE from scratch']
  steps, up = records['dense, equal steps'], records['upcycled']
  assert results.extra_flops(steps) == pytest.approx(20)
  assert results.extra_flops(up) > 20
  assert steps['step0']['step0_gap'] == 0.0 != up['step0']['step0_gap']
  assert records['MoE from scratch']['step0'] is None
  final = lambda record: record['final']['validation']['loss']
  assert final(up) < final(records['MoE from scratch']) + 0.5


def test_the_command_of_a_run_is_its_config(tmp_path):
  """As moejax.main reads it: so every arm of a table can be trained alone."""
  seen = set()   # (config file, key, type of value): others are read alike
  for run in (run for name in NAMES for run in load(name).runs()):
    kinds = {(run.config, key, type(value)) for key, value in run.changes.items()}
    if isinstance(run, UntrainedRun) or kinds <= seen:
      continue
    seen |= kinds
    _, module, *words = run.command(tmp_path)
    argv, values = [module, *words], flags.FlagValues()
    config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, '', flag_values=values)
    values(argv)
    assert (module, values.workdir) == ('moejax.main', str(tmp_path / run.name))
    resolved = run_config.resolve(config.value.copy_and_resolve_references())
    assert resolved == run.resolved(run.parent_path(tmp_path)), run.label
