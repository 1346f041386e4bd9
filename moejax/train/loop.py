"""The train loop: run(config, workdir) trains, evaluates, checkpoints, logs, and resumes.

Steps are global: a run that continues a parent starts at the parent's step. At every step that is
due, in this order: log the window of train metrics, evaluate, checkpoint. All lines up to a step
are thus on disk before its checkpoint; resuming there cuts off exactly what will be written again.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax import models
from moejax.checkpoints import orbax
from moejax.cluster.processes import Hosts
from moejax.config import ConfigError
from moejax.evaluation import evaluate, few_shot, text_scores
from moejax.train import config as run_config
from moejax.train import initialize, malloc, memory, metrics, validate
from moejax.train.compiled import Layout, Programs
from moejax.train.parallel import all_examples
from moejax.train.plan import facts
from moejax.train.router_health import Watch, check_finite
from moejax.train.run_log import Log, stop_signals
from moejax.train.step import TrainState, join_batches
from moejax.train.validate import ValidatedRun
from moejax.train.workdir import Workdir, provenance

SHARED = 'Give a folder that all hosts see: NFS, Lustre, or a mounted bucket.'


def run(config: run_config.RunConfig, path: str, hosts: Hosts | None = None) -> int:
  """Trains a run to its end, from its first step or from its last checkpoint.

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
    saved = orbax.finished_steps(workdir.path / orbax.SUBDIR)
    hosts.same('workdir', f'{workdir.path.exists()} {workdir.whole} {saved}', SHARED)
    plan, parent = validate.start(config, workdir, saved)
    if plan.end in saved and workdir.whole:   # else a file that was lost is written anew
      if workdir.read('status.json').get('phase') != 'finished':   # killed before it wrote that
        workdir.status('finished', plan.end)
      if workdir.writes:
        print(f'{path}: finished at step {plan.end}. ' + metrics.last_evaluation(workdir.path))
      return 0
    trainer = Trainer(validate.validate(config, plan, parent))
    hosts.same('data', trainer.run.fingerprint, 'Install the same versions on all hosts.')
    hosts.moved('compiling')
    trainer.compile()
    with workdir.claimed(config):
      return train(trainer, workdir, hosts)


def train(trainer: 'Trainer', workdir: Workdir, hosts: Hosts) -> int:
  """Trains a run whose programs are compiled, in its claimed workdir; returns the exit code."""
  config, plan, path = trainer.config, trainer.plan, workdir.path
  hosts.same('workdir', str(workdir.seen()), SHARED)
  writer = orbax.Writer(path, config.keep_checkpoints, plan.kept)
  done = writer.latest_step()
  workdir.write('run.json', trainer.about())
  with Log(workdir, plan.first, done, plan.end, hosts.moved) as log, stop_signals() as received:
    log.say(f'memory per device: {trainer.memory}')
    for name in writer.aside:
      log.say(f'{name}: not a finished checkpoint, and so renamed: its save was cut short or files '
              'of it are missing')
    state = trainer.begin(workdir, log) if done is None else trainer.restore(writer, done, log)
    done, stop = int(state.step), None
    watch = Watch(config, plan.first)
    for batch in trainer.train_batches(done):
      state, marker = trainer.train_step(state, trainer.put(batch))
      done += trainer.programs.steps
      log.tick(done, marker)
      if plan.log_due(done):
        window = log.train(done, state.window)
        check_finite(window, done, writer.latest_step())
        for line in watch.lines(done, window):
          log.say(line)
        state = dataclasses.replace(state, window=jax.tree.map(jnp.zeros_like, state.window))
      if plan.eval_due(done):
        trainer.evaluate(done, state.params, log, window)
      stop = hosts.stop(received.signal)
      if plan.save_due(done) or stop:
        if not plan.log_due(done):   # where it is, this was checked above
          check_finite(metrics.summarize(jax.device_get(state.window)), done, writer.latest_step())
        with log.pause('saving', done):
          writer.save(done, trainer.saved(state))
      if stop:
        break
    with log.pause('saving', done):
      writer.close()
    outcome = 'finished' if done == plan.end else 'stopped'
    log.phase(outcome, done)
    log.say(f'{path}: {outcome} at step {done} of {plan.end}. ' + metrics.last_evaluation(path))
  return 0 if outcome == 'finished' else 128 + stop


