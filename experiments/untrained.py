"""Evaluates models right after surgery, without training: how close they are to their parent.

  python -m experiments.untrained --parent=WORKDIR --runs=FILE --workdir=DIR

One process evaluates all runs of one parent, because they share the most expensive work: reading
data and compiling. Each run becomes a line of DIR/measured.jsonl as soon as it is evaluated; a run
that has a line there is not evaluated again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from experiments import cli
from experiments.suite import KEY_LENGTH, Run
from moejax import data, models
from moejax.config import ConfigError, check, fail
from moejax.evaluation import evaluate
from moejax.train import config as run_config
from moejax.train import initialize, metrics, parallel, plan, validate, workdir

FILE = 'measured.jsonl'
IN_MEMORY = 2**30   # bytes of a split up to which its batches are kept in memory
# Facts that a line repeats: the name in run.json -> the name in results.jsonl.
FACTS = {'data_fingerprint': 'fingerprint', 'versions': 'versions', 'devices': 'devices',
         'parameters': 'parameters', 'parameters_active_per_token': 'parameters_active_per_token',
         'train_flops_per_step': 'flops_per_step'}


@dataclasses.dataclass(frozen=True)
class UntrainedRun(Run):
  """A run whose first state alone is evaluated; its settings of training are ignored.

  It starts from its parent's checkpoint config.init.step. Raises ConfigError without a parent.
  """

  def __post_init__(self):
    check(self.parent is not None, f'untrained run {self.label!r}', None, 'a run with a parent',
          'There is nothing to operate on.')

  @functools.cached_property
  def key(self) -> str:
    """Identifies it; differs from the key of the run that trains from the same config."""
    return _digest(f'surgery {super().key}')[:KEY_LENGTH]

  @property
  def cost(self) -> float:
    """FLOPs of its evaluation, or of one batch per split if splits are evaluated whole."""
    config = self.settings
    examples = max(config.data.eval_examples, config.data.eval_batch_size)
    forward = self.step_flops / 3 / config.data.batch_size   # of an example
    return (1 + len(config.eval_splits)) * examples * config.data.eval_repeats * forward

  @property
  def spec(self) -> dict[str, Any]:
    """What the evaluating process needs to know of it, as JSON."""
    return {'key': self.key, 'settings': _digest(run_config.to_json(self.settings)),
            'config': self.config, 'changes': dict(self.changes), 'arg': self.arg}

  def line(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """Its line of FILE (`evaluate_run`), with workdirs in `folder`; None if there is none yet."""
    return _read_lines(folder / EvaluationJob(self.parent, (self,)).name).get(_identity(self.spec))

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether it is evaluated."""
    return self.line(folder) is not None

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that evaluates it alone."""
    return EvaluationJob(self.parent, (self,)).words(folder, json.dumps([self.spec]))


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
  """The scheduler.Job that evaluates untrained runs of one parent."""
  parent: Run
  runs: tuple[UntrainedRun, ...]

  @property
  def label(self) -> str:
    return f'{len(self.runs)} surgeries on {self.parent.label}'

  @functools.cached_property
  def key(self) -> str:
    return _digest(' '.join([self.parent.key, *(run.key for run in self.runs)]))[:KEY_LENGTH]

  @property
  def name(self) -> str:
    """Of its workdir, which all suites share for this parent."""
    return f'surgeries-{self.parent.name}'

  @property
  def work(self) -> int:
    return len(self.runs)

  @property
  def cost(self) -> float:
    return sum(run.cost for run in self.runs)

  def words(self, folder: pathlib.Path, runs: str) -> list[str]:
    """Words after `python` of the command for `runs`: a file, or the JSON itself."""
    return ['-m', 'experiments.untrained', f'--parent={folder / self.parent.name}',
            f'--runs={runs}', f'--workdir={folder / self.name}']

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python`; writes the file that lists the runs, named by its content."""
    directory, file = folder / self.name, f'runs-{self.key}.json'
    with _writing(directory):
      text = json.dumps([run.spec for run in self.runs], indent=1) + '\n'
      workdir.Workdir(directory).write(file, text)
    return self.words(folder, str(directory / file))

  def done(self, folder: pathlib.Path) -> int:
    """Number of runs that are evaluated."""
    lines = _read_lines(folder / self.name)
    return sum(_identity(run.spec) in lines for run in self.runs)

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether all its runs are evaluated."""
    return self.done(folder) == self.work


def jobs(runs: Iterable[Run]) -> list[Run | EvaluationJob]:
  """The scheduler's jobs for runs: the trained ones, then one EvaluationJob per parent."""
  runs = list(runs)
  by_parent: dict[str, list[UntrainedRun]] = {}
  for run in runs:
    if isinstance(run, UntrainedRun):
      by_parent.setdefault(run.parent.key, []).append(run)
  return [*(run for run in runs if not isinstance(run, UntrainedRun)),
          *(EvaluationJob(group[0].parent, tuple(group)) for group in by_parent.values())]


