"""What README, docs and docstrings show exists, and can be typed.

Their commands parse (flags, configs, suites, scales), their paths and links lead somewhere, the
menu of methods is complete, and the committed results are those that `experiments.report` makes.
"""

import ast
import dataclasses
import json
import pathlib
import re
import shlex
import shutil

import pytest

from experiments import report
from moejax.moe import presets
from moejax.moe.config import MoEConfig
from moejax.train.config import RunConfig
from tests import fork_server, house

ROOT = house.ROOT
README = (ROOT / 'README.md').read_text()
PAGES = [ROOT / 'README.md', ROOT / 'tests/README.md', *(ROOT / 'docs').glob('*.md'),
         ROOT / 'experiments/launch/README.md']
GENERATED = sorted((ROOT / 'experiments/results').glob('**/*.md'))


def strings(file: house.File) -> list[str]:
  """The strings of a Python file, docstrings included; a value within an f-string is '{}'."""
  inside = set()   # parts of an f-string, which come as a whole
  found = []
  for node in ast.walk(file.tree):
    if isinstance(node, ast.JoinedStr):
      inside |= {id(part) for part in node.values}
      found.append(''.join(part.value if isinstance(part, ast.Constant) else '{}'
                           for part in node.values))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
      found.append(node.value)
  return found


TEXTS = {str(path.relative_to(ROOT)): path.read_text()
         for path in (*PAGES, *(path for end in ('sh', 'yaml')
                                for path in (ROOT / 'experiments/launch').glob(f'*.{end}')))}
TEXTS |= {file.path: '\n\n'.join(strings(file)) for file in house.read().values()
          if not file.path.startswith('tests/')}

# Values in place of what stands for any: NAME, DIR, ..., {}.
VALUES = {'--suite': 'quickstart', '--scale': 'smoke', '--shard': '1/4', '--pairs': '0',
          '--config': 'configs/pretrain/vit_glyphs.py', '--coordinator': 'localhost:9'}
PLACEHOLDER = re.compile(r'[A-Z_:,]*|\.\.\.|.*\{\}.*')


def commands(text: str) -> list[tuple[str, list[str]]]:
  """[(module, flags)] of each `python -m MODULE --flag=value ...`.

  It ends at the first word that is no flag. Brackets around what may be left out are removed, and
  placeholders are replaced by a value.
  """
  found = []
  for module, rest in re.findall(r'python3? -m\s+((?:moejax|experiments)(?:\.\w+)+)((?:\\?\s.*)?)',
                                 text.replace('\\\n', ' ')):
    words = []
    if '$' in rest:   # a script's own variables
      continue
    for word in re.sub(r'\[:arg\]|\[,NAME\.*\]|[][`]', '', rest).split():
      flag, equals, value = word.rstrip('.,;:)').partition('=')
      if not flag.startswith('--'):
        break
      if not flag.startswith('--config.a'):
        words.append(flag + equals + (VALUES.get(flag, 'X') if equals and PLACEHOLDER.fullmatch(
            value) else shlex.split(value)[0] if value else ''))
    found.append((module, words))
  return found



