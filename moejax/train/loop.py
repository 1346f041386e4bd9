"""The train loop: run(config, workdir) trains, evaluates, checkpoints, logs, and resumes.

Steps are global: a run that continues a parent starts at the parent's step. At every step that is
due, in this order: log the window of train metrics, evaluate, checkpoint. All lines up to a step
are thus on disk before its checkpoint; resuming there cuts off exactly what will be written again.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from moejax import data, models
from moejax.checkpoints import orbax
from moejax.cluster.processes import Hosts
from moejax.config import ConfigError
from moejax.evaluation import evaluate
from moejax.train import (
  config as run_config,
)
from moejax.train import (
  initialize,
  malloc,
  metrics,
  parallel,
)
from moejax.train import (
  memory as forecast,
)
from moejax.train.compiled import Step, of_size
from moejax.train.final import Final
from moejax.train.layout import Layout
from moejax.train.plan import Plan, check_fit, check_probe, facts, first_step
from moejax.train.router_health import Watch, check_finite
from moejax.train.run_log import Log, stop_signals
from moejax.train.step import TrainState, join
from moejax.train.workdir import Workdir, provenance

SHARED = 'Give a folder that all hosts see: NFS, Lustre, or a mounted bucket.'


def run(config: run_config.RunConfig, path: str, hosts: Hosts | None = None) -> int:
  """Trains to the end, or resumes and does.

  Args:
    config: the resolved run.
    path: its workdir, a folder that all hosts see.
    hosts: the processes that train together; None: this one alone.

  Returns:
    Exit code: 0, or 130 or 143 if stopped by a signal, after saving.

  Raises:
    ConfigError: whatever cannot work, before a step is taken.
  """
  hosts = hosts or Hosts()
  with hosts.leaving():
    workdir = Workdir(path)
    workdir.check(config)
    hosts.same('config', run_config.to_json(config), 'Start the same command on all hosts.')
    finished = orbax.finished_steps(workdir.path / orbax.SUBDIR)
    hosts.same('workdir', f'{workdir.path.exists()} {workdir.whole} {finished}', SHARED)
    plan = Plan.make(config, first_step(config, workdir.path), max(finished, default=0))
    if plan.end not in finished or not workdir.whole:   # a file that was lost is written anew
      return _train(config, plan, workdir, hosts)
    if workdir.read('status.json').get('phase') != 'finished':   # killed before it could say so
      workdir.status('finished', plan.end)
    if workdir.writes:
      print(f'{path}: finished at step {plan.end}. ' + metrics.last_evaluation(workdir.path))
    return 0


def _train(config: run_config.RunConfig, plan: Plan, workdir: Workdir, hosts: Hosts) -> int:
  """A run that is not finished; the exit code."""
  path = workdir.path
  program = Program(config, plan)
  hosts.same('data', program.fingerprint, 'Install the same versions on all hosts.')
  if not (path / 'run.json').exists():
    program.check_parent()
  hosts.moved('compiling')
  program.compile()
  workdir.claim(config)
  hosts.same('workdir', str(workdir.seen()), SHARED)
  writer = orbax.Writer(path, config.keep_checkpoints, plan.kept)
  done = writer.latest_step()
  workdir.write('run.json', program.about())
  with Log(workdir, plan.first, done, plan.end, hosts.moved) as log, stop_signals() as told:
    log.say(f'memory per device: {program.memory}')
    for name in writer.aside:
      log.say(f'{name}: not a finished checkpoint, and so renamed: its save was cut short or files '
              'of it are missing')
    state = program.begin(workdir, log) if done is None else program.restore(writer, done, log)
    done, stop = int(state.step), None
    watch = Watch(config, plan.first)
    for batch in program.train_batches(done):
      state, marker = program.train_step(state, program.put(batch))
      done += program.step.steps
      log.tick(done, marker)
      if plan.log_due(done):
        window = log.train(done, state.window)
        check_finite(window, done, writer.latest_step())
        for line in watch.lines(done, window):
          log.say(line)
        state = dataclasses.replace(state, window=jax.tree.map(jnp.zeros_like, state.window))
      if plan.eval_due(done):
        program.evaluate(done, state.params, log, window)
      stop = hosts.stop(told.signal)
      if plan.save_due(done) or stop:
        if not plan.log_due(done):   # where it is, this was asked above
          check_finite(metrics.summarize(jax.device_get(state.window)), done, writer.latest_step())
        with log.pause('saving', done):
          writer.save(done, program.saved(state), {})
      if stop:
        break
    with log.pause('saving', done):
      writer.close()
    outcome = 'finished' if done == plan.end else 'stopped'
    log.phase(outcome, done)
    log.say(f'{path}: {outcome} at step {done} of {plan.end}. ' + metrics.last_evaluation(path))
  return 0 if outcome == 'finished' else 128 + stop


class Program:
  """The parts of a run put together: data, model, devices, and the compiled steps."""

  def __init__(self, config: run_config.RunConfig, plan: Plan):
    self.config, self.plan = config, plan
    self.devices = parallel.make(config.parallel, config.mesh)
    self.dataset = self._data(config.data)
    self.model = models.build(config.model, config.execution)
    rows = check_fit(config, self.dataset, self.model, self.devices.shards)
    self.probe_data = self._of_probe() if config.probe.source else None
    batch = of_size(self.dataset.train_batch(0), config.data.batch_size)
    self.step = Step(config, plan, self.model, self.devices, rows, batch,
                     decodes=bool(self.dataset.metric))
    self.final = Final(self.step, self.dataset, self.probe_data)
    self.layout, self.shapes, self.single = self.step.layout, self.step.shapes, self.step.single

  @property
  def fingerprint(self) -> str:
    """Of all data that the run reads."""
    return ' '.join(d.fingerprint for d in (self.dataset, self.probe_data) if d)

  def check_parent(self) -> None:
    """Raises ConfigError: the surgery that begins this run cannot be done."""
    if parent := initialize.open_parent(self.config.init):
      initialize.check_surgery(self.config, self.single, parent)

  def compile(self) -> None:
    """Makes train_step, (state, batch) -> (state, objective), and `memory`, the Forecast of what it
    takes, before anything of it is allocated; then reads the teacher, if there is one.

    Raises:
      ConfigError: the devices have less.
    """
    if sys.stderr.isatty() and jax.process_index() == 0:
      print('compiling the train step', file=sys.stderr)
    self.train_step, self.memory = forecast.compile_step(self.step, forecast.free(self.devices))
    malloc.free_large(self.memory.needed, self.memory.available)
    if self.step.teacher:
      self.step.teacher.restore()

  def about(self) -> dict:
    """Content of run.json, once compiled."""
    return provenance(**facts(self.config, self.plan, self.model, self.dataset, self.probe_data),
                      memory=self.memory.as_dict())

  def _data(self, config: data.DataConfig) -> data.Dataset:
    return data.build(config, seed=self.config.seed, host=self.devices.host,
                      hosts=self.devices.hosts)

  def _of_probe(self) -> data.Dataset:
    """The probe's data. Raises ConfigError: nothing that the model can take."""
    config, probe = self.config, self.config.probe
    image = dataclasses.replace(config.data.image, classes=0, augment='none',
                                skip_classes=probe.skip_classes)
    try:
      found = self._data(dataclasses.replace(config.data, source=probe.source, image=image,
                                             eval_examples=0, eval_repeats=1))
    except ConfigError as error:
      raise ConfigError(f'config.probe.source={probe.source}: {error}') from error
    check_probe(config, found)
    return found

  def train_batches(self, start: int) -> Iterator[dict]:
    """What train_step takes from step `start` on, still on the host."""
    batches = self.dataset.train_batches(start, self.plan.end)
    while together := list(itertools.islice(batches, self.step.steps)):
      yield join(together, self.step.shard)

  def put(self, batch: dict) -> dict:
    """What train_step takes, on its devices, with what the teacher says to it."""
    batch = self.devices.put(batch)
    return self.step.teacher(batch) if self.step.teacher else batch

  def begin(self, workdir: Workdir, log: Log) -> TrainState:
    """The first state, evaluated; after surgery the receipt is written, with the step-0 gap."""
    with log.pause('initializing', self.plan.first):
      parent = initialize.open_parent(self.config.init)
      state, receipt = self.step.first_state(parent)
    if self.config.init.mode == 'continue' and (
        changes := run_config.moe_changes(self.config, parent.config)):
      log.say(f"moe settings other than the parent's: {', '.join(changes)}")
    values = self.evaluate(self.plan.first, state.params, log, {})
    if receipt:
      measured = self._step0_gap(parent, values, log)
      receipt = receipt.with_measured(**measured)
      workdir.write('receipt.json', receipt.to_json())
      workdir.write('receipt.txt', receipt.to_text())
    return state

  def saved(self, state: TrainState) -> dict:
    """What a checkpoint holds of a state: single blocks, whether or not they are scanned."""
    return self.devices.everywhere(Step.relaid(state, self.layout.unstack).as_dict())

  def restore(self, writer: orbax.Writer, step: int, log: Log) -> TrainState:
    """The state of a finished checkpoint."""
    state = TrainState(**writer.restore(step, self.single.as_dict()))
    log.say(f'{log.workdir.path}: resumed at step {step} of {self.plan.end}')
    return Step.relaid(state, self.layout.stack)

  def _step0_gap(self, parent: initialize.Parent, child: dict, log: Log) -> dict:
    """The parent's validation loss beside this run's at its first step, and what routing lost."""
    lost = {k: v for k, v in child.items() if k.endswith(('/dropped', '/unchosen'))}
    if self.config.init.new_head:   # the parent's answers are to other questions
      return {'loss': child['loss'], **lost}
    # Plain attention: the fused one may not take the parent's dtype.
    execution = dataclasses.replace(self.config.execution, attention='plain')
    model = models.build(run_config.model_of(parent.config, self.config), execution)
    with log.pause('evaluating', self.plan.first):
      params = initialize.parent_params(parent, model, self.devices)
      params = Layout(model, self.devices).stack(params)
      batches = map(self.devices.put, self.dataset.eval_batches('validation'))
      step = self.devices.compile(evaluate.make_eval_step(model.apply, self.devices.reduce))
      sums = evaluate.total(step, params, batches)
    loss = metrics.summarize(sums)['loss']
    return {'parent_loss': loss, 'loss': child['loss'], 'step0_gap': child['loss'] - loss, **lost}

  def evaluate(self, step: int, params: dict, log: Log, window: dict) -> dict:
    """Evaluates on 'validation'; its values. At the last step also on config.eval_splits, and what
    is measured once.

    window: train metrics of this step; their router gradient norms go with every evaluation.
    """
    last = step == self.plan.end
    splits = ['validation', *(self.config.eval_splits if last else ())]
    results = {}
    with log.pause('evaluating', step):
      for split in splits:
        batches = map(self.devices.put, log.watched(self.dataset.eval_batches(split)))
        values = metrics.summarize(evaluate.total(self.step.evaluate, params, batches))
        values |= {k: v for k, v in window.items() if k.endswith('/router_grad_norm')}
        if last and self.dataset.metric:
          values |= self.final.decoded(params, split, log.watched)
        log.report(step, split, values)
        results[split] = values
      if last:
        self._probe(step, params, log)
    return results['validation']

  def _probe(self, step: int, params: dict, log: Log) -> None:
    """Reports the probe; if its data do not suffice, a line, as the run is worth keeping."""
    try:
      if probed := self.final.probed(params, log.watched):
        log.report(step, 'probe', probed)
    except ConfigError as error:
      log.say(f'moejax: no probe: {error}')
