"""The notebook, executed as it stands, and what it does where there is no checkout yet."""

import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import types

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from experiments import suite as suite_lib
from tests.experiments import tiny

PATH = pathlib.Path(suite_lib.__file__).parent / 'colab.ipynb'
SUITE = 'drop_upcycling'   # has committed results

# Saves when it is interrupted, and says how often it was.
INTERRUPTED = '''
import pathlib, signal, sys, time
count = 0
def receive(*_):
  global count
  count += 1
signal.signal(signal.SIGINT, receive)
pathlib.Path(sys.argv[1]).touch()
while not count:
  time.sleep(0.02)
time.sleep(0.3)
print(f'saved after {count}', file=sys.stderr)
'''
# Trains tiny suites in place of the real ones; all else is the notebook's own.
TINY = '''
def follow(command, follow=follow):
  return follow([word.replace('experiments.main', 'tests.experiments.tiny') for word in command])
'''
# In place of Python: notes its arguments; asked for devices, it has a GPU.
PYTHON = '''#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
if [ "$1" = -c ]; then echo 'gpu [CudaDevice(id=0)]'; fi
'''


def notebook():
  return nbformat.read(PATH, as_version=4)


def sources():
  """{id: code}."""
  return {cell.id: cell.source for cell in notebook().cells if cell.cell_type == 'code'}


def printed(cell):
  return ''.join(output.text for output in cell.outputs if output.output_type == 'stream')


def shown(cell, kind):
  return [output.data[kind] for output in cell.outputs
          if output.output_type == 'display_data' and kind in output.data]


def test_it_is_small_valid_and_without_outputs():
  there = json.loads(PATH.read_text())
  assert (there['nbformat'], there['nbformat_minor']) == (4, 5)
  nbformat.validate(there)
  assert PATH.stat().st_size < 20_000
  ids = [cell['id'] for cell in there['cells']]
  assert len(set(ids)) == len(ids)
  for before, cell in zip(there['cells'], there['cells'][1:]):
    if cell['cell_type'] == 'code':
      assert cell['outputs'] == [] and cell['execution_count'] is None
      assert before['cell_type'] == 'markdown'


def test_its_form_offers_every_suite():
  form = dict(re.findall(r'^(\w+) = .*# @param (\[.*\])$', sources()['parameters'], re.MULTILINE))
  assert json.loads(form['SUITE']) == suite_lib.names()
  assert set(json.loads(form['SCALE'])) == set(suite_lib.SCALES) - {'paper'}
  values = {}
  exec(sources()['parameters'], values)
  assert values['SUITE'] in suite_lib.names() and values['SCALE'] == 'colab'
  assert values['SAVE_TO_DRIVE'] is False and values['REPOSITORY'] == ''


def test_it_trains_a_suite_and_shows_it(tmp_path):
  """And afterwards finds it trained, and is interrupted."""
  book = notebook()
  train, flag = sources()['train'], tmp_path / 'started'
  # What starts the workers must not take the TPU they need: here, one that there is not.
  again = f'assert "jax" not in sys.modules\nos.environ["JAX_PLATFORMS"] = "tpu"\n{train}'
  wait = f'follow([sys.executable, "-c", {INTERRUPTED!r}, {str(flag)!r}])'
  book.cells.insert([cell.id for cell in book.cells].index('install') + 1,
                    nbformat.v4.new_code_cell(TINY, id='tiny'))
  book.cells += [
      nbformat.v4.new_code_cell(again, id='again'),
      nbformat.v4.new_code_cell(wait, id='interrupt', metadata={'tags': ['raises-exception']})]
  manager = KernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
  client = NotebookClient(book, km=manager, timeout=500,
                          resources={'metadata': {'path': str(PATH.parent)}})
  environment = {**tiny.environment(), 'MOEJAX_SUITE': SUITE, 'MOEJAX_SCALE': 'smoke',
                 'MOEJAX_RUNS': str(tmp_path / 'runs'), 'IPYTHONDIR': str(tmp_path / 'ipython')}

  def interrupt():
    while not flag.exists():
      time.sleep(0.05)
    manager.interrupt_kernel()   # its whole process group, as the button does

  threading.Thread(target=interrupt, daemon=True).start()
  client.execute(env=environment)
  cells = {cell.id: cell for cell in book.cells}

  work = sum(run.work for run in tiny.chain().runs())
  assert 'cpu' in printed(cells['install'])
  assert re.search(rf'\d+%\|.*\| \d+/{work} \[', printed(cells['train']))   # the bar
  table, = shown(cells['show'], 'text/markdown')
  assert '| child ' in table and f'# {SUITE}, scale smoke' in table and '.png' not in table
  picture, = shown(cells['show'], 'image/png')
  assert picture.startswith('iVBORw0KGgo')   # PNG, in base64
  committed, = shown(cells['compare'], 'text/markdown')
  assert '| copies (r=0) *' in committed and len(shown(cells['compare'], 'image/png')) == 1

  assert re.search(r'[1-9]\d* jobs finished, 0 to do', printed(cells['again']))
  assert 'saved after 1\r\n' in printed(cells['interrupt'])
  assert cells['interrupt'].outputs[-1].ename == 'KeyboardInterrupt'


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """A folder that is no checkout, with a stand-in for Python; and a repository to clone."""
  (tmp_path / 'python').write_text(PYTHON)
  (tmp_path / 'python').chmod(0o755)
  origin, here = tmp_path / 'origin', tmp_path / 'content'
  (origin / 'experiments').mkdir(parents=True)
  (origin / 'experiments/main.py').touch()
  here.mkdir()
  git = ['git', '-C', str(origin), '-c', 'user.name=a', '-c', 'user.email=a@b']
  for words in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'a']):
    subprocess.run([*git, *words], check=True)
  monkeypatch.chdir(here)
  monkeypatch.setattr(sys, 'executable', str(tmp_path / 'python'))
  for name in ('SUITE', 'SCALE', 'RUNS'):
    monkeypatch.delenv(f'MOEJAX_{name}', raising=False)
  return tmp_path


