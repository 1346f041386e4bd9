"""Optimizers against optax, stacked experts against separate runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax import trees
from moejax.config import ConfigError
from moejax.train import optimizer
from moejax.train.optimizer import AdafactorConfig, OptimizerConfig

STEPS = 4
LR = 0.03
FACTOR_8 = AdafactorConfig(min_dim_size_to_factor=8)


update = jax.jit(optimizer.update, static_argnums=0)


def random_tree(shapes: dict, seed: int, scale: float = 1.0) -> dict:
  """{path: shape} -> nested dict of normal float32 values of that scale."""
  rng = np.random.default_rng(seed)
  return trees.unflatten({p: jnp.asarray(scale * rng.normal(size=s), jnp.float32)
                          for p, s in shapes.items()})


def run(config: OptimizerConfig, params: dict, grads: list, lr: float = LR) -> tuple[dict, dict]:
  """params and state after one step for each tree of grads."""
  state = optimizer.init(config, params)
  for g in grads:
    params, state = update(config, g, state, params, lr)
  return params, state


def run_optax(tx, params, grads):
  step = jax.jit(tx.update)
  state = tx.init(params)
  for g in grads:
    updates, state = step(g, state, params)
    params = optax.apply_updates(params, updates)
  return params


def assert_close(a, b, rtol=1e-6):
  for (path, x), y in zip(trees.flatten(a).items(), trees.flatten(b).values()):
    np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7, err_msg=path)


EXPERT_SHAPES = {  # of one expert; with E = 16 plain Adafactor factors (E, D) of the last two
    'matrix': (12, 20), 'vector': (24,), 'narrow': (4, 32)}


GROUPS = (('matrix', 0.3, 2.0), ('vector', 2.0, 0.0), ('.', 1.0, 5.0))


@pytest.mark.parametrize('config', [
    OptimizerConfig(name='adamw', weight_decay=0.1),
    OptimizerConfig(name='adafactor', weight_decay=0.1, adafactor=FACTOR_8),
    OptimizerConfig(name='sgd', momentum=0.9),
    OptimizerConfig(name='adamw', weight_decay=0.1, groups=GROUPS),
    OptimizerConfig(name='adafactor', weight_decay=0.1, adafactor=FACTOR_8, groups=GROUPS)],
    ids=lambda c: c.name + (' in groups' if c.groups else ''))
@pytest.mark.parametrize('name', EXPERT_SHAPES)
def test_stacked_experts_equal_separate_runs(config, name):
  E, shape = 16, EXPERT_SHAPES[name]
  path = f'layers/01/moe/experts/{name}'
  # Experts of very different scales: clipping or scaling over the whole stack would show.
  size = np.exp(np.linspace(-3, 3, E)).reshape(E, *(1 for _ in shape))
  stacked = jax.tree.map(lambda x: x * size, random_tree({path: (E, *shape)}, 0))
  grads = [jax.tree.map(lambda x: x / size, random_tree({path: (E, *shape)}, 1 + t))
           for t in range(STEPS)]
  params, state = run(config, stacked, grads)
  for e in range(E):
    def one(tree, e=e):  # the same leaf outside any stack
      return {'layers': {'01': {'mlp': {name: trees.flatten(tree)[path][e]}}}}
    alone, alone_state = run(config, one(stacked), [one(g) for g in grads])
    assert_close({'p': trees.flatten(params)[path][e]}, alone)
    slots = {k.rsplit('/', 1)[1]: v[e] for k, v in trees.flatten(state).items()}
    assert_close(slots, {k.rsplit('/', 1)[1]: v for k, v in trees.flatten(alone_state).items()})
    assert slots['count'] == STEPS


DENSE_SHAPES = {'layers/00/mlp/wi': (12, 20), 'layers/00/mlp/wi_bias': (20,),
                'layers/00/mlp_norm/scale': (12,), 'embed/embedding': (7, 12)}


def test_adamw_equals_optax():
  params = random_tree(DENSE_SHAPES, 0)
  grads = [random_tree(DENSE_SHAPES, 1 + t) for t in range(STEPS)]
  config = OptimizerConfig(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3)
  decayed = {'layers': {'00': {'mlp': {'wi': True, 'wi_bias': False},
                               'mlp_norm': {'scale': False}}}, 'embed': {'embedding': True}}
  tx = optax.adamw(LR, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3, mask=decayed)
  assert_close(run(config, params, grads)[0], run_optax(tx, params, grads))


@pytest.mark.parametrize('scaled', [True, False])
def test_adafactor_equals_optax(scaled):
  """With T5's settings: decay 0.8, clipping 1, parameter scale, no momentum."""
  params = random_tree(DENSE_SHAPES, 0)
  grads = [random_tree(DENSE_SHAPES, 1 + t, scale=10.0 ** t) for t in range(STEPS)]
  settings = AdafactorConfig(min_dim_size_to_factor=8, multiply_by_parameter_scale=scaled)
  tx = optax.adafactor(LR, min_dim_size_to_factor=8, multiply_by_parameter_scale=scaled)
  new, state = run(OptimizerConfig(name='adafactor', adafactor=settings), params, grads)
  assert_close(new, run_optax(tx, params, grads))
  assert state['layers']['00']['mlp']['wi']['v_row'].shape == (12,)  # it did factor
  assert state['layers']['00']['mlp']['wi_bias']['v'].shape == (20,)


