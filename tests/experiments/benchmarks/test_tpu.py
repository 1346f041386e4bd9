"""The table of what is compiled for TPUs, with reports made by hand in place of the compiler."""

import json
import pathlib
import signal

import pytest

from configs import paper
from experiments.benchmarks import tpu
from moejax.aot import chips
from moejax.config import ConfigError
from moejax.train import metrics


def report(case, mfu=0.5):
  return {
      'table': case.table, 'name': case.name, 'key': case.key, 'config': case.config,
      'changes': dict(case.changes), 'slice': case.slice, 'chips': 8,
      'mesh': {'data': 2, 'fsdp': 1, 'expert': 4, 'model': 1}, 'parameters': 2_000_000_000,
      'parameters_active_per_token': 250_000_000,
      'memory': {'total': 8 * chips.GIB, 'available': 15.75 * chips.GIB},
      'reading': tpu.report.READING, 'flops': {'model': 100.0, 'executed': 133.0},
      'collectives': [{'kind': 'all-to-all', 'sent_bytes': chips.GIB},
                      {'kind': 'all-reduce', 'sent_bytes': 2 * chips.GIB},
                      {'kind': 'all-gather', 'sent_bytes': chips.GIB}],
      'roofline': {'serial': 0.5, 'mfu_serial': mfu, 'compute_bound': 0.2,
                   'memory_bound': 0.2, 'network': 0.1},
      'seconds': {'trace': 3.0, 'compile': 58.0},
      'versions': {'jax': '1.2'}}


@pytest.fixture
def compiled(monkeypatch):
  """Names that were compiled; 'vit_l16' cannot be."""
  names = []

  def compile_case(case, programs):
    names.append(case.name)
    if case.name == 'vit_l16':
      raise ConfigError('vit_l16: does not fit')
    return report(case, 0.45 if '_upcycled' in case.name else 0.5)
  monkeypatch.setattr(tpu, 'compile_case', compile_case)
  return names


def test_what_is_compiled_is_not_compiled_again_and_failures_are_reported(
    compiled, tmp_path, capsys):
  flags = [f'--results={tmp_path}', '--only=vit_l']
  assert tpu.main(flags) == 1
  assert compiled == ['vit_l32', 'vit_l32_upcycled', 'vit_l16', 'vit_l16_upcycled']
  assert 'vit_l16: does not fit' in capsys.readouterr().err
  assert tpu.main(flags) == 1 and compiled[4:] == ['vit_l16']
  path = tmp_path / tpu.FILE
  path.write_text(path.read_text().replace('"key": "', '"key": "x', 1))   # of another setting
  assert tpu.main(flags) == 1 and compiled[5:] == ['vit_l32', 'vit_l16']
  assert len(metrics.read_lines(path)) == 3


def test_ablations_are_what_they_are_called():
  config = {case.name: case.run_config() for case in tpu.all_cases()}
  eight = config['t5_base_upcycled, 8 experts']
  assert eight.model.decoder_moe.num_experts == eight.mesh.expert == 8
  assert eight.model.encoder_moe.capacity_factor == 2
  three = config['t5_base_upcycled, C = 3'].model
  assert three.encoder_moe.capacity_factor == three.decoder_moe.eval_capacity_factor == 3
  assert config['t5_base_upcycled, 128 experts'].microbatches == 4   # 2 would not fit
  assert config['vit_b16_upcycled, 128 experts'].model.moe.num_experts == 128
  top = config['t5_base_upcycled, top-1'].model
  assert (top.encoder_moe.router, top.encoder_moe.k, top.decoder_moe.k) == ('top_k', 1, 1)
  assert len(config['vit_b16_upcycled, every layer'].model.sparse_layers()) == 12
  fine = config['t5_base_superglue_upcycled']
  assert fine.model.encoder_moe.num_experts == 32 and fine.data.source == 'super_glue'


