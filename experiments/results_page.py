"""experiments/results/README.md: the verdict on every claim, from the results of all suites."""

import math
import pathlib
import textwrap

from experiments import results, suites, tables, verdict
from experiments.results import Results
from moejax.config import check

FOLDER = pathlib.Path('experiments') / 'results'
FILE, NOTES = 'README.md', 'NOTES.md'   # NOTES.md is written by hand and taken in as it is


def find(folder: pathlib.Path) -> dict[pathlib.Path, Results]:
  """{directory: its results} of every results.jsonl one level below folder.

  In the order of suites.ORDER; the others after them, by name. Raises ConfigError if there is none.
  """
  place = lambda path: (*(name != path.name for name in suites.ORDER), path.name)
  directories = sorted((path.parent for path in folder.glob(f'*/{results.FILE}')), key=place)
  check(bool(directories), '--results', str(folder), f'a folder of folders with {results.FILE}',
        'Train a suite first: python -m experiments.main --suite=NAME --results='
        f'{folder}/NAME')
  return {directory: results.read(directory) for directory in directories}


def to_markdown(suites: dict[str, Results], notes: str = '') -> str:
  """The page.

  Args:
    suites: {name of the folder beside the page: its results}.
    notes: what stands under 'Where we disagree, and why'.
  """
  decided = {name: verdict.of(found) for name, found in suites.items()}
  out = ['# Results', '',
         'Made by `python -m experiments.report` from the `results.jsonl` of each suite.', '',
         *_verdicts(suites, decided), '', *_facts(list(suites.values())), '']
  if any(v.held_out for verdicts in decided.values() for v in verdicts):
    out += [*textwrap.wrap(tables.HELD_OUT_LEGEND, 100, break_on_hyphens=False), '']
  for name, found in suites.items():
    out += [*_section(name, found, decided[name]), '']
  if notes:
    out += ['## Where we disagree, and why', '', notes.strip(), '']
  out += ['## How a verdict comes about', '', *_rule(sum(map(bool, decided.values())))]
  return '\n'.join(out) + '\n'


def _verdicts(suites: dict[str, Results],
              decided: dict[str, list[verdict.Verdict]]) -> list[str]:
  """Number of claims with each outcome, per suite and in all."""
  def counts(verdicts: list[verdict.Verdict]) -> list[str]:
    return [str(len(verdicts)),
            *(str(sum(v.outcome == outcome for v in verdicts)) for outcome in verdict.OUTCOMES)]

  cells = []
  for name, found in suites.items():
    title = _title(found)
    anchor = title.replace(',', '').replace(' ', '-')   # as GitHub makes it of the heading
    cells.append([f'[{title}](#{anchor})', _pairs(found), *counts(decided[name])])
  every = [v for verdicts in decided.values() for v in verdicts]
  return tables.table(['suite', 'pairs', 'claims', *verdict.OUTCOMES],
                      [*cells, [f'{len(suites)} suites', '', *counts(every)]])


def _pairs(found: Results) -> str:
  """How many pairs are trained: '5', or '2 of 5' as long as some are not."""
  have = len({row['pair'] for row in found.rows})
  wanted = found.suite.get('pairs', have)
  return f'{have}' if have >= wanted else f'{have} of {wanted}'


def _title(found: Results) -> str:
  return f'{found.suite["suite"]}, scale {found.suite["scale"]}'


def _facts(suites: list[Results]) -> list[str]:
  """What was spent, on which data and with which versions."""
  rows = [row for found in suites for row in found.rows]
  # A run that suites share was trained once; one that was trained again has another time.
  runs = {(run['key'], run['seconds']): run for found in suites for run in found.suite['runs']}
  spent: dict[str, list[float]] = {}
  for run in runs.values():
    spent.setdefault(run['devices'], []).append(run['seconds'])
  data: dict[str, set[str]] = {}
  for row in rows:
    data.setdefault(row['config']['data']['source'], set()).add(row['fingerprint'][:16])
  cpu = [run['cpu_seconds'] for run in runs.values() if run.get('cpu_seconds')]
  return [
      *([f'- CPU time of the processes of {len(cpu)} of the {len(runs)} runs (the others did not '
         'record it), compilation, evaluation and data included, start-up not: '
         f'{math.fsum(cpu) / 3600:.2f} core-hours'] if cpu else []),
      *(f'- Train steps of {len(seconds)} runs on {devices} each, without compilation and '
        f'evaluation: {math.fsum(seconds) / 3600:.2f} hours by the clock, in which other work ran '
        'too' for devices, seconds in sorted(spent.items())),
      *(f'- Data {source}: fingerprint {", ".join(sorted(prints))}'
        for source, prints in sorted(data.items())),
      f'- Versions: {tables.versions(rows)}']


def _section(name: str, found: Results, verdicts: list[verdict.Verdict]) -> list[str]:
  about = found.suite
  out = [f'## {_title(found)}', '', about['title'], '',
         f'`{about["suite_command"]}` · [table]({name}/{about["suite"]}.md) · '
         f'[CSV]({name}/{about["suite"]}.csv)', '']
  plot = ['', f'![{about["title"]}]({name}/{about["suite"]}.png)']
  if not verdicts:
    return [*out, 'It makes no claim.', *plot]
  rows = [([v.claim.domain, tables.says(v), v.claim.source, v.claim.paper], v) for v in verdicts]
  if ' of ' in _pairs(found):
    out += [f'{_pairs(found)} pairs are trained so far; verdicts wait for the others.', '']
  return [*out, *tables.verdict_table(['domain', 'claim', 'source', 'paper'], rows), *plot]


def _rule(suites: int) -> list[str]:
  """What experiments/verdict.py says, which was written before the runs."""
  return [*verdict.__doc__.split('\n\n', 1)[1].strip().splitlines(), '',
          f'Here {suites} suites make claims: expect a wrong verdict, by chance, in '
          f'{verdict.LEVEL * suites:.2g} of them at the most.']


def write(folder: pathlib.Path, suites: dict[pathlib.Path, Results]) -> str:
  """Writes README.md into folder; returns it."""
  notes = folder / NOTES
  markdown = to_markdown({directory.name: found for directory, found in suites.items()},
                         notes.read_text(encoding='utf-8') if notes.exists() else '')
  results.write_text(folder / FILE, markdown)
  return markdown
