"""Makes experiments/results/README.md: the verdict on every claim, from all suites' results."""

import math
import pathlib
import textwrap

from experiments import results as results_lib
from experiments import suites as suites_lib
from experiments import tables, verdict
from experiments.results import Results
from experiments.verdict import Verdict
from moejax.config import check

FOLDER = pathlib.Path('experiments') / 'results'
FILE, NOTES = 'README.md', 'NOTES.md'   # NOTES.md is written by hand and copied into the page


def find(folder: pathlib.Path) -> dict[pathlib.Path, Results]:
  """{directory: its results} of every results.jsonl one level below folder.

  In the order of suites.ORDER, others after them by name. Raises ConfigError if there is none.
  """
  place = lambda path: (*(name != path.name for name in suites_lib.ORDER), path.name)
  directories = sorted((path.parent for path in folder.glob(f'*/{results_lib.FILE}')), key=place)
  check(bool(directories), '--results', str(folder),
        f'a folder of folders with {results_lib.FILE}',
        'Train a suite first: python -m experiments.main --suite=NAME --results='
        f'{folder}/NAME')
  return {directory: results_lib.read(directory) for directory in directories}


def to_markdown(suites: dict[str, Results], notes: str = '') -> str:
  """The page.

  Args:
    suites: {name of the folder beside the page: its results}.
    notes: text under 'Where we disagree, and why'.
  """
  verdicts = {name: verdict.decide_all(results) for name, results in suites.items()}
  out = ['# Results', '',
         'Made by `python -m experiments.report` from the `results.jsonl` of each suite.', '',
         *_summary(suites, verdicts), '', *_facts(list(suites.values())), '']
  if any(v.held_out for of_suite in verdicts.values() for v in of_suite):
    out += [*textwrap.wrap(tables.HELD_OUT_LEGEND, 100, break_on_hyphens=False), '']
  for name, results in suites.items():
    out += [*_section(name, results, verdicts[name]), '']
  if notes:
    out += ['## Where we disagree, and why', '', notes.strip(), '']
  out += ['## How a verdict comes about', '', *_rule(sum(map(bool, verdicts.values())))]
  return '\n'.join(out) + '\n'


def _summary(suites: dict[str, Results], verdicts: dict[str, list[Verdict]]) -> list[str]:
  """Table of the number of claims with each outcome, per suite and in all."""
  def counts(verdicts: list[Verdict]) -> list[str]:
    return [str(len(verdicts)),
            *(str(sum(v.outcome == outcome for v in verdicts)) for outcome in verdict.OUTCOMES)]

  rows = []
  for name, results in suites.items():
    title = _title(results)
    anchor = title.replace(',', '').replace(' ', '-')   # as GitHub makes it of the heading
    rows.append([f'[{title}](#{anchor})', _pairs(results), *counts(verdicts[name])])
  every = [v for of_suite in verdicts.values() for v in of_suite]
  return tables.table(['suite', 'pairs', 'claims', *verdict.OUTCOMES],
                      [*rows, [f'{len(suites)} suites', '', *counts(every)]])


def _pairs(results: Results) -> str:
  """How many pairs are trained: '5', or '2 of 5' as long as some are missing."""
  have = len({record['pair'] for record in results.records})
  planned = results.suite.get('pairs', have)
  return f'{have}' if have >= planned else f'{have} of {planned}'


def _title(results: Results) -> str:
  return f'{results.suite["suite"]}, scale {results.suite["scale"]}'


def _facts(suites: list[Results]) -> list[str]:
  """Time spent, data, and versions."""
  records = [record for results in suites for record in results.records]
  # A run that suites share was trained once; one that was trained again has another time.
  runs = {(run['key'], run['seconds']): run for results in suites for run in results.suite['runs']}
  spent: dict[str, list[float]] = {}
  for run in runs.values():
    spent.setdefault(run['devices'], []).append(run['seconds'])
  data: dict[str, set[str]] = {}
  for record in records:
    data.setdefault(record['config']['data']['source'], set()).add(record['fingerprint'][:16])
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
      f'- Versions: {tables.versions(records)}']


def _section(name: str, results: Results, verdicts: list[Verdict]) -> list[str]:
  about = results.suite
  out = [f'## {_title(results)}', '', about['title'], '',
         f'`{about["suite_command"]}` · [table]({name}/{about["suite"]}.md) · '
         f'[CSV]({name}/{about["suite"]}.csv)', '']
  plot = ['', f'![{about["title"]}]({name}/{about["suite"]}.png)']
  if not verdicts:
    return [*out, 'It makes no claim.', *plot]
  rows = [([v.claim.domain, tables.claim_text(v.claim), v.claim.source, v.claim.paper], v)
          for v in verdicts]
  if ' of ' in _pairs(results):
    out += [f'{_pairs(results)} pairs are trained so far; verdicts wait for the others.', '']
  return [*out, *tables.verdict_table(['domain', 'claim', 'source', 'paper'], rows), *plot]


def _rule(suites: int) -> list[str]:
  """The rule of experiments/verdict.py, which was written before the runs."""
  return [*verdict.__doc__.split('\n\n', 1)[1].strip().splitlines(), '',
          f'Here {suites} suites make claims: expect a wrong verdict, by chance, in '
          f'{verdict.LEVEL * suites:.2g} of them at the most.']


def write(folder: pathlib.Path, suites: dict[pathlib.Path, Results]) -> str:
  """Writes README.md into folder; returns it."""
  notes = folder / NOTES
  markdown = to_markdown({directory.name: results for directory, results in suites.items()},
                         notes.read_text(encoding='utf-8') if notes.exists() else '')
  results_lib.write_text(folder / FILE, markdown)
  return markdown
