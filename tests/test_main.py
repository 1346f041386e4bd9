"""The command line and the errors a user meets: one message, exit code 1, nothing left behind."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import pytest

from configs.pretrain import t5_stdlib, vit_glyphs
from configs.upcycle import t5_stdlib_upcycled, vit_glyphs_upcycled
from moejax.cluster.watchdog import LOST
from moejax.config import ConfigError
from moejax.train import config as run_config
from moejax.train import loop
from tests import fork_server

ROOT = pathlib.Path(__file__).parent.parent


def command(*args, new=None):
  """The result of python -m moejax.main with these arguments; new: subprocess, or a fork."""
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return (new or fork_server).run([sys.executable, '-m', 'moejax.main', *args], cwd=ROOT, env=env,
                                  capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('args, expected', [
    (['--config=configs/pretrain/vit_glyphs.py', '--config.optimizer.learning_rat=1',
      '--workdir={tmp}'],
     r"config\.optimizer\.learning_rat: no such key; did you mean 'learning_rate'\?"),
    (['--config=configs/pretrain/vit_glyphs.py', '--config.steps=many', '--workdir={tmp}'],
     r"flag --config\.steps=many"),
    (['--config=configs/no_such.py', '--workdir={tmp}'],
     r'--config: no such file: configs/no_such\.py'),
    (['--config', 'configs/no_such.py:runlocal', '--workdir={tmp}'],
     r'--config: no such file: configs/no_such\.py\. Usage: '),
    (['--config', '--workdir={tmp}'], r'--config: no such file: --workdir='),
    (['--config=configs/upcycle/vit_glyphs_upcycled.py', '--workdir={tmp}',
      '--config.model.moe.experts_per_layer=(4,x)'],
     r"config\.model\.moe\.experts_per_layer: got \('\(4,x\)',\), allowed: integers >= 1, one per "
     r"sparse block, as in '\(4, 8\)'\. Or leave it empty and set num_experts\."),
    (['--config=configs/pretrain/vit_glyphs.py:runlocla', '--workdir={tmp}'],
     r"config argument: got 'runlocla'.*Did you mean 'runlocal'\?"),
    (['--config=configs/pretrain/vit_glyphs.py'], r'--workdir: missing'),
    (['--config=configs/pretrain/vit_glyphs.py', '--workdir='], r'--workdir: missing'),
    (['--config=configs/pretrain/vit_glyphs.py', '--config.microbatches=0', '--workdir={tmp}',
      '--coordinator=localhost:9', '--processes=2', '--process=1'],   # said without the other one
     r'microbatches: got 0'),
    (['--confg=configs/pretrain/vit_glyphs.py'], r"Unknown command line flag 'confg'"),
    (['--config=configs/pretrain/vit_glyphs.py', '--compile_for=v5q:2x2', '--workdir={tmp}'],
     r"--compile_for: got 'v5q'.*Did you mean 'v5"),
    (['--config=configs/upcycle/vit_glyphs_upcycled.py', '--workdir={tmp}',
      '--config.init.parent=none'],
     r"config\.init\.parent: got 'none'.*Train that run first"),
])
def test_command_line_mistakes(args, expected, tmp_path):
  workdir = tmp_path / 'run'
  result = command(*[a.format(tmp=workdir) for a in args])
  message = result.stderr.strip().splitlines()
  assert result.returncode == 1
  assert 'Traceback' not in result.stderr
  assert re.search(expected, message[-1]) and message[-1].startswith('moejax: ')
  assert not workdir.exists()


@pytest.mark.parametrize('process', [0, 1])
def test_a_process_that_stays_alone_says_so_and_may_be_started_again(process, tmp_path):
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
  result = command('--config=configs/pretrain/vit_glyphs.py:runlocal',
                   f'--workdir={tmp_path / "run"}',
                   f'--coordinator=localhost:{port}', '--processes=2', f'--process={process}',
                   '--join_seconds=2')
  assert result.returncode == LOST, result.stderr
  assert re.search(r"moejax: --distributed: got 'flags', allowed: 2 processes that find each other "
                   r'within 2 s \(not all came\)\. Start the same command', result.stderr)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('asked', ['--help', '-h'])
def test_help_says_how_to_use_it(asked):
  result = command('--config', 'configs/pretrain/vit_glyphs.py', asked, new=subprocess)
  assert (result.returncode, result.stderr) == (0, '')
  assert '--config=FILE[:arg] --workdir=DIR' in result.stdout
  assert '--workdir' in result.stdout and 'Directory of the run' in result.stdout
  assert '--config.init.parent=runs/vit_glyphs' in result.stdout


def test_a_config_may_stand_after_its_flag(tmp_path):
  result = command('--config', 'configs/pretrain/vit_glyphs.py:runlocal',
                   '--workdir', str(tmp_path / 'run'),
                   '--config.steps=3')
  assert 'config.schedule.cooldown_steps: got 4, allowed: at most steps = 3' in result.stderr


CONFIGS = {'vit': vit_glyphs, 't5': t5_stdlib, 'vit_moe': vit_glyphs_upcycled,
           't5_moe': t5_stdlib_upcycled}


# The mistake under test is to be the only one.
NO_PARENT = {'init.mode': 'scratch', 'init.parent': ''}


@pytest.mark.parametrize('config, changes, expected', [
    ('vit_moe', {'model.moe.layers': '1,7'}, r"model\.moe\.layers: got '1,7'.*from 0 to 3"),
    ('vit_moe', {'model.moe.layers': 'last_9'}, r"model\.moe\.layers: got 'last_9'.*4 blocks"),
    ('vit_moe', {'model.moe.layers': 'second'}, r"model\.moe\.layers: got 'second'.*'every_2'"),
    ('t5_moe', {'model.decoder_moe.k': 9}, r'moe\.k: got 9.*1 to num_experts = 8'),
    ('t5_moe', {'model.decoder_moe.router': 'expert_choice',
                'model.decoder_moe.balance_weight': 0.0},
     r'model\.decoder_moe\.router: got .expert_choice.*cannot decode'),
    ('t5_moe', {'model.decoder_moe.k': 1, 'model.decoder_moe.renormalize': True},
     r'moe\.renormalize: got True.*never learn'),
    ('t5_moe', {'model.encoder_moe.router': 'expert_choise'},
     r"moe\.router: got 'expert_choise'.*Did you mean 'expert_choice'"),
    ('vit_moe', {'model.moe.group_size': 50}, r'model\.moe\.group_size: got 50.*Nearest: 48'),
    ('vit', {'data.batch_size': 63}, r'config\.data\.batch_size: got 63.*8 devices.*Nearest: 64'),
    ('vit_moe', {'data.batch_size': 8},
     r'config\.data\.batch_size: got 8.*128 = 16 examples per routing group x 8 devices'),
    ('vit', {'mesh.expert': 3}, r'config\.mesh: got .*expert=3.*8 devices'),
    ('vit', {'data.source': 'glyhps'}, r"got 'glyhps'.*Did you mean 'glyphs'"),
    ('vit', {'data.source': 'stdlib_text'}, r"config\.data\.source: got 'stdlib_text'.*'vit'"),
    ('vit', {'model.num_classes': 10}, r'config\.model\.num_classes: got 10.*at least 4096'),
    ('vit', {'model.image_size': 30}, r'config\.model\.image_size and channels: got \(30, 30, 1\)'),
    ('vit', {'eval_every': 30}, r'config\.eval_every: got 30.*multiple of log_every'),
    ('vit', {'microbatches': 3}, r'config\.microbatches: got 3.*divisor of data\.batch_size'),
    ('vit', {'parallel': 'pmap', 'mesh.expert': 2}, r'config\.mesh\.expert: got 2.*data-parallel'),
    ('vit', {'optimizer.name': 'adamwx'}, r"got 'adamwx'.*Did you mean 'adamw'"),
    ('vit', {'init.mode': 'upcycle'}, r"config\.init\.parent: got ''.*workdir of a finished run"),
])
def test_settings_that_cannot_work(config, changes, expected, tmp_path):
  config = CONFIGS[config].get_config()
  config.update_from_flattened_dict(NO_PARENT | changes)
  workdir = tmp_path / 'run'
  with pytest.raises(ConfigError, match=expected):
    loop.run(run_config.resolve(config), str(workdir))
  assert not workdir.exists()


def test_a_file_that_sets_a_wrong_type_or_key():
  config = vit_glyphs.get_config()
  values = config.to_dict()
  values['optimizer']['learning_rate'] = 'high'
  with pytest.raises(ConfigError, match=r"config\.optimizer\.learning_rate: got 'high'.*float"):
    run_config.resolve(values)
  values = config.to_dict()
  values['optimizer']['lerning_rate'] = 1.0
  with pytest.raises(ConfigError, match=r"config\.optimizer\.lerning_rate.*'learning_rate'"):
    run_config.resolve(values)
