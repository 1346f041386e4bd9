"""Surgeries that are measured and never trained: what is left of the parent at step 0.

  python -m experiments.step0 --parent=WORKDIR --cells=FILE --workdir=DIR

All cells of one parent are measured in one process, since what costs time (reading data, compiling)
they mostly have in common. Each becomes a line of DIR/measured.jsonl as soon as it is known; a line
that is there is not measured again.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
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
from moejax import main as main_lib
from moejax.config import ConfigError, check, fail
from moejax.evaluation import evaluate
from moejax.train import config as run_config
from moejax.train import initialize, metrics, parallel, plan, validate, workdir

FILE = 'measured.jsonl'
IN_MEMORY = 2**30   # bytes of a split up to which its batches are made once
# Of a run's facts, what a line repeats: the name in run.json -> the name in results.jsonl.
FACTS = {'data_fingerprint': 'fingerprint', 'versions': 'versions', 'devices': 'devices',
         'parameters': 'parameters', 'parameters_active_per_token': 'parameters_active_per_token',
         'train_flops_per_step': 'flops_per_step'}


@dataclasses.dataclass(frozen=True)
class Surgery(Run):
  """A run of which only the first state is wanted: evaluated, never trained.

  It starts from its parent's checkpoint config.init.step. Settings of training mean nothing to it.
  Raises ConfigError without a parent, or with a new head, whose answers nobody taught.
  """

  def __post_init__(self):
    check(self.parent is not None, f'surgery {self.label!r}', None, 'a run with a parent',
          'There is nothing to operate on.')

  @functools.cached_property
  def key(self) -> str:
    """Unlike that of the run that trains from the same config."""
    return _digest(f'surgery {super().key}')[:KEY_LENGTH]

  @property
  def work(self) -> int:
    """One cell."""
    return 1

  @property
  def cost(self) -> float:
    """FLOPs of its evaluation, or of a batch of each split where that is whole splits."""
    config = self.settings
    examples = max(config.data.eval_examples, config.data.eval_batch_size)
    forward = self.step_flops / 3 / config.data.batch_size   # of an example
    return (1 + len(config.eval_splits)) * examples * config.data.eval_repeats * forward

  @property
  def spec(self) -> dict[str, Any]:
    """What the measuring process has to know of it, as JSON."""
    return {'key': self.key, 'settings': _digest(run_config.to_json(self.settings)),
            'config': self.config, 'changes': dict(self.changes), 'arg': self.arg}

  def measured(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """Its line among the measurements on its parent, see `line`; None if there is none yet."""
    return _lines(folder / Measure(self.parent, (self,)).name).get(_identity(self.spec))

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether it is measured."""
    return self.measured(folder) is not None

  def done(self, folder: pathlib.Path) -> int:
    """1 if it is measured."""
    return int(self.finished(folder))

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that measures it alone."""
    return Measure(self.parent, (self,)).words(folder, json.dumps([self.spec]))


@dataclasses.dataclass(frozen=True)
class Measure:
  """The job that measures surgeries on one parent, as experiments.scheduler takes it."""
  parent: Run
  cells: tuple[Surgery, ...]

  @property
  def label(self) -> str:
    return f'{len(self.cells)} surgeries on {self.parent.label}'

  @functools.cached_property
  def key(self) -> str:
    return _digest(' '.join([self.parent.key, *(cell.key for cell in self.cells)]))[:KEY_LENGTH]

  @property
  def name(self) -> str:
    """Of its workdir, which is that of all surgeries on this parent, whatever suite asks."""
    return f'surgeries-{self.parent.name}'

  @property
  def work(self) -> int:
    """Units of progress: cells."""
    return len(self.cells)

  @property
  def cost(self) -> float:
    """FLOPs of all its cells."""
    return sum(cell.cost for cell in self.cells)

  def words(self, folder: pathlib.Path, cells: str) -> list[str]:
    """Words after `python` of the command for `cells`, a file or the JSON itself."""
    return ['-m', 'experiments.step0', f'--parent={folder / self.parent.name}',
            f'--cells={cells}', f'--workdir={folder / self.name}']

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python`; writes the file that names the cells, whose name says what is in it."""
    directory, file = folder / self.name, f'cells-{self.key}.json'
    with _writing(directory):
      text = json.dumps([cell.spec for cell in self.cells], indent=1) + '\n'
      workdir.Workdir(directory).write(file, text)
    return self.words(folder, str(directory / file))

  def done(self, folder: pathlib.Path) -> int:
    """Cells that are measured."""
    there = _lines(folder / self.name)
    return sum(_identity(cell.spec) in there for cell in self.cells)

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether all its cells are measured."""
    return self.done(folder) == self.work


def jobs(runs: Iterable[Run]) -> list[Run | Measure]:
  """Runs as the runner takes them: surgeries become one Measure per parent, after all runs."""
  runs = list(runs)
  cells: dict[str, list[Surgery]] = {}
  for run in runs:
    if isinstance(run, Surgery):
      cells.setdefault(run.parent.key, []).append(run)
  return [*(run for run in runs if not isinstance(run, Surgery)),
          *(Measure(group[0].parent, tuple(group)) for group in cells.values())]


def collect(cell: Surgery, folder: pathlib.Path) -> dict[str, Any]:
  """What results.jsonl says of a measured cell. Raises ConfigError if it is not measured.

  The keys are those of a trained run; its history is the one evaluation there was.
  """
  found = cell.measured(folder)
  if found is None:
    fail('--runs', str(folder), f'a folder where {cell.label!r} is measured', 'Run the suite.')
  step, final = found['step'], found['final']
  return {**{name: found[name] for name in FACTS.values()},
          'start_step': step, 'end_step': step, 'seconds': 0.0, 'step0': found['step0'],
          'history': [{'step': step, **{name: final['validation'][name]
                                        for name in ('loss', 'accuracy')}}],
          'final': final}


def measure(parent: str, cells: list[dict[str, Any]], directory: pathlib.Path) -> None:
  """Measures the cells that are not measured yet, under a progress bar.

  Args:
    parent: workdir of the parent.
    cells: `Surgery.spec` of each.
    directory: of FILE; made if missing.

  Raises:
    ConfigError: a cell that cannot work; those before it are measured and stay.
  """
  with _writing(directory):
    file = metrics.JsonLines(directory / FILE, math.inf)   # drops half a line that a kill has left
  there = _lines(directory)
  ahead = [cell for cell in cells if _identity(cell) not in there]
  with tqdm(total=len(cells), initial=len(cells) - len(ahead), unit='cell', dynamic_ncols=True,
            disable=not sys.stderr.isatty()) as bar:
    for cell in ahead:
      config = Run('', cell['config'], cell['changes'], arg=cell['arg']).resolved(parent)
      found = line(config)
      file.write(found.pop('step'), key=cell['key'], settings=cell['settings'], **found)
      bar.update()
  file.close()


def line(config: run_config.RunConfig) -> dict[str, Any]:
  """The first state of a run, evaluated beside its parent.

  Returns:
    'step': the parent's; 'step0': as in a receipt, with the gap of other splits as SPLIT_gap;
    'final': {split: metrics}, telemetry of the MoE layers included, for 'validation' and
    config.eval_splits; 'parent': the same of the parent; and FACTS.
  """
  init = config.init
  check(init.mode != 'scratch' and not init.new_head, 'config.init', (init.mode, init.new_head),
        'a mode with a parent whose head is kept', 'Otherwise there is no gap to measure.')
  opened = _open(init.parent, init.step)
  step, splits = opened.reader.step, ('validation', *config.eval_splits)
  program, dataset = _program(config.model, config.parallel, config.mesh), _dataset(config.data)
  validate.check_fit(config, dataset, program.model, program.devices)
  params = initialize.first_params(config, program.model, program.devices, opened)
  final = program.evaluate(params, config.data, splits)
  before = _parent(init.parent, step, run_config.model_of(opened.config, config), config.data,
                   config.parallel, config.mesh, splits)
  gaps = {split: final[split]['loss'] - before[split]['loss'] for split in splits}
  lost = {k: v for k, v in final['validation'].items() if k.endswith(('/dropped', '/unchosen'))}
  facts = workdir.provenance(
      **plan.facts(config, plan.Plan.make(config, step), program.model, dataset))
  return {
      'step': step,
      'step0': {'parent_loss': before['validation']['loss'], 'loss': final['validation']['loss'],
                'step0_gap': gaps.pop('validation'), **lost,
                **{f'{split}_gap': gap for split, gap in gaps.items()}},
      'final': final, 'parent': before,
      **{name: facts[fact] for fact, name in FACTS.items()}}


@functools.cache
def _open(path: str, step: int) -> initialize.Parent:
  return initialize.open_run(path, 'config.init.parent', step)


@functools.cache
def _parent(path: str, step: int, model: models.Config, data_config: data.DataConfig,
            mode: str, mesh, splits: tuple[str, ...]) -> dict[str, dict[str, float]]:
  """{split: metrics} of the parent itself, as `model`, on a cell's data and devices."""
  program = _program(model, mode, mesh)
  opened = _open(path, step)
  params = initialize.parent_params(opened, program.model, program.devices)
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
  """Cells that differ in init alone share it."""
  model, devices = models.build(config), parallel.make(mode, mesh)
  return _Program(model, devices, devices.jit(
      evaluate.make_eval_step(model.apply, devices.reduce)))


