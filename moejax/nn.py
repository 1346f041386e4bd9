"""What layers are made of, as pure functions: initialisers, random draws, dense maps, the MLP.

Experts (moe/) and dense models (models/) both build on this file.

Parameters are float32 and cast to the compute dtype where they are used. Activations are flattened
to two dimensions around matmuls: XLA on CPU runs (B*L, D) @ (D, F) at nearly twice the speed of the
three-dimensional form.

Random numbers come from `keys` (B,), one key per example; None means that nothing is drawn. Each
use gets keys of its own. An example's draws do not depend on the batch it is in.

Dimensions: B batch, D model, F ffn, N tokens, E experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.config import check_choice

Initializer = Callable[..., jax.Array]   # (key, shape, dtype) -> array

ACTIVATIONS = {
    'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
    'gelu_erf': functools.partial(jax.nn.gelu, approximate=False),
    'silu': jax.nn.silu,
    'relu': jax.nn.relu,
    'squared_relu': lambda x: jnp.square(jax.nn.relu(x)),   # So et al. 2021 (Primer)
}


def at_least_float32(dtype) -> jnp.dtype:
  """The dtype in which norms, attention logits and the final logits are computed."""
  return jnp.promote_types(dtype, jnp.float32)


def split_keys(keys: jax.Array | None, n: int) -> jax.Array | list[None]:
  """n keys for each example, (n, B): one (B,) for each use. None returns n times None.

  One call for many uses: each call compiles a hash of its own.
  """
  return [None] * n if keys is None else jax.vmap(lambda k: jax.random.split(k, n))(keys).T


def flat_draw(draw: Callable, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """draw(key, (n,)) as an array of `shape`.

  XLA on CPU takes seconds to compile the counters of each multi-dimensional draw; of a flat one, a
  tenth of that.
  """
  return draw(key, (math.prod(shape),)).reshape(shape)


def draw_per_example(draw: Callable, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """draw(key, (n,)) for each of keys (B,), as an array of `shape` = (B, ...)."""
  return jax.vmap(lambda key: flat_draw(draw, key, shape[1:]))(keys)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and divides the rest by 1 - rate.

  Args:
    x: (B, ...).
    rate: in [0, 1).
    keys: (B,) keys, one per example; None returns x.
  """
  if keys is None or rate == 0.0:
    return x
  keep = draw_per_example(
      lambda key, shape: jax.random.bernoulli(key, 1.0 - rate, shape), keys, x.shape)
  return jnp.where(keep, x / (1.0 - rate), 0)


def zeros(key, shape, dtype):
  """Initialiser: all 0."""
  return jnp.zeros(shape, dtype)


def ones(key, shape, dtype):
  """Initialiser: all 1."""
  return jnp.ones(shape, dtype)


def normal(std: float) -> Initializer:
  """Initialiser: N(0, std^2)."""
  return lambda key, shape, dtype: std * flat_draw(
      lambda key, n: jax.random.normal(key, n, dtype), key, shape)


def fan_in_normal(scale: float = 1.0) -> Initializer:
  """Initialiser of a kernel (D, F): truncated normal of variance scale / D."""
  def init(key, shape, dtype):
    std = math.sqrt(scale / shape[0]) / 0.87962566103423978         # that of N(0, 1) cut at 2
    return std * flat_draw(
        lambda key, n: jax.random.truncated_normal(key, -2, 2, n, dtype), key, shape)
  return init


def xavier_uniform(key, shape, dtype):
  """Initialiser of a kernel (D, F): uniform of variance 2 / (D + F) (Glorot & Bengio 2010)."""
  limit = math.sqrt(6 / sum(shape))
  return flat_draw(
      lambda key, n: jax.random.uniform(key, n, dtype, -limit, limit), key, shape)


def param(init: Initializer, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
  """A float32 parameter."""
  return nnx.Param(_draw(init, rngs.params(), shape))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _draw(init, key, shape):
  """Jitted so that equal parameters are traced once: deep models would take long to build."""
  return init(key, shape, jnp.float32)


@functools.cache
def _per_expert(init: Initializer, num_experts: int | None) -> Initializer:
  """init; or with num_experts an initialiser of that many independent draws, stacked on axis 0."""
  if num_experts is None:
    return init
  return lambda key, shape, dtype: jax.vmap(lambda k: init(k, shape, dtype))(
      jax.random.split(key, num_experts))


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, dtype=None) -> jax.Array:
  """x (..., D) @ kernel (D, F) + bias (F,) -> (..., F), summed and returned in `dtype` or x's."""
  flat = x.reshape(-1, x.shape[-1])
  y = jnp.matmul(flat, kernel.astype(x.dtype), preferred_element_type=dtype or x.dtype)
  if bias is not None:
    y = y + bias.astype(y.dtype)
  return y.reshape(*x.shape[:-1], kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class MLPSpec:
  """The form of an MLP, dense or of an expert.

  Attributes:
    d_model, d_ff: D and F.
    gated: whether it is (act(x wi_gate) * (x wi_up)) wo (Shazeer 2020); else act(x wi) wo.
    activation: key of ACTIVATIONS.
    bias: whether every matmul adds a bias.
    init: initialiser of kernels.
    dropout_rate: of hidden activations.

  Raises:
    ConfigError: there is no such activation.
  """
  d_model: int
  d_ff: int
  gated: bool = False
  activation: str = 'gelu_tanh'
  bias: bool = True
  init: Initializer = dataclasses.field(default_factory=fan_in_normal)
  dropout_rate: float = 0.0

  def __post_init__(self):
    check_choice('activation', self.activation, ACTIVATIONS)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the parameters of one MLP: kernels, then biases if any."""
    D, F = self.d_model, self.d_ff
    kernels = {'wi_gate': (D, F), 'wi_up': (D, F)} if self.gated else {'wi': (D, F)}
    kernels['wo'] = (F, D)
    biases = {f'{name}_bias': shape[1:] for name, shape in kernels.items()} if self.bias else {}
    return kernels | biases


class MLPParams(nnx.Module):
  """Parameters of one MLP; or of num_experts MLPs, stacked on axis 0.

  Each stacked MLP is initialised with its own key and the fan-in of one MLP.
  """

  def __init__(self, spec: MLPSpec, num_experts: int | None = None, *, rngs: nnx.Rngs):
    self.spec = spec
    for name, shape in spec.shapes().items():
      init = zeros if name.endswith('_bias') else spec.init
      setattr(self, name, param(_per_expert(init, num_experts), shape, rngs))

  def weights(self) -> dict[str, jax.Array]:
    """{name: array} of all parameters, named as in MLPSpec.shapes."""
    return {name: getattr(self, name)[...] for name in self.spec.shapes()}


def mlp(spec: MLPSpec, project: Callable[[str, jax.Array], jax.Array], x: jax.Array,
        drop: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """The MLP on x, whatever kind of matmul it takes: that of one MLP or of stacked experts.

  Args:
    spec: its form.
    project: (name of a kernel, h) -> h times that kernel plus its bias.
    x: any shape that `project` takes.
    drop: applied to the hidden activations; None: no dropout.

  Returns:
    The shape and dtype of x.
  """
  act = ACTIVATIONS[spec.activation]
  h = act(project('wi_gate', x)) * project('wi_up', x) if spec.gated else act(project('wi', x))
  return project('wo', drop(h) if drop else h)
