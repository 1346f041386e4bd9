"""Distance of moejax from what Hugging Face computed, on golden cases.

A case is a dict of arrays: 'input/...' , 'weight/<Hugging Face name>' (float16, exact in float64),
'logits' and 'grad/<name>', the gradients of the weighted mean cross-entropy.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from moejax import losses, models, trees
from moejax.models import t5
from moejax.models.vit import ViTConfig
from tests.parity import names

FOLDER = pathlib.Path(__file__).parent
TOLERANCE = 1e-8

# Distances reach far past relative_max_distance; num_heads * d_kv = 30 is not d_model.
T5_CONFIG = t5.T5Config(
    vocab_size=40, d_model=24, d_ff=40, d_kv=10, num_heads=3, encoder_layers=2, decoder_layers=3,
    relative_buckets=8, relative_max_distance=16, dtype='float64')
VIT_CONFIG = ViTConfig(
    image_size=12, channels=3, patch_size=4, num_classes=7, d_model=24, d_ff=40, num_heads=3,
    num_layers=2, head='cls', activation='gelu_erf', norm_eps=1e-12, dtype='float64')
CASES = {'t5': (T5_CONFIG, names.T5), 'vit': (VIT_CONFIG, names.VIT)}


def load(name: str) -> dict[str, np.ndarray]:
  """The committed golden arrays of 't5' or 'vit'."""
  with np.load(FOLDER / f'{name}.npz') as file:
    return dict(file)


def group(case: dict, prefix: str) -> dict[str, np.ndarray]:
  """The arrays under 'prefix/', without it."""
  return {k.removeprefix(f'{prefix}/'): v for k, v in case.items() if k.startswith(f'{prefix}/')}


def errors(name: str, case: dict, config=None, gradients: bool = True) -> dict[str, float]:
  """{'logits' or a leaf's path: largest difference / largest entry}, in float64.

  Args:
    name: 't5' or 'vit'.
    case: golden arrays.
    config: replaces the case's own, to check that another one differs.
    gradients: whether to compare them too.
  """
  own, table = CASES[name]
  with jax.enable_x64(True):
    model = models.build(config or own)
    weights = {k: v.astype(np.float64) for k, v in group(case, 'weight').items()}
    params = jax.tree.map(jnp.asarray, trees.unflatten(names.to_moejax(table, weights)))
    if differences := trees.diff(params, model.shapes):
      raise ValueError('\n'.join(differences))
    batch = {k: jnp.asarray(v) for k, v in group(case, 'input').items()}
    actual, expected = {}, {'logits': case['logits']}

    def loss(params, batch):
      logits, _ = model.apply(params, batch)
      sums = losses.loss_sums(logits, batch)
      return sums['loss'] / sums['weight'], logits
    if gradients:
      grads, actual['logits'] = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
      actual |= trees.flatten(grads)
      expected |= names.to_moejax(table, group(case, 'grad'))
    else:
      actual['logits'] = jax.jit(loss)(params, batch)[1]
    # A bias of attention keys moves all logits of a query alike, so its gradient is 0 up to
    # rounding. It is measured against the largest gradient.
    least = 1e-6 * max(np.abs(v).max() for v in expected.values())
    return {k: float(np.abs(actual[k] - v).max() / max(np.abs(v).max(), least))
            for k, v in expected.items()}