@functools.cache
def _dataset(config: data.DataConfig) -> data.Dataset:
  """Of evaluation splits, which no seed moves."""
  return data.build(config, seed=0, host=jax.process_index(), hosts=jax.process_count())


def _batches(config: data.DataConfig, split: str) -> Iterable[data.pipeline.Batch]:
  """A split's batches, kept in memory if they are small."""
  dataset = _dataset(config)
  row = sum(value[0].nbytes for value in dataset.train_batch(0).values())
  small = row * dataset.examples[split] * config.eval_repeats <= IN_MEMORY
  return (_kept if small else _made)(config, split)


def _made(config: data.DataConfig, split: str) -> Iterator[data.pipeline.Batch]:
  return _dataset(config).eval_batches(split)


@functools.cache
def _kept(config: data.DataConfig, split: str) -> list[data.pipeline.Batch]:
  return list(_made(config, split))


@contextlib.contextmanager
def _writing(directory: pathlib.Path) -> Iterator[None]:
  """Makes a folder to write to. Raises ConfigError if that cannot be done."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    yield
  except OSError as error:
    fail('--workdir', str(directory), 'a folder that can be written',
         f'{type(error).__name__}: {error.strerror}. Choose another.')


def _lines(directory: pathlib.Path) -> dict[tuple[str, str], dict[str, Any]]:
  """{identity: line} of what is measured in a folder."""
  return {_identity(found): found for found in metrics.read_lines(directory / FILE)}


def _identity(cell: dict[str, Any]) -> tuple[str, str]:
  """Key and digest of every setting: a key alone leaves out what is at its default."""
  return cell['key'], cell['settings']


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _cells(text: str) -> list[dict[str, Any]]:
  """The cells of --cells: a file, or the JSON itself. Raises ConfigError."""
  try:
    return json.loads(text if text.startswith('[') else pathlib.Path(text).read_text())
  except (OSError, ValueError) as error:
    raise ConfigError(f'--cells: {error}. Give a file of cells as Surgery.spec, or the JSON '
                      'itself.') from error


def use_compilation_cache() -> None:
  """Keeps compiled programs where moejax.main does, unless the environment names another place."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir',
                      os.path.expanduser(main_lib.COMPILATION_CACHE.default))


def main(argv: list[str] | None = None) -> int:
  """Measures; returns the exit code. Raises ConfigError on what cannot work."""
  parser = argparse.ArgumentParser(prog='python -m experiments.step0', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--parent', required=True, metavar='DIR', help='workdir of the parent')
  parser.add_argument('--cells', required=True, metavar='FILE',
                      help='JSON list of key, settings, config, changes, arg; or that list itself')
  parser.add_argument('--workdir', required=True, metavar='DIR', type=pathlib.Path,
                      help=f'folder of {FILE}; made if missing')
  args = parser.parse_args(argv)
  logging.set_verbosity(logging.WARNING)   # libraries' notes on themselves
  use_compilation_cache()
  try:
    measure(args.parent, _cells(args.cells), args.workdir)
  except KeyboardInterrupt:   # whatever is measured is on disk
    return 130
  return 0


if __name__ == '__main__':
  cli.run(main)
