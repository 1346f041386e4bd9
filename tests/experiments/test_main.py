"""The command line: suites, scales, pairs, shards and jobs; its dry run; and joining of pairs."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import cli, dry_run, main, results, results_page, scheduler
from experiments import suite as suite_lib
from experiments.scheduler import Shard
from experiments.suite import Arm, Claim, Suite
from moejax.config import ConfigError
from tests.experiments import made_up, tiny
from tests.experiments.fakes import Fake
from tests.experiments.made_up import child, dense, trained


@pytest.fixture(autouse=True)
def tiny_suites(monkeypatch):
  tiny.use(monkeypatch.setattr)


def test_suites_are_taken_in_the_order_given_once_and_all_without_those_that_lack_the_scale(capsys):
  assert main.parse(['--suite=chain,alone,chain']).suites == ['chain', 'alone']
  assert main.parse(['--suite=all']).suites == ['chains', 'chain', 'alone']
  assert capsys.readouterr().err == ''
  assert main.parse(['--suite=all', '--scale=smoke']).suites == ['chain', 'alone']
  assert capsys.readouterr().err == 'chains: left out, it has no scale smoke\n'


@pytest.mark.parametrize('flags, words', [
    ([], '--suite: got None'),
    (['--suite=chian'], "--suite: got 'chian'.*Did you mean 'chain'"),
    (['--suite=chain', '--scale=smok'], "--scale: got 'smok'.*Did you mean 'smoke'"),
    (['--suite=all', '--scale=smok'], "--scale: got 'smok'.*Did you mean 'smoke'"),
    (['--suite=chain', '--job=2'], "'--job=2' is no flag.*'--jobs'"),
    (['--suite=chain', '--jobs=two'], '--jobs.*two'),
    (['--suite=chain', '--jobs=-1'], '--jobs: got -1'),
    (['--suite=chain', '--shard=3/2'], "--shard: got '3/2'"),
    (['--suite=chain', '--shard='], "--shard: got ''"),
    (['--suite=chain', '--pairs=0,x'], "--pairs: got '0,x'.*numbers of pairs"),
    (['--suite=chain', '--pairs='], "--pairs: got ''"),
    (['--suite=chains,chain', '--pairs=2'], "--pairs: got '2'.*pairs 0 to 1"),
])
def test_what_cannot_work_is_one_line(flags, words):
  with pytest.raises(ConfigError, match=words) as error:
    main.main(flags)
  assert '\n' not in str(error.value)


COMMANDS = ['main', 'report', 'untrained', *(
    f'benchmarks.{path.stem}' for path in
    sorted((pathlib.Path(main.__file__).parent / 'benchmarks').glob('*.py'))
    if 'def main(argv' in path.read_text())]


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_answers_a_wrong_flag_in_one_line(name):
  module = importlib.import_module(f'experiments.{name}')
  needed = ['--parent=p', '--runs=r', '--workdir=w'] if name == 'untrained' else []
  with pytest.raises(ConfigError, match=f"'--nope' is no flag of python -m experiments.{name}"):
    module.main([*needed, '--nope'])


def test_the_error_reaches_the_shell_without_a_traceback():
  with pytest.raises(SystemExit) as ended:
    cli.start(lambda: main.main(['--suite=chian']))
  assert ended.value.code.startswith('experiments: --suite: got')   # printed; the exit code is 1


def test_a_reader_that_has_read_enough_causes_no_traceback():
  """As in `... | head`: nobody reads the pipe any more when the output is flushed."""
  read, write = os.pipe()
  os.close(read)
  done = subprocess.run([sys.executable, '-m', 'experiments.benchmarks'], stdout=write,
                        stderr=subprocess.PIPE, text=True, check=False)
  os.close(write)
  assert (done.returncode, done.stderr) == (1, '')


def test_list_names_each_suite_with_its_scales(capsys):
  assert main.main(['--list']) == 0
  assert capsys.readouterr().out.splitlines() == [
      'alone (mini, smoke)  Tiny.', 'chain (mini, smoke)  Tiny.', 'chains (mini)  Tiny.']


@pytest.mark.parametrize('flags, folder', [
    (['--suite=chain'], 'runs/chain'), (['--suite=chain', '--scale=smoke'], 'runs/chain-smoke'),
    (['--suite=chain', '--results=x'], 'x'), (['--suite=chain', '--runs=r'], 'r/chain'),
    (['--suite=chain,alone', '--results=x'], 'x/chain'),
    (['--suite=all', '--results=x'], 'x/chain'),
    (['--suite=all', '--scale=smoke', '--results=x'], 'x/chain-smoke')])
def test_where_the_results_of_a_suite_go(flags, folder):
  assert str(cli.results_folder(main.parse(flags), 'chain')) == folder


def finished(folder, family, *, seconds, steps, flops):
  """A finished run of a config file."""
  path = folder / f'{family}-0123456789-abcdef'
  path.mkdir(parents=True)
  (path / 'run.json').write_text(json.dumps({'train_flops_per_step': flops}))
  (path / 'status.json').write_text(json.dumps({'phase': 'finished'}))
  (path / 'timing.jsonl').write_text(''.join(
      json.dumps({'step': step, 'steps': 1, 'seconds': seconds / steps}) + '\n'
      for step in range(steps)))


@pytest.fixture
def nothing_committed(tmp_path, monkeypatch):
  """As if no results were committed."""
  monkeypatch.setattr(results_page, 'FOLDER', tmp_path / 'none')


def test_a_dry_run_adds_up_by_hand(tmp_path, monkeypatch, nothing_committed):
  monkeypatch.setattr(scheduler, 'cores', lambda: [0, 1, 2, 3])   # two workers have two cores each
  finished(tmp_path, 'known', seconds=36.0, steps=2, flops=50)   # 0.36 s per FLOP
  parent = Fake('known-p-f', cost=20_000, work=100)
  child = Fake('known-c-f', parent, cost=6_000, work=12, begun=2)
  other = Fake('new-o-f', cost=7)
  (tmp_path / parent.name).mkdir()
  (tmp_path / parent.name / 'done').touch()
  table = dry_run.table({'a': [parent, child], 'b': [parent, other]}, tmp_path, 2, Shard(2, 2))
  rows = {name: cells for name, *cells in (re.split(' {2,}', row) for row in table.splitlines())}
  # 10/12 of 6,000 FLOPs x 0.36 s x 2 cores / 3600 s
  assert rows['a'] == ['2', '1', '112', '2.60e+04', '5.00e+03', '1.00']
  assert rows['b'] == ['2', '1', '101', '2.00e+04', '7.00e+00', 'unknown']
  assert rows['all, shared jobs once'] == ['3', '1', '113', '2.60e+04', '5.01e+03',
                                           '1.00 + 1 jobs unknown']
  assert rows['shard 2/2'] == ['1', '0', '1', '7.00e+00', '7.00e+00', 'unknown']


def test_a_dry_run_of_a_fresh_clone_uses_the_committed_times(tmp_path, monkeypatch):
  monkeypatch.setattr(scheduler, 'cores', lambda: [0, 1, 2, 3])
  records = made_up.three_pairs()             # 1 s for 300 x 10 FLOPs (dense), 200 x 15 (sparse)
  for record in records:
    record['command'] = f'python -m moejax.main --config=configs/{record["arm"]}.py --steps=1'
  results.write(made_up.results(records), tmp_path / 'results' / 's')
  whole = dry_run.committed_seconds(results_page.FOLDER)
  assert {'t5_stdlib', 'vit_glyphs_upcycled'} <= set(whole) and all(v > 0 for v in whole.values())
  monkeypatch.setattr(results_page, 'FOLDER', tmp_path / 'results')
  finished(tmp_path / 'runs', 'sparse', seconds=7200.0, steps=1, flops=1)
  jobs = {'a': [Fake('dense-p-f', cost=1_080_000)], 'b': [Fake('sparse-p-f', cost=1)],
          'c': [Fake('tiny-p-f', cost=1)]}
  *_, a, b, c, _, note = dry_run.table(jobs, tmp_path / 'runs', 2).splitlines()
  # 1,080,000 / 3,000 s of one core; what is measured here counts for more; two hours on two cores.
  assert (a.split()[-1], b.split()[-1], c.split()[-1]) == ('0.10', '4.00', 'unknown')
  assert note == 'Times of dense: of the committed results, on another machine.'


def test_a_pair_is_its_runs_alone_and_suites_without_it_are_left_out(tmp_path, capsys,
                                                                     nothing_committed):
  flags = ['--suite=chains,alone', f'--runs={tmp_path}', '--dry_run', '--jobs=1']
  assert main.main([*flags, '--pairs=1']) == 0
  out, err = capsys.readouterr()
  assert [line.split()[:2] for line in out.splitlines()[1:]] == [['chains', '2']]
  assert err == 'alone: left out, it has none of these pairs\n'
  assert main.main([*flags, '--pairs=0,1']) == 0
  assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [
      ['chains', '3'], ['alone', '1']]


def test_a_dry_run_starts_and_writes_nothing(tmp_path, capsys, nothing_committed):
  folder = tmp_path / 'runs'
  assert main.main(['--suite=chains,alone', f'--runs={folder}', '--dry_run', '--jobs=1']) == 0
  out = capsys.readouterr().out.splitlines()
  cost = sum(run.cost for run in tiny.chains().runs())
  assert out[1].split() == ['chains', '3', '0', f'{2 * tiny.STEPS + 4}', f'{cost:.2e}',
                            f'{cost:.2e}', 'unknown']
  assert out[3].startswith('all, shared jobs once') and out[3].split()[4] == '3'
  assert not folder.exists()


def two_pairs() -> Suite:
  arms = []
  for pair in (0, 1):
    parent = dense(seed=pair)
    arms += [Arm('d', 'parent', parent, parent, pair=pair, reference=True),
             Arm('d', 'child', child(parent, seed=pair), parent, pair=pair)]
  claim = Claim('it helps', 'someone', 'no figures', 'd', 'child', '<', 'parent')
  return Suite('alone', 'mini', tuple(arms), (claim,))


def report(folder, *pairs) -> list[int]:
  """Reports some pairs, of which alone there are workdirs; returns the pairs of the records."""
  runs, suite = folder / '-'.join(map(str, pairs)), two_pairs()
  runs.mkdir(parents=True)
  for arm in suite.only_pairs(pairs).arms:
    first = 0 if arm.name == 'parent' else 20
    trained(runs, arm.run, first, 20, 30 + first + arm.pair)
  numbers = ','.join(map(str, pairs))
  args = main.parse(['--suite=alone', f'--runs={runs}', f'--results={folder / "out"}',
                     f'--pairs={numbers}'])
  main.Session({'alone': suite}, args).report('alone')
  return [record['pair'] for record in results.read(folder / 'out').records]


def test_pairs_that_are_trained_on_different_machines_join_in_one_table(tmp_path, monkeypatch):
  monkeypatch.setattr(suite_lib, '_fingerprint', lambda config: 'f' * 64)
  page = lambda folder: (folder / 'out' / 'alone.md').read_text()
  assert report(tmp_path, 1) == [1, 1]
  assert 'one pair' in page(tmp_path)
  assert report(tmp_path, 0) == [0, 0, 1, 1]
  assert 'one pair' not in page(tmp_path)
  assert report(tmp_path / 'whole', 0, 1) == [0, 0, 1, 1]
  assert page(tmp_path / 'whole') == page(tmp_path)
  lines = map(json.loads, (tmp_path / 'out' / results.FILE).read_text().splitlines())
  assert [line['kind'] for line in lines] == ['suite', 'claim'] + 4 * ['arm']
