"""What is measured once, at the end of a run: decoded outputs and a few-shot probe."""

import functools

import numpy as np

from moejax import evaluate, probe, scores
from moejax.train import settings
from moejax.train.parallel import all_rows


class Final:
  """The compiled functions of both, made when first needed.

  Args:
    config: RunConfig.
    model: models.Model.
    devices: of train.parallel.
    dataset: the run's data.Dataset; its `metric` says whether outputs are scored.
    probe_data: data.Dataset of config.probe.source, or None for no probe.
  """

  def __init__(self, config: settings.RunConfig, model, devices, dataset, probe_data):
    self.config, self.model, self.devices = config, model, devices
    self.dataset, self.probe_data = dataset, probe_data
    self._decode_step = None

  def decoded(self, params: dict, split: str) -> dict[str, float]:
    """Scores of what the model writes for a split; {} for data that is not scored so.

    'commonest/SCORE' is that of always giving a task's commonest answer in training, to the same
    examples.
    """
    if not self.dataset.metric:
      return {}
    if self._decode_step is None:
      self._decode_step = self.devices.compile(
          evaluate.make_decode_step(self.model, self.config.decode, self.devices.gather))
    references, tasks = [], []
    def batches():
      for batch in self.dataset.eval_batches(split):
        known = all_rows(self.devices, {k: batch[k] for k in ('example', 'task', 'weight')})
        rows = zip(self.dataset.references(split, known), known['task'])
        kept = [(answers, int(task)) for answers, task in rows if answers]
        references.extend(answers for answers, _ in kept)
        tasks.extend(task for _, task in kept)
        yield self.devices.put(batch)
    texts = evaluate.predictions(self._decode_step, params, batches(), self.dataset.vocabulary,
                                 self.config.decode.examples)
    metric, names = self.dataset.metric, self.dataset.tasks
    answers = references[:len(texts)], tasks[:len(texts)]
    commonest = scores.baseline(metric, self._trained_on, answers, names)
    return {**scores.score(metric, texts, *answers, names),
            **{f'commonest/{name}': value for name, value in commonest.items()}}

  @functools.cached_property
  def _trained_on(self):
    return self.dataset.answers('train')

  def probed(self, params: dict) -> dict[str, float]:
    """Few-shot accuracy of the model's features; {} without a probe."""
    if self.probe_data is None:
      return {}
    step = self.devices.compile(
        lambda params, batch: self.devices.gather(self.model.features(params, batch)))
    features = lambda params, batch: np.asarray(step(params, self.devices.put(batch['own'])))
    def batches(split):
      for batch in self.probe_data.eval_batches(split):
        known = all_rows(self.devices, {k: batch[k] for k in ('label', 'weight')})
        yield {**known, 'own': batch}
    return probe.run(self.config.probe, features, params, batches('train'), batches('test'),
                     seed=self.config.seed)
