"""Every suite, two steps an arm: from surgery to table, plot and verdicts; and every run's command.

Every job is done as its own process would do it, but for imports and compilation, which are shared.
Suites differ by their configs more than by what they compile, so each trains the claim that needs
the fewest runs that no suite before it has trained, at least one.
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
T5 = ('scratch_vs_upcycled', 'drop_upcycling', 'granularity', 'balancing',   # about T5 alone
      'router_type', 'capacity_factor', 'num_experts', 'learning_rate', 'mesh', 'sunk_cost',
      'extra_budget')   # about both
FAMILIES = {'T5': T5, 'ViT': [name for name in NAMES if name not in T5]}
load = functools.cache(functools.partial(suite_lib.load, scale='smoke'))


def chosen(name: str, family: str, known: set[str]) -> Suite:
  """A suite with one claim about a family, and the arms it names; all arms if it claims nothing.

  known: keys of runs that are trained; the claim needs the fewest others, but at least one.
  """
  suite = load(name)
  if not suite.claims:
    return dataclasses.replace(suite, arms=tuple(
        arm for arm in suite.arms if arm.domain.startswith(family)))

  def only(claim):
    return dataclasses.replace(suite, claims=(claim,), arms=tuple(
        arm for arm in suite.arms if arm.domain == claim.domain and arm.name in claim.terms))
  new = lambda suite: len({run.key for run in suite.runs()} - known)
  return min(filter(new, (only(claim) for claim in suite.claims
                          if claim.domain.startswith(family))), key=new)


@pytest.mark.parametrize('family', FAMILIES)
def test_suites_run_from_surgery_to_verdict(family, tmp_path, monkeypatch):
  # One device, as a laptop has: several would each compile for themselves.
  monkeypatch.setattr(parallel, 'make', functools.partial(parallel.make,
                                                          devices=jax.devices()[:1]))
  known = set()
  for name in FAMILIES[family]:
    suite = chosen(name, family, known)
    for job in untrained.jobs(suite.runs()):
      if isinstance(job, EvaluationJob):
        assert untrained.main(job.command(tmp_path)[2:]) == 0
      elif not job.finished(tmp_path):
        config = job.resolved(job.parent_path(tmp_path))
        assert loop.run(config, str(tmp_path / job.name)) == 0
      assert job.finished(tmp_path), job.label
    known |= {run.key for run in suite.runs()}
    results.write(results.collect(suite, tmp_path), tmp_path / name)
    found = results.read(tmp_path / name)
    text = report.write(found, tmp_path / name)
    for arm in suite.arms:
      assert f'| {arm.name}' in text
    for claim in suite.claims:
      assert claim.says in text
    assert (tmp_path / name / f'{name}.png').stat().st_size > 5_000
  if family == 'ViT':
    check_quickstart(tmp_path)


def check_quickstart(folder):
  """Costs and gaps of the arms."""
  records = {r['arm']: r for r in results.read(folder / 'quickstart').records}
  assert list(records) == ['dense parent, cooled', 'dense, equal steps', 'dense, equal FLOPs',
                           'upcycled', 'MoE from scratch']
  steps, up = records['dense, equal steps'], records['upcycled']
  assert results.extra_flops(steps) == pytest.approx(20)
  assert results.extra_flops(up) > 20
  assert steps['step0']['step0_gap'] == 0.0 != up['step0']['step0_gap']
  assert records['MoE from scratch']['step0'] is None
  final = lambda record: record['final']['validation']['loss']
  assert final(up) < final(records['MoE from scratch']) + 0.5


@pytest.mark.parametrize('name', NAMES)
def test_the_command_of_a_run_is_its_config(name, tmp_path):
  """As moejax.main reads it: so every arm of a table can be trained alone."""
  for run in load(name).runs():
    if not isinstance(run, UntrainedRun):
      _, module, *words = run.command(tmp_path)
      argv, values = [module, *words], flags.FlagValues()
      config = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
      flags.DEFINE_string('workdir', None, '', flag_values=values)
      values(argv)
      assert (module, values.workdir) == ('moejax.main', str(tmp_path / run.name))
      resolved = run_config.resolve(config.value.copy_and_resolve_references())
      assert resolved == run.resolved(run.parent_path(tmp_path)), run.label
