"""Loss, objective and accuracy as sums, by hand: logits are logs of halves and quarters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.config import ConfigError

loss_sums = jax.jit(losses.loss_sums, static_argnums=2)
LN2 = np.log(2)
# Probabilities of the targets of three tokens: 1/2 (and the most probable), 1/4 (not), 1/4 (not).
PROBS = np.array([[[1/2, 1/4, 1/4], [1/4, 1/4, 1/2], [1/2, 1/4, 1/4]]], np.float32)
TARGET = np.array([[0, 0, 2]])


def sums(weight, **batch):
  logits = np.log(PROBS) + np.float32(7)   # not normalised
  return loss_sums(logits, {'target': TARGET, 'weight': np.array(weight), **batch})


@pytest.mark.parametrize('weight, loss, correct, total', [
    ([[1, 1, 1]], 5 * LN2, 1, 3),            # ln 2 + ln 4 + ln 4
    ([[1., 1., 0.]], 3 * LN2, 1, 2),         # the last is padding
    ([[0, 1, 1]], 4 * LN2, 0, 2),
    ([[0.5, 1., 0.]], 2.5 * LN2, 0.5, 1.5),
    ([[0, 0, 0]], 0, 0, 0)])
def test_seq2seq_by_hand(weight, loss, correct, total):
  found = sums(weight)
  assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(
      ('loss', 'correct', 'weight'), jnp.float32)
  assert float(found['loss']) == pytest.approx(loss, rel=1e-5, abs=1e-6)
  assert (float(found['correct']), float(found['weight'])) == (correct, total)


def test_classification_reads_label():
  logits = np.log([[1/2, 1/4, 1/4], [1/4, 1/2, 1/4], [1/4, 1/4, 1/2]])
  batch = {'label': np.array([1, 1, 2]), 'weight': np.array([1., 1., 0.])}   # the last is filler
  assert losses.labels(batch | {'target': 1}) == 1
  found = loss_sums(logits, batch)
  assert float(found['loss']) == pytest.approx(3 * LN2, rel=1e-6)              # ln 4 + ln 2
  assert (float(found['correct']), float(found['weight'])) == (1, 2)


def test_the_loss_of_bfloat16_logits_is_summed_in_float32():
  """512 tokens of ln 2 summed in bfloat16 (8 bits) would stop far short of 512 ln 2."""
  logits = jnp.zeros((1, 512, 2), jnp.bfloat16)
  batch = {'target': jnp.zeros((1, 512), int), 'weight': jnp.ones((1, 512), jnp.bfloat16)}
  found = loss_sums(logits, batch)
  assert found['loss'].dtype == jnp.float32
  assert float(found['loss']) == pytest.approx(512 * LN2, rel=1e-6)


def test_gradient_is_probability_minus_one_hot_and_zero_at_padding():
  batch = {'target': TARGET, 'weight': np.array([[1, 0, 1]])}
  gradient = jax.jit(jax.grad(lambda x: loss_sums(x, batch)['loss']))(np.log(PROBS))
  np.testing.assert_allclose(
      gradient, [[[-1/2, 1/4, 1/4], [0, 0, 0], [1/2, 1/4, -3/4]]], atol=1e-6)


# What is trained on. Teacher and student over three classes, the latter at PROBS' first token.
TEACHER = np.log(np.array([1/4, 1/4, 1/2]))
STUDENT = np.log(np.array([1/2, 1/4, 1/4]))
DISTILL = losses.TaskConfig(distill_weight=1.0, teacher='/a/run')


def objective(task, logits=STUDENT, teacher=TEACHER, label=0):
  return float(losses.objective(jnp.asarray(logits), {
      'label': jnp.int32(label), 'teacher_logits': jnp.asarray(teacher)}, task))


def test_the_objective_of_a_plain_task_is_the_loss():
  batch = {'target': TARGET, 'weight': np.array([[1, 0.5, 0]])}
  found = jax.jit(lambda x: loss_sums(x, batch, losses.TaskConfig()))(np.log(PROBS))
  assert float(found['objective']) == float(found['loss']) == pytest.approx(2 * LN2)
  assert 'objective' not in loss_sums(np.log(PROBS), batch)


def test_label_smoothing_by_hand():
  """Soft targets (1/2, 1/4, 1/4) at smoothing 1/2: their cross-entropy less their entropy.

  Probabilities (1/2, 1/4, 1/4): 1.5 ln 2 less 1.5 ln 2. With the target at the third: soft targets
  (1/4, 1/4, 1/2), so 1/4 ln 2 + 1/4 ln 4 + 1/2 ln 4 less 1.5 ln 2 = (1/4 + 6/4 - 6/4) ln 2.
  """
  task = losses.TaskConfig(label_smoothing=0.5)
  assert objective(task, label=0) == pytest.approx(0, abs=1e-6)
  assert objective(task, label=2) == pytest.approx(LN2 / 4, rel=1e-6)


def test_z_loss_by_hand():
  """Logits ln(4 * 1/2, ...) have Z = 4, and log(Z)^2 = 4 ln(2)^2."""
  task = losses.TaskConfig(z_loss=0.5)
  assert objective(task, STUDENT + np.log(4)) == pytest.approx(LN2 + 2 * LN2**2, rel=1e-6)
  assert objective(task, STUDENT) == pytest.approx(LN2, rel=1e-6)    # normalised: no penalty


def test_distillation_by_hand():
  """KL of (1/4, 1/4, 1/2) from (1/2, 1/4, 1/4): -1/4 ln 2 + 0 + 1/2 ln 2."""
  assert objective(DISTILL) == pytest.approx(LN2 / 4, rel=1e-6)
  # The other way round it would be 1/2 ln 2 - 1/4 ln 2, the same; so a pair that is not symmetric:
  # teacher (1/2, 1/2, 0) says ln 1 * 1/2 + ln 2 * 1/2.
  assert objective(DISTILL, teacher=np.log([1/2, 1/2, 1e-30])) == pytest.approx(LN2 / 2, rel=1e-6)
  quarter = losses.TaskConfig(distill_weight=0.25, teacher='/a/run')   # Switch, section 4.2
  assert objective(quarter) == pytest.approx(0.75 * LN2 + 0.25 * LN2 / 4, rel=1e-6)


def test_temperature_by_hand():
  """At T = 2 logits ln(16, 4, 4) and ln(4, 4, 16) are the two distributions; T^2 = 4."""
  task = losses.TaskConfig(distill_weight=1.0, distill_temperature=2.0, teacher='/a/run')
  assert objective(task, np.log([16., 4, 4]), np.log([4., 4, 16])) == pytest.approx(LN2, rel=1e-6)


def naive(logits, batch, task):
  """The objective, one target and one class at a time."""
  total = 0.0
  V = logits.shape[-1]
  for logit, teacher, target, weight in zip(
      logits.reshape(-1, V), batch['teacher_logits'].reshape(-1, V), batch['target'].reshape(-1),
      batch['weight'].reshape(-1)):
    p = jnp.exp(logit) / jnp.exp(logit).sum()
    soft = [1 - task.label_smoothing if v == target else task.label_smoothing / (V - 1)
            for v in range(V)]
    ce = -sum(q * jnp.log(p[v]) for v, q in enumerate(soft))
    T = task.distill_temperature
    t = jnp.exp(teacher / T) / jnp.exp(teacher / T).sum()
    s = jnp.exp(logit / T) / jnp.exp(logit / T).sum()
    kl = sum(t[v] * (jnp.log(t[v]) - jnp.log(s[v])) for v in range(V))
    a = task.distill_weight
    total += weight * ((1 - a) * ce + task.z_loss * jnp.log(jnp.exp(logit).sum())**2
                       + a * T**2 * kl)
  return total


def random_batch(seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(2, 3, 5)), {
      'target': rng.integers(0, 5, (2, 3)), 'teacher_logits': rng.normal(size=(2, 3, 5)) * 2,
      'weight': np.array([[1, 1, 0.5], [1, 0, 0]])}


@pytest.mark.parametrize('task', [
    losses.TaskConfig(label_smoothing=0.1), losses.TaskConfig(z_loss=0.3),
    losses.TaskConfig(distill_weight=1.0, distill_temperature=3.0, teacher='/a/run'),
    losses.TaskConfig(0.2, 0.1, 0.25, 2.0, '/a/run')], ids=['smoothing', 'z', 'KL', 'all'])
def test_gradients_are_those_of_the_naive_formulas(task):
  logits, batch = random_batch()
  with jax.enable_x64(True):
    found = jax.grad(lambda x: loss_sums(x, batch, task)['objective'])(jnp.asarray(logits))
    expected = jax.grad(lambda x: naive(x, batch, task))(jnp.asarray(logits))
  assert np.abs(expected[0]).min() > 1e-6 and not np.any(expected[1, 1:])
  np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_the_loss_is_plain_whatever_is_trained_on():
  logits, batch = random_batch()
  found = loss_sums(logits, batch, losses.TaskConfig(0.2, 0.1, 0.25, 2.0, '/a/run'))
  plain = loss_sums(logits, batch)
  for name in ('loss', 'correct', 'weight'):
    assert found[name] == plain[name]
  assert abs(float(found['objective'] - found['loss'])) > 0.1


def test_no_gradient_reaches_the_teacher():
  logits, batch = random_batch()
  of_teacher = lambda t: loss_sums(logits, batch | {'teacher_logits': t}, DISTILL)['objective']
  assert not np.any(jax.grad(of_teacher)(batch['teacher_logits']))


def test_student_beside_teacher_by_hand():
  """Most probable classes of PROBS: 0, 2, 0; of the teacher: 2, 2, 2. KLs ln(2)/4, 0, ln(2)/4."""
  teacher = np.broadcast_to(TEACHER, PROBS.shape)
  found = sums([[1, 0.5, 0]], teacher_logits=teacher)
  assert float(found['teacher_agreement']) == 0.5
  assert float(found['teacher_kl']) == pytest.approx(LN2 / 4, rel=1e-6)
  assert not {'teacher_agreement', 'teacher_kl'} & set(sums([[1, 1, 1]]))


@pytest.mark.parametrize('changes, key', [
    ({'label_smoothing': 1.0}, 'task.label_smoothing'), ({'z_loss': -1.0}, 'task.z_loss'),
    ({'distill_weight': 1.5, 'teacher': 'x'}, 'task.distill_weight'),
    ({'distill_weight': 0.5}, 'task.teacher'), ({'teacher': 'x'}, 'task.teacher'),
    ({'distill_temperature': 0.0}, 'task.distill_temperature')])
def test_refused_tasks(changes, key):
  with pytest.raises(ConfigError, match=key):
    losses.TaskConfig(**changes)


def test_distillation_without_a_teacher_is_refused():
  with pytest.raises(ConfigError, match='teacher_logits'):
    loss_sums(STUDENT[None], {'label': np.array([0]), 'weight': np.ones(1)}, DISTILL)