def facts(run: UntrainedRun, folder: pathlib.Path) -> dict[str, Any]:
  """The part of an evaluated run's record in results.jsonl that its measurement gives.

  The keys are those of a trained run; its history is its one evaluation. Raises ConfigError if it
  is not evaluated.
  """
  line = run.line(folder)
  if line is None:
    fail('--runs', str(folder), f'a folder where {run.label!r} is measured', 'Run the suite.')
  step, final = line['step'], line['final']
  return {**{name: line[name] for name in FACTS.values()},
          'start_step': step, 'end_step': step, 'seconds': 0.0, 'step0': line['step0'],
          'history': [{'step': step, **{name: final['validation'][name]
                                        for name in ('loss', 'accuracy')}}],
          'final': final}


def evaluate_missing(parent: str, specs: list[dict[str, Any]], directory: pathlib.Path) -> None:
  """Evaluates the runs that have no line yet, under a progress bar.

  Args:
    parent: workdir of the parent.
    specs: `UntrainedRun.spec` of each run.
    directory: of FILE; made if missing.

  Raises:
    ConfigError: a run cannot be evaluated; the lines of those before it are kept.
  """
  with _writing(directory):
    file = metrics.JsonLines(directory / FILE, math.inf)   # drops half a line that a kill has left
  known = _read_lines(directory)
  missing = [spec for spec in specs if _identity(spec) not in known]
  with tqdm(total=len(specs), initial=len(specs) - len(missing), unit='run', dynamic_ncols=True,
            disable=not sys.stderr.isatty()) as bar:
    for spec in missing:
      config = Run('', spec['config'], spec['changes'], arg=spec['arg']).resolved(parent)
      line = evaluate_run(config)
      file.write(line.pop('step'), key=spec['key'], settings=spec['settings'], **line)
      bar.update()
  file.close()


def evaluate_run(config: run_config.RunConfig) -> dict[str, Any]:
  """Evaluates the first state of a run, and its parent beside it.

  Returns:
    'step': the parent's; 'step0': as in a receipt, with the gap of other splits as SPLIT_gap;
    'final': {split: metrics}, telemetry of the MoE layers included, for 'validation' and
    config.eval_splits; 'parent': {split: metrics} of the parent; and FACTS.

  Raises:
    ConfigError: there is no parent, or a new head, whose loss cannot be compared with the parent's;
      or the surgery cannot be done.
  """
  init = config.init
  check(init.mode != 'scratch' and not init.new_head, 'config.init', (init.mode, init.new_head),
        'a mode with a parent whose head is kept', 'Otherwise there is no gap to measure.')
  parent = _open(init.parent, init.step)
  step, splits = parent.reader.step, ('validation', *config.eval_splits)
  program, dataset = _program(config.model, config.parallel, config.mesh), _dataset(config.data)
  validate.check_fit(config, dataset, program.model, program.devices)
  params = initialize.first_params(config, program.model, program.devices, parent)
  final = program.evaluate(params, config.data, splits)
  before = _evaluate_parent(init.parent, step, run_config.model_of(parent.config, config),
                            config.data, config.parallel, config.mesh, splits)
  gaps = {split: final[split]['loss'] - before[split]['loss'] for split in splits}
  lost = {k: v for k, v in final['validation'].items() if k.endswith(('/dropped', '/unchosen'))}
  known = workdir.provenance(
      **plan.facts(config, plan.Plan.make(config, step), program.model, dataset))
  return {
      'step': step,
      'step0': {'parent_loss': before['validation']['loss'], 'loss': final['validation']['loss'],
                'step0_gap': gaps.pop('validation'), **lost,
                **{f'{split}_gap': gap for split, gap in gaps.items()}},
      'final': final, 'parent': before,
      **{name: known[fact] for fact, name in FACTS.items()}}


