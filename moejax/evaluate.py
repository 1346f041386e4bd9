"""Evaluation: sums of task loss and router telemetry over a whole split."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from moejax import tasks, trees


def make_eval_step(apply: Callable, reduce: Callable = lambda x: x) -> Callable:
  """(params, batch) -> sums: `tasks.loss_sums`, and router telemetry under 'layers'.

  Args:
    apply: Model.apply.
    reduce: adds over the devices of a pmap; the identity where arrays are global.
  """
  def eval_step(params, batch):
    logits, aux = apply(params, batch, train=False)
    return reduce({**tasks.loss_sums(logits, batch), 'layers': trees.unflatten(aux)})
  return eval_step


def total(eval_step: Callable, params: dict, batches: Iterable) -> dict:
  """Adds eval_step(params, batch) over batches; float64 sums on the host, nested as eval_step's.

  Raises ValueError on an empty split.
  """
  sums = None
  for batch in batches:
    new = jax.device_get(eval_step(params, batch))
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
    sums = new if sums is None else jax.tree.map(np.add, sums, new)
  if sums is None:
    raise ValueError('no batch to evaluate on: the split is empty')
  return sums