class Trainer:
  """The parts of a run put together.

  Attributes:
    run: as given; `config`, `plan`, `devices`, `dataset` are its own.
    programs: what it computes.
    memory: the Forecast of what it takes, once compiled.
  """

  def __init__(self, run: ValidatedRun):
    self.run, self.programs = run, Programs(run)
    self.config, self.plan, self.devices, self.dataset = (
        run.config, run.plan, run.devices, run.dataset)
    self.train_step = self.programs.train

  def compile(self) -> None:
    """Compiles the train step and forecasts memory; then reads the teacher, if there is one.

    Raises:
      ConfigError: the devices have less memory; nothing is allocated there.
    """
    if sys.stderr.isatty() and jax.process_index() == 0:
      print('compiling the train step', file=sys.stderr)
    self.memory = memory.check(self.programs, memory.free(self.devices))
    malloc.free_large(self.memory.needed, self.memory.available)
    if self.programs.teacher:
      self.programs.teacher.restore()

  def about(self) -> dict:
    """Returns the content of run.json, once compiled."""
    run = self.run
    return provenance(**facts(run.config, run.plan, run.model, run.dataset, run.probe_data),
                      memory=self.memory.as_dict())

  def train_batches(self, start: int) -> Iterator[dict]:
    """Yields what train_step takes from step `start` on, still on the host."""
    batches = self.dataset.train_batches(start, self.plan.end)
    while together := list(itertools.islice(batches, self.programs.steps)):
      yield join_batches(together, self.programs.examples_per_device)

  def put(self, batch: dict) -> dict:
    """Puts a batch on the devices, with the teacher's logits if there is a teacher."""
    batch, teacher = self.devices.put(batch), self.programs.teacher
    return teacher(batch) if teacher else batch

  def begin(self, workdir: Workdir, log: Log) -> TrainState:
    """Makes and evaluates the first state; after surgery writes the receipt, with the step-0 gap.
    """
    with log.pause('initializing', self.plan.first):
      state, receipt = self.programs.first_state()
    if self.config.init.mode == 'continue' and (
        changes := run_config.moe_changes(self.config, self.run.parent.config)):
      log.say(f"moe settings other than the parent's: {', '.join(changes)}")
    values = self.evaluate(self.plan.first, state.params, log, {})
    if receipt:
      receipt = receipt.with_measured(**self._step0_gap(values, log))
      workdir.write('receipt.json', receipt.to_json())
      workdir.write('receipt.txt', receipt.to_text())
    return state

  def saved(self, state: TrainState) -> dict:
    """Returns what a checkpoint holds of a state: single blocks, whether or not it is scanned."""
    return state.relaid(self.programs.layout.unstack).as_dict()

  def restore(self, writer: orbax.Writer, step: int, log: Log) -> TrainState:
    """Returns the state of a finished checkpoint."""
    state = TrainState(**writer.restore(step, self.programs.single.as_dict()))
    log.say(f'{log.workdir.path}: resumed at step {step} of {self.plan.end}')
    return state.relaid(self.programs.layout.stack)

  def _step0_gap(self, child: dict, log: Log) -> dict:
    """Returns the parent's validation loss beside this run's first, and what routing dropped."""
    lost = {k: v for k, v in child.items() if k.endswith(('/dropped', '/unchosen'))}
    if self.config.init.new_head:   # the parent's head answers another question
      return {'loss': child['loss'], **lost}
    # Plain attention: the fused one may not take the parent's dtype.
    execution = dataclasses.replace(self.config.execution, attention='plain')
    parent = self.run.parent
    model = models.build(run_config.model_of(parent.config, self.config), execution)
    with log.pause('evaluating', self.plan.first):
      params = initialize.parent_params(parent, model, self.devices)
      params = Layout(model, self.devices).stack(params)
      step = self.devices.jit(evaluate.make_eval_step(model.apply, self.devices.reduce))
      batches = map(self.devices.put, self.dataset.eval_batches('validation'))
      loss = metrics.summarize(evaluate.total(step, params, batches))['loss']
    return {'parent_loss': loss, 'loss': child['loss'], 'step0_gap': child['loss'] - loss, **lost}

  def evaluate(self, step: int, params: dict, log: Log, window: dict) -> dict:
    """Evaluates, reports, and returns the values of 'validation'.

    At the last step also config.eval_splits, decoded outputs and the few-shot probe.

    Args:
      step: the global step.
      params: parameters as train_step takes them.
      log: of the run.
      window: train metrics of this step; their router gradient norms go with every evaluation.
    """
    last = step == self.plan.end
    results = {}
    with log.pause('evaluating', step):
      for split in ['validation', *(self.config.eval_splits if last else ())]:
        batches = map(self.devices.put, log.watched(self.dataset.eval_batches(split)))
        values = metrics.summarize(evaluate.total(self.programs.evaluate, params, batches))
        values |= {k: v for k, v in window.items() if k.endswith('/router_grad_norm')}
        if last and self.dataset.metric:
          values |= self._decoded(params, split, log.watched)
        log.report(step, split, values)
        results[split] = values
      if last and self.run.probe_data:
        try:
          log.report(step, 'probe', self._probed(params, log.watched))
        except ConfigError as error:   # the data do not suffice, but the run is worth keeping
          log.say(f'moejax: no probe: {error}')
    return results['validation']

  def _decoded(self, params: dict, split: str, watched: Callable) -> dict[str, float]:
    """Scores of the decoded outputs of a split.

    'commonest/SCORE' is that of always giving a task's commonest answer in training, to the same
    examples. watched: sees batches go by.
    """
    references, tasks = [], []
    def batches():
      for batch in watched(self.dataset.eval_batches(split)):
        known = all_examples(self.devices, {k: batch[k] for k in ('example', 'task', 'weight')})
        answers = zip(self.dataset.references(split, known), known['task'])
        kept = [(right, int(task)) for right, task in answers if right]
        references.extend(right for right, _ in kept)
        tasks.extend(task for _, task in kept)
        yield self.devices.put(batch)
    texts = evaluate.predictions(
        self.programs.decode, self.programs.layout.unstack(params), batches(),
        self.dataset.vocabulary, self.config.decode.examples)
    metric, names = self.dataset.metric, self.dataset.tasks
    answers = references[:len(texts)], tasks[:len(texts)]
    commonest = text_scores.baseline(metric, self._train_answers, answers, names)
    return {**text_scores.score(metric, texts, *answers, names),
            **{f'commonest/{name}': value for name, value in commonest.items()}}

  @functools.cached_property
  def _train_answers(self):
    return self.dataset.answers('train')

  def _probed(self, params: dict, watched: Callable) -> dict[str, float]:
    """Few-shot accuracy of the model's features. Raises ConfigError: see few_shot.run."""
    features = lambda params, batch: np.asarray(
        self.programs.features(params, self.devices.put(batch['own'])))
    def batches(split):
      for batch in watched(self.run.probe_data.eval_batches(split)):
        known = all_examples(self.devices, {k: batch[k] for k in ('label', 'weight')})
        yield {**known, 'own': batch}
    return few_shot.run(self.config.probe, features, params, batches('train'), batches('test'),
                        seed=self.config.seed)
