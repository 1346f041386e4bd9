"""Hand-made states of both backbones, with optimizer state of both kinds, and surgery on them."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax import trees
from moejax.surgery import upcycle
from moejax.train import optimizer
from moejax.train.optimizer import AdafactorConfig, OptimizerConfig
from moejax.trees import rules

D, F, E = 4, 6, 3
T5 = {'wi_gate': (D, F), 'wi_up': (D, F), 'wo': (F, D)}
VIT = {'wi': (D, F), 'wi_bias': (F,), 'wo': (F, D), 'wo_bias': (D,)}
ADAMW = OptimizerConfig()
ADAFACTOR = OptimizerConfig(name='adafactor', adafactor=AdafactorConfig(min_dim_size_to_factor=4))


update = jax.jit(optimizer.update, static_argnums=0)


def make_params(mlp: dict, moe: dict, stacks=('encoder',), depth=4, E=E, seed=0, G=1,
                shared=0, classes=5) -> dict:
  """Random parameters; moe: {stack: layers that are MoE}, with experts of F/G hidden units and
  `shared` hidden units of shared ones."""
  rng = np.random.default_rng(seed)
  shapes = {'embed/embedding': (7, D), 'head/kernel': (D, classes)}
  for stack in stacks:
    for layer in range(depth):
      path = f'{stack}/layers/{layer:02d}'
      shapes[f'{path}/attention/q/kernel'] = (D, D)
      if layer in moe.get(stack, ()):
        resize = lambda shape, units: tuple(units if n == F else n for n in shape)
        shapes |= {f'{path}/moe/experts/{n}': (E, *resize(s, F // G)) for n, s in mlp.items()}
        if shared:
          shapes |= {f'{path}/moe/shared/{n}': resize(s, shared) for n, s in mlp.items()}
        shapes |= {f'{path}/moe/router/kernel': (D, E), f'{path}/moe/router/noise_kernel': (D, E),
                   f'{path}/moe/router/no_grad/bias': (E,)}
      else:
        shapes |= {f'{path}/mlp/{n}': s for n, s in mlp.items()}
  return trees.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32)
                          for p, s in shapes.items()})


def make_state(params: dict, config: OptimizerConfig, steps: int = 3) -> dict:
  """A flat state as after that many steps: random moments (positive, as nu must be) and counts."""
  rng = np.random.default_rng(steps)
  opt_state = jax.tree.map(
      lambda x: jnp.full_like(x, steps) if x.dtype == jnp.int32
      else jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype), optimizer.init(config, params))
  return trees.flatten({'step': jnp.int32(steps), 'params': params, 'opt_state': opt_state})


def surgery(table, source, target):
  """(flat new state, entries); fresh parameters are all 7."""
  values = upcycle.fresh_values(target, lambda path: np.full(target[path].shape, 7, np.float32))
  return rules.apply(rules.plan(table, source, target), lambda p: np.asarray(source[p]), values)


def nested(flat: dict) -> dict:
  """A flat state in the form that `update` takes."""
  return trees.unflatten({p: jnp.asarray(v) for p, v in flat.items()})
