"""Losses and metrics of a batch, as sums over tokens.

Sums, never means: token counts differ between devices, microbatches and eval batches, so numerators
and denominators are added up separately and divided once.

Dimensions: B batch, L length, V classes or vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.config import check
from moejax.nn import at_least_float32


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """The objective of training. The loss that is reported stays plain cross-entropy.

  Attributes:
    label_smoothing: probability taken from the target and spread evenly over the V - 1 others.
    z_loss: weight of log(Z)^2, Z the normaliser of the softmax (T5: 1e-4).
    distill_weight: share alpha of the teacher's soft targets; the labels keep 1 - alpha (Switch
      section 4.2: 0.25).
    distill_temperature: T of student and teacher (Hinton et al. 2015; the default is our choice).
    teacher: workdir of the finished run that teaches.
  """
  label_smoothing: float = 0.0
  z_loss: float = 0.0
  distill_weight: float = 0.0
  distill_temperature: float = 1.0
  teacher: str = ''

  def __post_init__(self):
    check(0 <= self.label_smoothing < 1, 'task.label_smoothing', self.label_smoothing,
          '0 <= x < 1', '0 turns it off.')
    check(self.z_loss >= 0, 'task.z_loss', self.z_loss, '>= 0', 'T5 uses 1e-4; 0 turns it off.')
    check(0 <= self.distill_weight <= 1, 'task.distill_weight', self.distill_weight,
          '0 <= x <= 1', 'It is the share of the teacher in the objective.')
    check(self.distill_temperature > 0, 'task.distill_temperature', self.distill_temperature,
          '> 0', '1 leaves the logits as they are.')
    check(bool(self.teacher) == (self.distill_weight > 0), 'task.teacher', self.teacher,
          'a workdir if and only if task.distill_weight is above 0',
          f'distill_weight is {self.distill_weight}; set both or neither.')


PLAIN = TaskConfig()   # cross-entropy


def labels(batch: dict) -> jax.Array:
  """Returns the right class of each prediction: 'target' (B, L) of seq2seq, else 'label' (B,)."""
  return batch['target'] if 'target' in batch else batch['label']


def loss_sums(logits: jax.Array, batch: dict, task: TaskConfig | None = None) -> dict:
  """Returns softmax cross-entropy and accuracy, summed over targets with weight.

  Args:
    logits: (B, L, V) or (B, V).
    batch: with 'target' (B, L) or 'label' (B,), and 'weight' of the same shape: 0 at padding and
      filler. May hold 'teacher_logits', of the shape of logits.
    task: the training objective; None, as in evaluation: no 'objective'.

  Returns:
    float32 scalars, each summed over the batch: 'loss' (nats; plain cross-entropy for any task),
    'correct' and 'weight'; with a task 'objective', see `objective`; with teacher logits
    'teacher_agreement' (targets for which student and teacher have the same most probable class)
    and 'teacher_kl' (nats, KL(teacher || student) at temperature 1).

  Raises:
    ConfigError: task.distill_weight above 0 and no teacher logits.
  """
  target, weight = labels(batch), batch['weight'].astype(jnp.float32)
  logits = _at_least_float32(logits)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  loss = log_z - _chosen(logits, target)
  correct = (logits.argmax(-1) == target).astype(jnp.float32)
  sums = {'loss': (loss * weight).sum(),
          'correct': jax.lax.stop_gradient((correct * weight).sum()),
          'weight': weight.sum()}
  if 'teacher_logits' in batch:
    teacher = _at_least_float32(batch['teacher_logits'])
    agree = (logits.argmax(-1) == teacher.argmax(-1)).astype(jnp.float32)
    sums |= jax.lax.stop_gradient({
        'teacher_agreement': (agree * weight).sum(),
        'teacher_kl': (soft_targets(logits, teacher, 1.0) * weight).sum()})
  if task is not None:
    sums['objective'] = (objective(logits, batch, task) * weight).sum()
  return sums


def objective(logits: jax.Array, batch: dict, task: TaskConfig) -> jax.Array:
  """Returns the training objective of each target, not yet weighted.

  (1 - alpha) * smoothed cross-entropy + z_loss * log(Z)^2 + alpha * T^2 * KL(teacher || student),
  the last at temperature T (Hinton et al. 2015; T^2 makes the size of its gradient independent of
  T).

  Args:
    logits: (..., V).
    batch: as of `loss_sums`; 'teacher_logits' (..., V) if task.distill_weight is above 0.
    task: the weights.

  Returns:
    (...) at least float32.
  """
  logits, alpha = _at_least_float32(logits), task.distill_weight
  total = (1 - alpha) * smoothed_cross_entropy(logits, labels(batch), task.label_smoothing)
  if task.z_loss:
    total += task.z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
  if alpha:
    check('teacher_logits' in batch, 'task.distill_weight', alpha,
          "0 for batches without 'teacher_logits'", 'Give each batch the logits of its teacher.')
    T = task.distill_temperature
    total += alpha * T**2 * soft_targets(logits, batch['teacher_logits'], T)
  return total


def smoothed_cross_entropy(logits: jax.Array, target: jax.Array, smoothing: float) -> jax.Array:
  """Returns cross-entropy with 1 - smoothing at the target and smoothing / (V - 1) elsewhere.

  As in t5x (`compute_weighted_cross_entropy`), the entropy of the soft targets is subtracted, so
  the least value is 0; this constant has no gradient.

  Args:
    logits: (..., V), float32 or wider.
    target: (...) integers.
    smoothing: 0 <= smoothing < 1.

  Returns:
    (...) nats.
  """
  V = logits.shape[-1]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  hit = log_z - _chosen(logits, target)                             # -log p of the target
  if not smoothing or V == 1:
    return hit
  misses = V * log_z - logits.sum(-1) - hit                         # -log p, summed over the others
  on, off = 1 - smoothing, smoothing / (V - 1)
  entropy = -(on * math.log(on) + smoothing * math.log(off))
  return on * hit + off * misses - entropy


def soft_targets(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
  """Returns KL(teacher || student) of softmaxes at `temperature`: (..., V) twice -> (...) nats.

  The teacher's logits get no gradient.
  """
  student = jax.nn.log_softmax(_at_least_float32(logits) / temperature)
  teacher = jax.nn.log_softmax(
      jax.lax.stop_gradient(_at_least_float32(teacher_logits)) / temperature)
  return (jnp.exp(teacher) * (teacher - student)).sum(-1)


def _at_least_float32(x: jax.Array) -> jax.Array:
  return x.astype(at_least_float32(x.dtype))


def _chosen(logits: jax.Array, target: jax.Array) -> jax.Array:
  """The logit of each target: (..., V), (...) -> (...)."""
  return jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
