"""build(config): the pure functions of a T5 or a ViT, dense or sparse."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from moejax import trees
from moejax.config import check
from moejax.models.scan import UNROLLED, Execution
from moejax.models.t5 import T5, T5Config, init_cache
from moejax.models.vit import ViT, ViTConfig
from moejax.nn import at_least_float32

Config = T5Config | ViTConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A backbone as pure functions of its parameters.

  Attributes:
    config: the config that it was built from.
    init: jax key -> parameters, a nested dict of float32 arrays; may be traced. Never stacked.
    apply: (params, batch, *, train=False, key=None) -> (logits, aux). With `train`, MoE layers use
      their training capacity; with a key as well, dropout and router noise are drawn, for each
      example by the key and batch['index'] alone. logits are at least float32; aux is {path of an
      MoE layer: its sums}.
    shapes: the parameters as ShapeDtypeStructs, never stacked.
    param_paths: paths of the parameters that `apply` and `features` take; some are stacked (see
      moejax.trees.stacking) if blocks are scanned.
    encode, init_cache, decode_step: T5 only, decoding token by token; see t5.py. (params, batch) ->
      encoded; (encoded, length) -> cache; (params, encoded, cache, ids (B,), position ()) ->
      (logits (B, V), cache).
    features: ViT only, (params, batch) -> (B, D), at least float32: the head's input.
  """
  config: Config
  init: Callable[[jax.Array], dict]
  apply: Callable[..., tuple[jax.Array, dict]]
  shapes: dict[str, Any]
  param_paths: tuple[str, ...]
  encode: Callable[[dict, dict], Any] | None = None
  init_cache: Callable[[Any, int], dict] | None = None
  decode_step: Callable[..., tuple[jax.Array, dict]] | None = None
  features: Callable[[dict, dict], jax.Array] | None = None

  def examples_per_group(self, encoder_length: int = 0, decoder_length: int = 0) -> int:
    """examples_per_group of this config, below."""
    return examples_per_group(self.config, encoder_length, decoder_length)

  def token_counts(self, batch: dict) -> dict[str, jax.Array]:
    """{stack: int32 scalar}, its real tokens in a batch, as its MoE layers count them."""
    if self.config.family == 'vit':
      return {'encoder': (batch['weight'] > 0).sum() * self.config.num_tokens}
    return {'encoder': (batch['encoder_input'] != 0).sum(), 'decoder': (batch['weight'] > 0).sum()}


def build(config: Config, execution: Execution = UNROLLED) -> Model:
  """Model of a validated T5Config or ViTConfig; allocates nothing.

  The functions for decoding unroll blocks and take parameters that are not stacked, whatever
  `execution` is.

  Raises:
    ConfigError: fused attention in a model that needs a bias or masks, or on a GPU in a dtype that
      the kernel does not take; float64 without JAX_ENABLE_X64.
  """
  check(config.dtype != 'float64' or jax.config.jax_enable_x64, 'config.model.dtype', 'float64',
        'float32 or bfloat16', 'JAX computes in float32 unless JAX_ENABLE_X64=1 is set.')
  if execution.attention == 'fused':
    check(config.family == 'vit', 'config.execution.attention', 'fused', "'plain' for T5",
          "cuDNN's kernel would take its bias and masks as one array of the logits' size.")
    check(config.dtype == 'bfloat16' or jax.default_backend() != 'gpu',
          'config.execution.attention', 'fused', f"'plain' in {config.dtype}",
          'Or set config.model.dtype=bfloat16.')
  module = {'t5': T5, 'vit': ViT}[config.family]

  def split(key, execution=UNROLLED):
    return nnx.split(module(config, execution, rngs=_InitKeys(key)), nnx.Param)

  def init(key):
    return nnx.to_pure_dict(split(key)[1])

  def apply(params, batch, *, train=False, key=None):
    keys = None
    if train and key is not None:
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch['index'])
    return nnx.merge(executed, params)(batch, train=train, keys=keys)

  def method(name):
    return lambda params, *args: getattr(nnx.merge(graphdef, params), name)(*args)

  def features(params, batch):
    x, _ = nnx.merge(executed, params).features(batch, train=False, keys=None)
    return x.astype(at_least_float32(x.dtype))

  graphdef, shapes = nnx.eval_shape(split, jax.random.key(0))
  executed, run_shapes = nnx.eval_shape(
      functools.partial(split, execution=execution), jax.random.key(0))
  param_paths = tuple(trees.flatten(nnx.to_pure_dict(run_shapes)))
  if config.family == 't5':
    functions = {'encode': method('encode'), 'decode_step': method('decode_step'),
                 'init_cache': init_cache}
  else:
    functions = {'features': features}
  return Model(config, init, apply, nnx.to_pure_dict(shapes), param_paths, **functions)


class _InitKeys:
  """Replaces nnx.Rngs: a new key at each call of params(), counted in Python.

  The counter of nnx.Rngs is an array; under tracing, the time of each call grows with the number of
  calls before it, and a ViT-H took 15 s to build.
  """

  def __init__(self, key: jax.Array):
    self.key, self.used = key, 0

  def params(self) -> jax.Array:
    self.used += 1
    return jax.random.fold_in(self.key, self.used)


def examples_per_group(config: Config, encoder_length: int = 0, decoder_length: int = 0) -> int:
  """Examples of a routing group; the batch must be a multiple of it.

  Args:
    config: T5Config or ViTConfig.
    encoder_length, decoder_length: tokens of an example, for T5.

  Returns:
    The least number of examples that fills whole groups in every stack; 1 for a dense model.

  Raises:
    ConfigError: a group_size that is not a multiple of its stack's tokens per example; no length
      for a stack with a group_size.
  """
  stacks = config.stacks(encoder_length, decoder_length).values()
  return math.lcm(*(stack.moe.examples_per_group(stack.tokens, f'model.{stack.moe_key}')
                    for stack in stacks if stack.sparse))
