"""What is learnt: from logits and a batch to loss and metrics, as sums.

Sums, never means: token counts differ between devices, microbatches and eval batches, so numerators
and denominators are added up apart and divided once.

Dimensions: B batch, L length, V classes or vocabulary.
"""

import jax
import jax.numpy as jnp


def labels(batch: dict) -> jax.Array:
  """What the logits of this batch should say: 'target' (B, L) of seq2seq, else 'label' (B,)."""
  return batch['target'] if 'target' in batch else batch['label']


def loss_sums(logits: jax.Array, batch: dict) -> dict:
  """Softmax cross-entropy and accuracy, summed over what counts.

  Args:
    logits: (B, L, V) or (B, V).
    batch: with 'target' (B, L) or 'label' (B,), and 'weight' of the same shape: 0 at padding and
      filler, which then count nowhere.

  Returns:
    float32 scalars 'loss' (nats), 'correct' and 'weight', each summed over the batch.
  """
  target, weight = labels(batch), batch['weight'].astype(jnp.float32)
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
  loss = jax.nn.logsumexp(logits, axis=-1) - chosen
  correct = (logits.argmax(-1) == target).astype(jnp.float32)
  return {'loss': (loss * weight).sum(),
          'correct': jax.lax.stop_gradient((correct * weight).sum()),
          'weight': weight.sum()}