@functools.cache
def _open(path: str, step: int) -> initialize.Parent:
  return initialize.open_run(path, 'config.init.parent', step)


@functools.cache
def _evaluate_parent(path: str, step: int, model: models.Config, data_config: data.DataConfig,
                     mode: str, mesh, splits: tuple[str, ...]) -> dict[str, dict[str, float]]:
  """{split: metrics} of the parent itself, as `model`; these depend on the arguments alone."""
  program = _program(model, mode, mesh)
  params = initialize.parent_params(_open(path, step), program.model, program.devices)
  return program.evaluate(params, data_config, splits)


@dataclasses.dataclass(frozen=True)
class _Program:
  """A model, its devices and its compiled eval step."""
  model: models.Model
  devices: Any
  eval_step: Callable

  def evaluate(self, params: dict, config: data.DataConfig, splits: Iterable[str]
               ) -> dict[str, dict[str, float]]:
    """{split: metrics}."""
    total = lambda split: evaluate.total(
        self.eval_step, params, map(self.devices.put, _batches(config, split)))
    return {split: metrics.summarize(total(split)) for split in splits}


@functools.cache
def _program(config: models.Config, mode: str, mesh) -> _Program:
  """Runs that differ in config.init alone share it."""
  model, devices = models.build(config), parallel.make(mode, mesh)
  return _Program(model, devices, devices.jit(
      evaluate.make_eval_step(model.apply, devices.reduce)))


@functools.cache
def _dataset(config: data.DataConfig) -> data.Dataset:
  """The data of a run; evaluation splits do not depend on the seed."""
  return data.build(config, seed=0, host=jax.process_index(), hosts=jax.process_count())


def _batches(config: data.DataConfig, split: str) -> Iterable[data.pipeline.Batch]:
  """A split's batches, kept in memory if they are small."""
  dataset = _dataset(config)
  example = sum(value[0].nbytes for value in dataset.train_batch(0).values())
  if example * dataset.examples[split] * config.eval_repeats <= IN_MEMORY:
    return _kept_batches(config, split)
  return dataset.eval_batches(split)


@functools.cache
def _kept_batches(config: data.DataConfig, split: str) -> list[data.pipeline.Batch]:
  return list(_dataset(config).eval_batches(split))


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
  """Makes a folder to write to. Raises ConfigError if that cannot be done."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    fail('--workdir', str(directory), 'a folder that can be written',
         f'{type(error).__name__}: {error.strerror}. Choose another.')


def _read_lines(directory: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
  """{identity: line} of FILE in a folder."""
  return {_identity(line): line for line in metrics.read_lines(directory / FILE)}


def _identity(spec: dict[str, Any]) -> tuple[str, str]:
  """Key, and digest of every setting: the key alone leaves out settings at their defaults."""
  return spec['key'], spec['settings']


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _specs(text: str) -> list[dict[str, Any]]:
  """The specs that --runs gives: a file, or the JSON itself. Raises ConfigError."""
  try:
    return json.loads(text if text.startswith('[') else pathlib.Path(text).read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f'--runs: {error}. Give a file with a list of UntrainedRun.spec, or the '
                      'JSON itself.') from error


def main(argv: list[str] | None = None) -> int:
  """Evaluates; returns the exit code. Raises ConfigError on what cannot work."""
  parser = cli.Parser('python -m experiments.untrained', __doc__)
  parser.add_argument('--parent', required=True, metavar='DIR', help='workdir of the parent')
  parser.add_argument('--runs', required=True, metavar='FILE',
                      help='JSON list of key, settings, config, changes, arg; or that list itself')
  parser.add_argument('--workdir', required=True, metavar='DIR', type=pathlib.Path,
                      help=f'folder of {FILE}; made if missing')
  args = parser.parse(argv)
  logging.set_verbosity(logging.WARNING)   # libraries' notes on themselves
  cli.use_compilation_cache()
  try:
    evaluate_missing(args.parent, _specs(args.runs), args.workdir)
  except KeyboardInterrupt:   # every line so far is on disk
    return 130
  return 0


if __name__ == '__main__':
  cli.start(main)
