"""Evaluation of a whole split: sums of task loss and router telemetry, and decoded texts.

B batch, L decoded tokens at most.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

from moejax import losses, trees
from moejax.config import check
from moejax.evaluation import decoding


def make_eval_step(apply: Callable, reduce: Callable = lambda x: x) -> Callable:
  """A function (params, batch) -> sums of `losses.loss_sums`, and of MoE telemetry under 'layers'.

  Args:
    apply: Model.apply.
    reduce: sums over the devices of a pmap; the identity where arrays are global.
  """
  def eval_step(params, batch):
    logits, aux = apply(params, batch, train=False)
    return reduce({**losses.loss_sums(logits, batch), 'layers': trees.unflatten(aux)})
  return eval_step


def total(eval_step: Callable, params: dict, batches: Iterable) -> dict:
  """The sum of eval_step(params, batch) over batches, in float64 on the host.

  Raises:
    ValueError: there is no batch.
  """
  sums = None
  for batch in batches:
    new = jax.device_get(eval_step(params, batch))
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), new)
    sums = new if sums is None else jax.tree.map(np.add, sums, new)
  if sums is None:
    raise ValueError('no batch to evaluate on: the split is empty')
  return sums


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
  """How outputs are decoded from a seq2seq model.

  Attributes:
    beams: hypotheses of a beam search; 1: greedy decoding, which ignores alpha.
    alpha: of the length penalty ((5 + length) / 6)^alpha; t5x's default is 0.6.
    max_length: most tokens of an output; 0: the length of the data's targets.
    examples: most examples of a split; 0: all.
  """
  beams: int = 1
  alpha: float = 0.6
  max_length: int = 0
  examples: int = 0

  def __post_init__(self):
    check(self.beams >= 1, 'decode.beams', self.beams, '>= 1', '1 decodes greedily.')
    check(self.alpha >= 0, 'decode.alpha', self.alpha, '>= 0', '0 turns the length penalty off.')
    for name in ('max_length', 'examples'):
      check(getattr(self, name) >= 0, f'decode.{name}', getattr(self, name), '>= 0',
            'Use 0 for the length of the targets, or for all examples.')


def make_decode_step(model, config: DecodeConfig, gather: Callable = lambda x: x) -> Callable:
  """A function (params, batch) -> {'ids': (B, L) int32, 'real': (B,) bool, False for filler}.

  gather: collects the outputs of all devices of a pmap; the identity where arrays are global.

  Raises:
    ConfigError: the model has no decoder.
  """
  check(model.decode_step is not None, 'model.family', model.config.family, 't5, to decode',
        'Evaluate it by its loss and accuracy.')

  def decode_step(params, batch):
    length = config.max_length or batch['target'].shape[1]
    if config.beams == 1:
      ids = decoding.greedy(model, params, batch, length)
    else:
      ids = decoding.beam_search(model, params, batch, length, config.beams, config.alpha)
    return gather({'ids': ids, 'real': (batch['weight'] > 0).any(axis=1)})
  return decode_step


def predictions(decode_step: Callable, params: dict, batches: Iterable, vocabulary,
                examples: int = 0) -> list[str]:
  """Decoded texts of a split's examples in their order, without filler.

  Args:
    decode_step: of `make_decode_step`, compiled.
    batches: on the devices.
    vocabulary: with decode(ids (L,)) -> str.
    examples: stop after this many; 0: decode all.
  """
  texts = []
  for batch in batches:
    out = jax.device_get(decode_step(params, batch))
    texts += [vocabulary.decode(ids) for ids in out['ids'][out['real']]]
    if examples and len(texts) >= examples:
      return texts[:examples]
  return texts