def test_the_page_has_the_numbers(compiled, tmp_path, capsys):
  assert tpu.main([f'--results={tmp_path}', '--table=paper', '--only=vit_b32']) == 0
  text = (tmp_path / tpu.PAGE).read_text()
  dense, sparse = ([c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines()
                   if line.startswith('| vit'))
  assert sparse == ['vit_b32_upcycled', 'v5e:4x4', 'data=2 expert=4', '2,000 M', '250 M', '8.00',
                    '15.75', '1.33', '1.00', '3.00', '500', '0.45', '0.90', '61 s']
  assert dense[0] == 'vit_b32' and dense[12] == ''
  capsys.readouterr()
  assert tpu.main([f'--results={tmp_path}', '--show']) == 0
  assert capsys.readouterr().out.strip() == text.strip()
  assert len(compiled) == 2


def test_lines_of_an_earlier_reading_are_marked_and_not_compared(compiled, tmp_path):
  assert tpu.main([f'--results={tmp_path}', '--table=paper', '--only=vit_b32']) == 0
  lines = metrics.read_lines(tmp_path / tpu.FILE)
  assert '†' not in tpu.page(lines)
  lines[0].pop('reading')
  cells = [[c.strip() for c in line.split('|')] for line in tpu.page(lines).splitlines()
           if line.startswith('| vit')]
  assert cells[0][1] == 'vit_b32 †' and cells[1][1] == 'vit_b32_upcycled' and not cells[1][13]
  assert '†: read by an earlier version' in tpu.page(lines)


def test_every_case_has_a_command_and_a_key_of_its_own():
  found = tpu.all_cases()
  assert len({case.key for case in found}) == len(found)
  weak = [case for case in found if case.table == 'weak']
  assert [case.changes['data.batch_size'] // tpu.PER_CHIP for case in weak] == [
      1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
  command = weak[2].command('DIR')
  assert '--config.mesh.expert=4' in command and '--compile_for=v5p:2x2x1' in command
  assert {case.name for case in found if case.table == 'paper'} >= {'t5_xl', 't5_xl_upcycled'}


@pytest.mark.parametrize('code, output, shown', [
    (1, 'noise\nmoejax: --compile_for: no such slice\n', 'moejax: --compile_for: no such slice'),
    (-9, '', 'ended with -9 and no message')])   # as where memory was short
def test_the_last_line_of_the_compiler_is_shown(monkeypatch, tmp_path, code, output, shown, capsys):
  monkeypatch.setattr(tpu.subprocess, 'run', lambda *args, **kwargs: type(
      'Done', (), {'returncode': code, 'stderr': output}))
  assert tpu.main([f'--results={tmp_path}', '--only=t5_xl_upcycled']) == 1
  assert f't5_xl_upcycled: {shown}\n' in capsys.readouterr().err


def test_a_compiler_that_crashes_is_started_again(monkeypatch, tmp_path):
  codes = [-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGSEGV, 1]
  monkeypatch.setattr(tpu.subprocess, 'run', lambda *args, **kwargs: type(
      'Done', (), {'returncode': codes.pop(0), 'stderr': 'Fatal Python error\nnoise\n'}))
  case = tpu.all_cases()[0]
  log = tmp_path / case.key / tpu.CRASH
  with pytest.raises(ConfigError, match=rf'compiler crashed 3 times \(SIGSEGV\).*{log}'):
    tpu.compile_case(case, tmp_path)
  assert log.read_text() == 'Fatal Python error\nnoise\n' and codes == [1]


def test_its_report_becomes_a_line(monkeypatch, tmp_path):
  def run(command, **kwargs):
    workdir = next(w for w in command if w.startswith('--workdir=')).removeprefix('--workdir=')
    pathlib.Path(workdir).mkdir()
    with open(f'{workdir}/ahead.json', 'w') as file:
      json.dump({'slice': 'v5e:4x8', 'chips': 32}, file)
    return type('Done', (), {'returncode': 0})
  monkeypatch.setattr(tpu.subprocess, 'run', run)
  line = tpu.compile_case(case := tpu.all_cases()[0], tmp_path)
  assert (line['name'], line['chips'], line['key']) == ('t5_base', 32, case.key)


def test_programs_that_are_kept_are_read_again(compiled, tmp_path, monkeypatch, capsys):
  flags = [f'--results={tmp_path}', f'--programs={tmp_path}', '--table=paper']
  tpu.main([*flags, '--only=vit_b32'])
  sparse = next(e for e in tpu.all_cases() if e.name == 'vit_b32_upcycled')
  (tmp_path / sparse.key).mkdir()
  (tmp_path / sparse.key / 'program.hlo.gz').touch()
  monkeypatch.setattr(tpu.report, 'read_again', lambda folder: {
      **report(sparse, 0.4), 'read': folder.name})
  assert tpu.main([*flags, '--read_again']) == 1
  assert capsys.readouterr().err == (
      f'Not read again, their programs are not in {tmp_path}: vit_b32\n')
  dense, again = metrics.read_lines(tmp_path / tpu.FILE)
  assert again['read'] == sparse.key and again['roofline']['mfu_serial'] == 0.4
  assert tpu.main([*flags, '--read_again', '--only=vit_b32_upcycled']) == 0   # the other stays
  assert metrics.read_lines(tmp_path / tpu.FILE) == [dense, again]
  assert dense['roofline']['mfu_serial'] == 0.5 and len(compiled) == 2


def test_the_page_shows_plots_that_are_there(compiled, tmp_path, monkeypatch):
  drawn = []
  for table, real in tpu.PLOTS.items():
    monkeypatch.setitem(tpu.PLOTS, table, lambda lines, figure, real=real: (
        drawn.extend(line['name'] for line in lines), real(lines, figure)))
  assert tpu.main([f'--results={tmp_path}', '--table=weak', '--only=2 chips']) == 0
  assert drawn == ['2 chips', '32 chips', '512 chips'] and not (tmp_path / 'paper.png').exists()
  assert tpu.main([f'--results={tmp_path}', '--table=paper', '--only=vit_b']) == 0
  text = (tmp_path / tpu.PAGE).read_text()
  for name in ('paper', 'weak'):
    assert f']({name}.png)' in text and (tmp_path / f'{name}.png').stat().st_size > 5000


# By the estimate; the paper's own runs reach the aim, see docs/scale.md.
BELOW = {'t5_base_upcycled, every layer'}


def test_the_committed_tables_are_of_all_that_there_is_and_it_fits(monkeypatch):
  lines = {(line['table'], line['name']): line
           for line in metrics.read_lines(tpu.FOLDER / tpu.FILE)}
  assert lines.keys() == {(case.table, case.name) for case in tpu.all_cases()}
  for case in tpu.all_cases():
    line = lines[case.table, case.name]
    monkeypatch.setattr(tpu.jax, '__version__', line['versions']['jax'])
    assert line['key'] == case.key, f'{case.name}: other settings; compile it again'
    assert line['memory']['total'] <= line['memory']['available'], case.name


def test_the_committed_runs_reach_the_aim_but_for_those_that_are_named():
  mfu = {(line['table'], line['name']): line['roofline']['mfu_serial']
         for line in metrics.read_lines(tpu.FOLDER / tpu.FILE)}
  shares = {name: value / mfu['paper', name.partition('_upcycled')[0]]
            for (_, name), value in mfu.items() if '_upcycled' in name}
  assert len(shares) == len(paper.SLICES) + len(tpu.VARIED) * len(tpu.ABLATIONS)
  assert {name for name, share in shares.items() if share < tpu.LIMIT} == BELOW