@pytest.fixture(scope='module')
def parsed():
  """{(module, flags): what its parser made of it} of all commands in all texts."""
  unique = sorted({(module, tuple(flags)) for text in TEXTS.values()
                   for module, flags in commands(text) if flags})
  done = fork_server.run(['tests.parse_commands'], input=json.dumps(unique), cwd=ROOT, text=True,
                         capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return dict(zip(unique, map(json.loads, done.stdout.splitlines()), strict=True))


def test_commands_parse(parsed):
  """Flags are known, configs exist and resolve, suites and scales exist."""
  assert len(parsed) > 30
  assert [(*command, result['error']) for command, result in parsed.items()
          if 'error' in result] == []


def test_a_wrong_command_is_seen():
  wrong = [('moejax.main', ['--config=configs/pretrain/vit_glyph.py', '--workdir=X']),
           ('moejax.main', [f'--config={VALUES["--config"]}', '--workdir=X', '--config.step=1']),
           ('experiments.main', ['--suite=quickstart', '--scales=mini']),
           ('experiments.benchmarks.train_step', ['--suite=quickstrt']),
           ('experiments.benchmarks.loader', ['--rownds=3'])]
  done = fork_server.run(['tests.parse_commands'], input=json.dumps(wrong), cwd=ROOT, text=True,
                         capture_output=True, timeout=120)
  assert ['error' in json.loads(line) for line in done.stdout.splitlines()] == [True] * len(wrong)
  assert commands('`python -m experiments.report --suite=NAME[,NAME] [--scale=mini]` or \n'
                  ' python -m experiments.main \\\n --list  # which\n') == [
                      ('experiments.report', ['--suite=quickstart', '--scale=mini']),
                      ('experiments.main', ['--list'])]


def test_what_is_called_a_command_is_one():
  """A module without a main would do nothing, and end with exit code 0."""
  texts = [*TEXTS.values(), *(path.read_text() for path in GENERATED),
           *(file.text for file in house.read().values())]
  found = {name for text in texts for name in re.findall(
      r'python -m\s+((?:moejax|experiments|tests)(?:\.\w+)+)', text)}
  assert len(found) > 8
  for name in found:
    path = ROOT / name.replace('.', '/')
    file = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
    assert house.is_command(file.read_text()), name


@pytest.mark.parametrize('name', ['README.md', 'docs/methods.md', 'moejax/main.py'])
def test_runs_find_their_parents(name, parsed):
  """Parents are runs of the same text, or have their default name: that of a config."""
  made = set()
  for module, flags in commands(TEXTS[name]):
    given = dict(flag.split('=', 1) for flag in flags if '=' in flag)
    if module != 'moejax.main' or not given.get('--workdir', 'X').startswith('runs/'):
      continue
    config, _, arg = given['--config'].partition(':')
    if len(given) == 2 and not arg:
      assert given['--workdir'] == f'runs/{pathlib.Path(config).stem}'
    init = parsed[module, tuple(flags)]
    if '--config.init.parent' in given:
      assert init['parent'] in made
    elif init['mode'] != 'scratch':
      assert list(ROOT.glob(f'configs/*/{init["parent"].removeprefix("runs/")}.py'))
    made.add(given['--workdir'])
  assert len(made) >= 2


def test_make_targets_exist():
  targets = {target for path in PAGES for target in re.findall(
      r'(?:^|`)make ([a-z][\w-]*)', path.read_text(), re.MULTILINE)}
  assert {'quickstart', 'test', 'parity', 'tpu'} <= targets
  makefile = (ROOT / 'Makefile').read_text()
  assert all(re.search(rf'^{target}:', makefile, re.MULTILINE) for target in targets)
  assert targets - {'help'} <= set(re.findall(r"echo 'make ([\w-]+)", makefile)), 'make help'


@pytest.mark.parametrize('path', [*PAGES, *GENERATED], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
  for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
    if not re.match('https?:', link):
      file, _, anchor = link.partition('#')
      target = path.parent / file if file else path
      assert target.exists(), link
      headings = re.findall(r'^#+ (.+)', target.read_text(), re.MULTILINE) if anchor else ()
      assert not anchor or anchor in {
          re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}, link


def test_paths_lead_somewhere():
  pattern = (r'(?<![\w/.-])(?:moejax|configs|experiments|tests|docs)/[\w/.-]*\w'
             r'\.(?:py|md|sh|yaml|jsonl|npz)\b')
  missing = {(name, path) for name, text in TEXTS.items() for path in re.findall(pattern, text)
             if not (ROOT / path).exists() and not (ROOT / name).parent.joinpath(path).exists()
             and not re.search('[A-Z]', pathlib.Path(path).stem)}   # configs/X.py: any
  assert not missing


def test_the_quickstart_table_is_the_committed_one():
  results = (ROOT / 'experiments/results/quickstart/quickstart.md').read_text()
  rows = [line for line in results.splitlines() if line.startswith(('|', '**'))]
  assert len(rows) > 10
  assert all(row in README for row in rows)


def test_report_makes_the_committed_results(tmp_path):
  """Tables, page and plots, byte for byte; the pinned matplotlib draws alike on all machines."""
  committed = ROOT / 'experiments/results'
  shutil.copytree(committed, tmp_path / 'results')
  content = lambda folder: {str(path.relative_to(folder)): path.read_bytes()
                            for path in sorted(folder.rglob('*')) if path.is_file()}
  for path in (tmp_path / 'results').rglob('*'):
    if path.suffix in ('.md', '.csv', '.png') and (path.parent / 'results.jsonl').exists():
      path.unlink()
  assert report.main([f'--results={tmp_path / "results"}']) == 0
  before, after = content(committed), content(tmp_path / 'results')
  assert [name for name in before | after if before.get(name) != after.get(name)] == []


# The menu of methods leaves no preset and no MoE setting out.

MENU = (ROOT / 'docs' / 'methods.md').read_text()
WORDS = set(re.findall(r'`([^`\n]+)`', MENU))
MOE = {f.name for f in dataclasses.fields(MoEConfig)}
# Sizes and floors, which are not methods.
PLAIN = {'num_experts', 'eval_capacity_factor', 'min_capacity', 'group_size', 'router_init_std'}


@pytest.mark.parametrize('name', sorted(set(presets.BY_NAME) - {'sparse_upcycling_decoder'}))
def test_every_preset_is_on_the_menu(name):
  assert name in WORDS


@pytest.mark.parametrize('key', sorted(MOE - PLAIN))
def test_every_moe_setting_is_on_the_menu(key):
  assert any(re.search(rf'\b{key}\b', word) for word in WORDS)


def test_every_key_on_the_menu_exists():
  rooms = {f.name: f.default for f in dataclasses.fields(RunConfig)}
  found = 0
  for word in WORDS:
    match = re.fullmatch(r'(\w+)\.(\w+)(=\w+)?', word)
    if match and match[1] in rooms and dataclasses.is_dataclass(rooms[match[1]]):
      assert hasattr(rooms[match[1]], match[2]), word
      found += 1
    setting = re.fullmatch(r'(\w+)=(\w+)', word)
    if setting and setting[1] in MOE:
      kind = {f.name: f.type for f in dataclasses.fields(MoEConfig)}[setting[1]]
      assert kind is not str or setting[2] in _choices(setting[1]), word
      found += 1
  assert found > 30


def _choices(key):
  """What MoEConfig says it allows."""
  with pytest.raises(ValueError) as error:
    MoEConfig(**{key: '?'})
  return str(error.value)


def test_the_snippet_of_the_readme_runs():
  snippet = re.search(r'```python\n(.*?)```', README, re.DOTALL)[1]
  assert len(README.splitlines()) <= 150 and snippet.count('\n') <= 15
  names = {}
  exec(snippet, names)
  assert names['y'].shape == names['x'].shape