def packages(monkeypatch, *names):
  monkeypatch.setattr('importlib.metadata.distributions',
                      lambda: [types.SimpleNamespace(name=name) for name in names])


def test_it_clones_and_installs_beside_the_accelerators_build_of_jax(elsewhere, monkeypatch):
  code = sources()
  packages(monkeypatch, 'jax', 'jax-cuda12-plugin')
  values = {}
  exec(code['parameters'], values)
  with pytest.raises(RuntimeError, match='set REPOSITORY'):
    exec(code['install'], values)
  values['REPOSITORY'] = str(elsewhere / 'origin')
  exec(code['install'], values)
  assert pathlib.Path.cwd() == values['root'] == elsewhere / 'content/moejax'
  calls = (elsewhere / 'calls').read_text().splitlines()
  assert calls[0] == '-m pip install --quiet --editable . jax[cuda12]'
  exec(code['drive'], values)
  assert values['RUNS'] == elsewhere / 'content/moejax/runs'
  exec(code['train'], values)
  assert (elsewhere / 'calls').read_text().splitlines()[-1].split() == [
      '-m', 'experiments.main', '--suite=dense_vs_upcycled', '--scale=colab',
      f'--runs={values["RUNS"]}', f'--results={values["RUNS"]}/dense_vs_upcycled-colab', '--jobs=1']

  # The same in a new kernel: the clone is found, and what is installed is left alone.
  (elsewhere / 'calls').unlink()
  packages(monkeypatch, 'jax', 'jax-cuda12-plugin', 'moejax')
  os.chdir(elsewhere / 'content')
  exec(code['install'], {'os': os, 'REPOSITORY': ''})
  assert pathlib.Path.cwd() == elsewhere / 'content/moejax'
  assert not (elsewhere / 'calls').read_text().startswith('-m pip')


def test_what_fails_is_said_and_raises(elsewhere, monkeypatch, capsys):
  packages(monkeypatch, 'jax')
  values = {'os': os, 'REPOSITORY': str(elsewhere / 'nowhere')}
  with pytest.raises(RuntimeError, match='nowhere could not be cloned'):
    exec(sources()['install'], values)
  assert 'fatal:' in capsys.readouterr().out
  (elsewhere / 'python').write_text('#!/bin/sh\necho no luck >&2\nexit 1\n')
  values['REPOSITORY'] = str(elsewhere / 'origin')
  with pytest.raises(RuntimeError, match='pip could not install'):
    exec(sources()['install'], values)
  assert 'no luck' in capsys.readouterr().out
  values |= {'RUNS': elsewhere, 'SUITE': 's', 'SCALE': 'smoke',
             'devices': types.SimpleNamespace(stdout='cpu')}
  with pytest.raises(RuntimeError, match='exit code 1'):
    exec(sources()['train'], values)
  assert 'no luck' in capsys.readouterr().out


def test_runs_are_kept_in_drive_if_asked(tmp_path, monkeypatch):
  mounted = []
  colab = types.SimpleNamespace(drive=types.SimpleNamespace(mount=mounted.append))
  monkeypatch.setitem(sys.modules, 'google.colab', colab)
  monkeypatch.delenv('MOEJAX_RUNS', raising=False)
  values = {'os': os, 'pathlib': pathlib, 'root': tmp_path, 'SAVE_TO_DRIVE': True}
  exec(sources()['drive'], values)
  assert mounted == ['/content/drive']
  assert values['RUNS'].is_relative_to('/content/drive/MyDrive')
