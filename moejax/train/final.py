"""What is measured once, at the end of a run: decoded outputs and a few-shot probe."""

import functools
from collections.abc import Callable

import numpy as np

from moejax.evaluation import evaluate, few_shot, text_scores
from moejax.train.compiled import Step
from moejax.train.parallel import all_rows


class Final:
  """Both, compiled when first needed.

  Args:
    step: the run's.
    dataset: the run's data.Dataset; its `metric` says whether outputs are scored.
    probe_data: data.Dataset of config.probe.source, or None for no probe.
  """

  def __init__(self, step: Step, dataset, probe_data):
    self.step, self.devices = step, step.devices
    self.dataset, self.probe_data = dataset, probe_data

  def decoded(self, params: dict, split: str, watched: Callable = iter) -> dict[str, float]:
    """Scores of what the model writes for a split; {} for data that is not scored so.

    'commonest/SCORE' is that of always giving a task's commonest answer in training, to the same
    examples. params: stacked as the train step takes them; watched: sees batches go by.
    """
    if not self.dataset.metric:
      return {}
    references, tasks = [], []
    def batches():
      for batch in watched(self.dataset.eval_batches(split)):
        known = all_rows(self.devices, {k: batch[k] for k in ('example', 'task', 'weight')})
        rows = zip(self.dataset.references(split, known), known['task'])
        kept = [(answers, int(task)) for answers, task in rows if answers]
        references.extend(answers for answers, _ in kept)
        tasks.extend(task for _, task in kept)
        yield self.devices.put(batch)
    texts = evaluate.predictions(self.step.decode, self.step.layout.unstack(params), batches(),
                                 self.dataset.vocabulary, self.step.config.decode.examples)
    metric, names = self.dataset.metric, self.dataset.tasks
    answers = references[:len(texts)], tasks[:len(texts)]
    commonest = text_scores.baseline(metric, self._trained_on, answers, names)
    return {**text_scores.score(metric, texts, *answers, names),
            **{f'commonest/{name}': value for name, value in commonest.items()}}

  @functools.cached_property
  def _trained_on(self):
    return self.dataset.answers('train')

  def probed(self, params: dict, watched: Callable = iter) -> dict[str, float]:
    """Few-shot accuracy of the model's features; {} without a probe. Raises ConfigError: see
    probe.run."""
    if self.probe_data is None:
      return {}
    step = self.devices.compile(
        lambda params, batch: self.devices.gather(self.step.model.features(params, batch)))
    features = lambda params, batch: np.asarray(step(params, self.devices.put(batch['own'])))
    def batches(split):
      for batch in watched(self.probe_data.eval_batches(split)):
        known = all_rows(self.devices, {k: batch[k] for k in ('label', 'weight')})
        yield {**known, 'own': batch}
    return few_shot.run(self.step.config.probe, features, params, batches('train'), batches('test'),
                     seed=self.step.config.seed)