def test_sgd_by_hand():
  # p = 1, g = 2 then 4, lr 0.5: 1 - 1 = 0, 0 - 2 = -2; with momentum 0.5 the second direction
  # is 4 + 0.5 * 2 = 5, so 0 - 2.5.
  grads = [{'w': jnp.array([2.0])}, {'w': jnp.array([4.0])}]
  params, state = run(OptimizerConfig(name='sgd'), {'w': jnp.array([1.0])}, grads, lr=0.5)
  np.testing.assert_allclose(params['w'], [-2.0])
  assert trees.flatten(state) == {'w/count': 2}
  params, _ = run(OptimizerConfig(name='sgd', momentum=0.5), {'w': jnp.array([1.0])}, grads, lr=0.5)
  np.testing.assert_allclose(params['w'], [-2.5])


def test_weight_decay_is_decoupled_and_times_lr():
  # Zero gradients: p = 2 becomes 2 - 0.1 * 0.5 * 2 = 1.9; a bias stays.
  params = {'wo': jnp.array([2.0]), 'wo_bias': jnp.array([2.0])}
  zero = jax.tree.map(jnp.zeros_like, params)
  for name in ('adamw', 'adafactor', 'sgd'):
    new, _ = run(OptimizerConfig(name=name, weight_decay=0.5), params, [zero], lr=0.1)
    np.testing.assert_allclose(new['wo'], [1.9], rtol=1e-6)
    np.testing.assert_allclose(new['wo_bias'], [2.0])


def test_state_layout():
  shapes = {'encoder/layers/01/moe/experts/wi_gate': (3, 4, 5), 'head/kernel': (4, 6)}
  state = trees.flatten(optimizer.init(OptimizerConfig(), random_tree(shapes, 0)))
  assert {p: (x.shape, str(x.dtype)) for p, x in state.items()} == {
      'encoder/layers/01/moe/experts/wi_gate/count': ((3,), 'int32'),
      'encoder/layers/01/moe/experts/wi_gate/mu': ((3, 4, 5), 'float32'),
      'encoder/layers/01/moe/experts/wi_gate/nu': ((3, 4, 5), 'float32'),
      'head/kernel/count': ((), 'int32'),
      'head/kernel/mu': ((4, 6), 'float32'), 'head/kernel/nu': ((4, 6), 'float32')}


def test_clip_by_global_norm():
  # sqrt(3^2 + 4^2) = 5, so a bound of 1 divides by 5.
  grads = {'a': jnp.array([3.0]), 'b': jnp.array([4.0], jnp.bfloat16)}
  clipped, norm = optimizer.clip_by_global_norm(grads, 1.0)
  np.testing.assert_allclose(norm, 5.0)
  np.testing.assert_allclose(clipped['a'], [0.6], rtol=1e-6)
  assert clipped['b'].dtype == jnp.bfloat16
  for bound in (0.0, 6.0):  # off, and not reached
    clipped, norm = optimizer.clip_by_global_norm(grads, bound)
    np.testing.assert_allclose(clipped['a'], [3.0])
    np.testing.assert_allclose(norm, 5.0)
  clipped, _ = optimizer.clip_by_global_norm({'a': jnp.zeros(2)}, 1.0)
  np.testing.assert_array_equal(clipped['a'], [0.0, 0.0])


@pytest.mark.parametrize('make, message', [
    (lambda: OptimizerConfig(name='adam'), "optimizer.name: got 'adam'.*adamw"),
    (lambda: OptimizerConfig(learning_rate=0.0), 'optimizer.learning_rate: got 0.0'),
    (lambda: OptimizerConfig(b2=1.0), 'optimizer.b2: got 1.0'),
    (lambda: OptimizerConfig(clip_norm=-1.0), 'optimizer.clip_norm: got -1.0'),
    (lambda: OptimizerConfig(weight_decay_mask='('), 'weight_decay_mask.*does not compile'),
    (lambda: AdafactorConfig(decay_rate=0.0), 'optimizer.adafactor.decay_rate')])
def test_errors(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
