"""T5 v1.1: encoder-decoder with relative positions, RMSNorm and gated GELU (Raffel et al. 2020).

v1.1 differs from the paper's T5 in the gated MLP (Shazeer 2020) and the untied head. Attention
logits are not scaled, nothing has a bias, and dropout comes after the embedding, on attention
probabilities, on hidden MLP activations, on sublayer outputs and after the final norms.

Dimensions: B batch, L length (queries), M length (keys), D model, H heads, K head width,
V vocabulary.
"""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import nn
from moejax.config import check, check_choice
from moejax.models import layers
from moejax.models.attention import AttentionSpec, RelativeBias
from moejax.models.blocks import BlockSpec, Context, Stack, StackInfo
from moejax.models.scan import UNROLLED, Execution
from moejax.moe.config import CAUSAL, MoEConfig

PAD, EOS = 0, 1   # PAD also starts every decoder input
NORM_EPS = 1e-6
DTYPES = ('float32', 'bfloat16', 'float64')


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Sizes of a T5 v1.1; the defaults are the mini size.

  Attributes:
    vocab_size: V; id 0 is padding.
    d_model, d_ff: D, and hidden units of the MLP.
    d_kv, num_heads: K and H; their product need not be D.
    encoder_layers, decoder_layers: blocks of each stack.
    activation: of the gated MLP; v1.1's is 'gelu_tanh'.
    relative_buckets, relative_max_distance: of the relative position bias.
    dropout_rate: everywhere (see the module's docstring).
    dtype: compute dtype; parameters are float32.
    encoder_moe, decoder_moe: MoE layers of each stack.
  """
  data_kind: ClassVar[str] = 'seq2seq'   # the kind of data it learns from, see data.Source
  image_shape: ClassVar[tuple] = ()      # it reads no images

  family: str = 't5'
  vocab_size: int = 384
  d_model: int = 32
  d_ff: int = 128
  d_kv: int = 16
  num_heads: int = 2
  encoder_layers: int = 2
  decoder_layers: int = 2
  activation: str = 'gelu_tanh'
  relative_buckets: int = 32
  relative_max_distance: int = 128
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  encoder_moe: MoEConfig = MoEConfig()
  decoder_moe: MoEConfig = MoEConfig(router='top_k')

  def __post_init__(self):
    for name in ('vocab_size', 'd_model', 'd_ff', 'd_kv', 'num_heads', 'encoder_layers',
                 'decoder_layers'):
      check(getattr(self, name) >= 1, f'model.{name}', getattr(self, name), '>= 1', 'Raise it.')
    check(self.relative_buckets >= 4 and self.relative_buckets % 4 == 0, 'model.relative_buckets',
          self.relative_buckets, 'a multiple of 4', 'T5 has 32.')
    check(self.relative_max_distance > self.relative_buckets // 2, 'model.relative_max_distance',
          self.relative_max_distance, f'> relative_buckets / 2 = {self.relative_buckets // 2}',
          'T5 has 128.')
    check(0 <= self.dropout_rate < 1, 'model.dropout_rate', self.dropout_rate, '[0, 1)',
          '0 turns dropout off.')
    check_choice('model.activation', self.activation, nn.ACTIVATIONS)
    check_choice('model.dtype', self.dtype, DTYPES)
    for stack in ('encoder', 'decoder'):
      if self.sparse_layers(stack):
        getattr(self, f'{stack}_moe').expert_d_ff(self.d_ff, f'model.{stack}_moe')
    if self.sparse_layers('decoder'):
      check(self.decoder_moe.router in CAUSAL, 'model.decoder_moe.router', self.decoder_moe.router,
            ', '.join(CAUSAL), "A token's experts depend on the tokens after it: it cannot decode.")
      check(not self.decoder_moe.batch_priority, 'model.decoder_moe.batch_priority', True, 'False',
            'A token would be dropped because of the tokens after it.')

  def sparse_layers(self, stack: str) -> dict[int, int]:
    """{block number: number of experts} of the 'encoder' or the 'decoder'."""
    moe, depth = getattr(self, f'{stack}_moe'), getattr(self, f'{stack}_layers')
    return moe.sparse_layers(depth, f'model.{stack}_moe')

  def stacks(self, encoder_length: int = 0, decoder_length: int = 0) -> dict[str, StackInfo]:
    """{'encoder': StackInfo, 'decoder': StackInfo}, given the tokens of an example in each."""
    tokens = {'encoder': encoder_length, 'decoder': decoder_length}
    return {name: StackInfo(
        f'{name}_moe', f'{name}_layers', getattr(self, f'{name}_moe'),
        getattr(self, f'{name}_layers'), self.sparse_layers(name), length,
        encoder_length if name == 'decoder' else 0, self.num_heads * self.d_kv, mlp_matrices=3,
        biased=True) for name, length in tokens.items()}

  def outer_matmuls(self, decoder_length: int = 0) -> list[tuple[int, int, int]]:
    """[(tokens of an example, d_in, d_out)] of the matmuls outside the stacks: the head's."""
    return [(decoder_length, self.d_model, self.vocab_size)]

  def batch_shapes(self, batch_size: int, encoder_length: int = 0, decoder_length: int = 0
                   ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a training batch, whose fields data.Dataset describes."""
    make = lambda dtype, *dims: jax.ShapeDtypeStruct((batch_size, *dims), dtype)
    return {'encoder_input': make(jnp.int32, encoder_length),
            'decoder_input': make(jnp.int32, decoder_length),
            'target': make(jnp.int32, decoder_length),
            'weight': make(jnp.float32, decoder_length), 'index': make(jnp.int32)}

  @property
  def outputs(self) -> tuple[str, int]:
    """(the field that sets how many logits there are, that number)."""
    return 'vocab_size', self.vocab_size


def _size(d_model, d_ff, num_heads, depth, d_kv=64, vocab_size=32128) -> dict:
  return dict(d_model=d_model, d_ff=d_ff, num_heads=num_heads, encoder_layers=depth,
              decoder_layers=depth, d_kv=d_kv, vocab_size=vocab_size)


SIZES = {
    'tiny': _size(16, 32, 2, 2, d_kv=8, vocab_size=64),
    'mini': _size(32, 128, 2, 2, d_kv=16, vocab_size=384),
    'mini_wide': _size(64, 256, 4, 4, d_kv=16, vocab_size=384),
    'small': _size(512, 1024, 6, 8),
    'base': _size(768, 2048, 12, 12),
    'large': _size(1024, 2816, 16, 24),
    'xl': _size(2048, 5120, 32, 24),
    'xxl': _size(4096, 10240, 64, 24),
}


def config(size: str, **changes) -> T5Config:
  """T5Config of a named size, with fields replaced. An unknown size is a ConfigError."""
  check_choice('model size', size, SIZES)
  return T5Config(**(SIZES[size] | changes))


class Encoded(NamedTuple):
  """The encoded sources, as decoding reads them.

  Attributes:
    source: {'00': (keys, values)}, each (B, M, H, K), for cross-attention in each decoder block.
    mask: (B, 1, 1, M) bool, False at padding.
  """
  source: dict
  mask: jax.Array


def init_cache(encoded: Encoded, length: int) -> dict:
  """The cache of T5.decode_step before its first step.

  Returns:
    {'00': (keys, values)}, each (B, length, H, K) zeros of the compute dtype.
  """
  empty = lambda x: jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)
  return jax.tree.map(empty, encoded.source)


class T5(nnx.Module):
  """Parameters token_embed, encoder, decoder, head."""

  def __init__(self, config: T5Config, execution: Execution = UNROLLED, *, rngs: nnx.Rngs):
    self.dtype = jnp.dtype(config.dtype)
    self.dropout_rate = config.dropout_rate
    self.token_embed = layers.Embed(
        config.vocab_size, config.d_model, init=nn.normal(1.0), rngs=rngs)
    self.encoder = _stack(config, 'encoder', execution, rngs)
    self.decoder = _stack(config, 'decoder', execution, rngs)
    self.head = layers.Dense(config.d_model, config.vocab_size, bias=False,
                             init=nn.fan_in_normal(), rngs=rngs)

  def __call__(self, batch: dict, *, train: bool, keys: jax.Array | None) -> tuple[jax.Array, dict]:
    """Logits of each target given the input and the targets before it.

    Args:
      batch: 'encoder_input' (B, M), 'decoder_input' (B, L) int ids, and 'weight' (B, L), 0 where
        the target does not count; routers treat these positions as padding.
      train: chooses the routers' capacity factor.
      keys: (B,) jax keys, one per example; None: no dropout.

    Returns:
      logits (B, L, V), at least float32, and {'encoder/layers/01': aux of that MoE layer}.
    """
    encoder_keys, encoded_keys, decoder_keys, decoded_keys = nn.split_keys(keys, 4)
    ids = batch['encoder_input']
    # One look-up for both stacks: its gradient, a scatter and a sum over devices, is expensive.
    x = self.token_embed(jnp.concatenate([ids, batch['decoder_input']], axis=1), self.dtype)
    encoded, source_mask, encoder_aux = self._encode(
        x[:, :ids.shape[1]], ids != PAD, train, encoder_keys, encoded_keys)
    with jax.named_scope('decoder'):
      x = x[:, ids.shape[1]:]
      causal = jnp.tri(x.shape[1], dtype=bool)                       # (L, L)
      context = Context(train, batch['weight'] > 0, causal, source=encoded, source_mask=source_mask)
      x, decoder_aux = self.decoder(x, context, decoder_keys)
      x = nn.dropout(x, self.dropout_rate, decoded_keys)
    logits = self._logits(x)
    aux = {f'encoder/{path}': value for path, value in encoder_aux.items()}
    return logits, aux | {f'decoder/{path}': value for path, value in decoder_aux.items()}

  def encode(self, batch: dict) -> Encoded:
    """Runs the encoder on 'encoder_input' (B, M), as in evaluation."""
    ids = batch['encoder_input']
    x = self.token_embed(ids, self.dtype)
    x, mask, _ = self._encode(x, ids != PAD, False, None, None)
    with jax.named_scope('decoder'):
      return Encoded(self.decoder.project(x), mask)

  def decode_step(self, encoded: Encoded, cache: dict, ids: jax.Array,
                  position: jax.Array) -> tuple[jax.Array, dict]:
    """Logits at one position of each sequence: those of __call__ if no MoE layer drops tokens.

    Args:
      encoded: the encoded sources.
      cache: keys and values of the tokens at 0 to position - 1.
      ids: (B,) int, the decoder's input at `position`.
      position: int scalar in [0, length of the cache).

    Returns:
      logits (B, V) of the next token, at least float32, and the cache with `position` filled in.
    """
    with jax.named_scope('decoder'):
      x = self.token_embed(ids[:, None], self.dtype)                 # (B, 1, D)
      context = Context(False, jnp.ones(x.shape[:2], bool), source_mask=encoded.mask,
                        position=position)
      x, cache = self.decoder.step(x, cache, encoded.source, context)
    return self._logits(x)[:, 0], cache

  def _encode(self, x, real, train, keys, output_keys) -> tuple[jax.Array, jax.Array, dict]:
    """Embeddings (B, M, D), real tokens (B, M) -> encoded (B, M, D), mask (B, 1, 1, M), aux."""
    mask = real[:, None, None, :]
    with jax.named_scope('encoder'):
      x, aux = self.encoder(x, Context(train, real, mask), keys)
      return nn.dropout(x, self.dropout_rate, output_keys), mask, aux

  def _logits(self, x: jax.Array) -> jax.Array:
    with jax.named_scope('head'):
      return self.head(x, nn.at_least_float32(self.dtype))


def _stack(config: T5Config, name: str, execution: Execution, rngs: nnx.Rngs) -> Stack:
  """The encoder or the decoder of a T5."""
  D, rate, init = config.d_model, config.dropout_rate, nn.fan_in_normal()
  spec = BlockSpec(
      norm=functools.partial(layers.RMSNorm, D, eps=NORM_EPS),
      attention=AttentionSpec(
          D, config.num_heads, config.d_kv, bias=False, scaled=False, init=init,
          # Logits are not scaled by 1 / sqrt(d_kv): the initial queries are.
          q_init=nn.fan_in_normal(1 / config.d_kv), dropout_rate=rate),
      mlp=nn.MLPSpec(D, config.d_ff, gated=True, activation=config.activation, bias=False,
                     init=init, dropout_rate=rate),
      dropout_rate=rate, cross_attention=name == 'decoder')
  bias = RelativeBias(config.relative_buckets, config.relative_max_distance, config.num_heads,
                      bidirectional=name == 'encoder', rngs=rngs)
  return Stack(spec, getattr(config, f'{name}_layers'), getattr(config, f'{name}_moe'),
               config.sparse_layers(name), bias, execution, rngs=rngs)
