"""Vision Transformer (Dosovitskiy et al. 2021), with a head on the mean token or on [cls].

Dimensions: B batch, L tokens (patches, and [cls] if any), D model, P patch side, C channels.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import nn
from moejax.config import check, check_choice
from moejax.models import layers
from moejax.models.attention import AttentionSpec
from moejax.models.blocks import BlockSpec, Context, Stack, StackInfo
from moejax.models.scan import UNROLLED, Execution
from moejax.models.t5 import DTYPES
from moejax.moe.config import MoEConfig

HEADS = ('gap', 'cls')


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Sizes of a ViT; the defaults are the mini size.

  Attributes:
    image_size, channels, patch_size: square images, cut into square patches.
    num_classes: width of the head.
    d_model, d_ff, num_heads, num_layers: D, hidden units of the MLP, heads (each D / num_heads
      wide), blocks.
    head: 'gap' averages the tokens, 'cls' reads an extra first token.
    activation: 'gelu_tanh' (big_vision, vmoe) or 'gelu_erf' (Hugging Face).
    norm_eps: of every LayerNorm; 1e-6 in big_vision and vmoe, 1e-12 in Hugging Face.
    dropout_rate: after the position embedding, of MLP hidden activations and of sublayer outputs.
    dtype: compute dtype; parameters are float32.
    moe: MoE layers.
  """
  data_kind: ClassVar[str] = 'classification'   # the kind of data it learns from, see data.Source

  family: str = 'vit'
  image_size: int = 24
  channels: int = 1
  patch_size: int = 6
  num_classes: int = 10
  d_model: int = 32
  d_ff: int = 64
  num_heads: int = 2
  num_layers: int = 4
  head: str = 'gap'
  activation: str = 'gelu_tanh'
  norm_eps: float = 1e-6
  dropout_rate: float = 0.0
  dtype: str = 'float32'
  moe: MoEConfig = MoEConfig()

  def __post_init__(self):
    for name in ('image_size', 'channels', 'patch_size', 'num_classes', 'd_model', 'd_ff',
                 'num_heads', 'num_layers'):
      check(getattr(self, name) >= 1, f'model.{name}', getattr(self, name), '>= 1', 'Raise it.')
    check(self.image_size % self.patch_size == 0, 'model.patch_size', self.patch_size,
          f'a divisor of model.image_size = {self.image_size}', 'Patches must fill the image.')
    check(self.d_model % self.num_heads == 0, 'model.num_heads', self.num_heads,
          f'a divisor of model.d_model = {self.d_model}', 'Heads share the width equally.')
    check_choice('model.head', self.head, HEADS)
    check_choice('model.activation', self.activation, nn.ACTIVATIONS)
    check(self.norm_eps > 0, 'model.norm_eps', self.norm_eps, '> 0', 'Usual: 1e-6 or 1e-12.')
    check(0 <= self.dropout_rate < 1, 'model.dropout_rate', self.dropout_rate, '[0, 1)',
          '0 turns dropout off.')
    check_choice('model.dtype', self.dtype, DTYPES)
    if self.sparse_layers():
      self.moe.expert_d_ff(self.d_ff, 'model.moe')

  def sparse_layers(self) -> dict[int, int]:
    """{block number: number of experts}."""
    return self.moe.sparse_layers(self.num_layers, 'model.moe')

  def stacks(self, encoder_length: int = 0, decoder_length: int = 0) -> dict[str, StackInfo]:
    """{'encoder': StackInfo}; the lengths are those of a T5 and are not read."""
    del encoder_length, decoder_length
    return {'encoder': StackInfo('moe', 'num_layers', self.moe, self.num_layers,
                                 self.sparse_layers(), self.num_tokens, 0, self.d_model,
                                 mlp_matrices=2, biased=False)}

  def outer_matmuls(self, decoder_length: int = 0) -> list[tuple[int, int, int]]:
    """[(tokens of an example, d_in, d_out)] of the patch embedding's and the head's matmul."""
    del decoder_length
    patches, pixels = (self.image_size // self.patch_size) ** 2, self.patch_size ** 2
    return [(patches, pixels * self.channels, self.d_model), (1, self.d_model, self.num_classes)]

  def batch_shapes(self, batch_size: int, encoder_length: int = 0, decoder_length: int = 0
                   ) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a training batch, whose fields data.Dataset describes."""
    del encoder_length, decoder_length
    make = lambda dtype, *dims: jax.ShapeDtypeStruct((batch_size, *dims), dtype)
    return {'image': make(jnp.float32, *self.image_shape), 'label': make(jnp.int32),
            'weight': make(jnp.float32), 'index': make(jnp.int32)}

  @property
  def image_shape(self) -> tuple[int, ...]:
    """(height, width, channels) of the input; other families, which read no images, have ()."""
    return (self.image_size, self.image_size, self.channels)

  @property
  def outputs(self) -> tuple[str, int]:
    """(the field that sets how many logits there are, that number)."""
    return 'num_classes', self.num_classes

  @property
  def num_tokens(self) -> int:
    """L: patches of an image, and [cls] if there is one."""
    return (self.image_size // self.patch_size) ** 2 + (self.head == 'cls')


def _size(d_model, d_ff, num_heads, num_layers, patch_size) -> dict:
  return dict(d_model=d_model, d_ff=d_ff, num_heads=num_heads, num_layers=num_layers,
              patch_size=patch_size, image_size=224, channels=3, num_classes=1000)


SIZES = {
    'tiny': dict(d_model=16, d_ff=32, num_heads=2, num_layers=2, patch_size=4, image_size=8,
                 channels=1, num_classes=10),
    'mini': dict(d_model=32, d_ff=64, num_heads=2, num_layers=4, patch_size=6, image_size=24,
                 channels=1, num_classes=10),
    'S/32': _size(384, 1536, 6, 12, 32),
    'S/16': _size(384, 1536, 6, 12, 16),
    'B/32': _size(768, 3072, 12, 12, 32),
    'B/16': _size(768, 3072, 12, 12, 16),
    'L/32': _size(1024, 4096, 16, 24, 32),
    'L/16': _size(1024, 4096, 16, 24, 16),
    'H/14': _size(1280, 5120, 16, 32, 14),
}


def config(size: str, **changes) -> ViTConfig:
  """ViTConfig of a named size, with fields replaced. An unknown size is a ConfigError."""
  check_choice('model size', size, SIZES)
  return ViTConfig(**(SIZES[size] | changes))


class ViT(nnx.Module):
  """Parameters patch_embed, position_embed, cls (if head is 'cls'), encoder, head."""

  def __init__(self, config: ViTConfig, execution: Execution = UNROLLED, *, rngs: nnx.Rngs):
    D = config.d_model
    self.dtype = jnp.dtype(config.dtype)
    self.patch_size = config.patch_size
    self.pool = config.head
    self.patch_embed = layers.Dense(config.patch_size**2 * config.channels, D, bias=True,
                                    init=nn.fan_in_normal(), rngs=rngs)
    if self.pool == 'cls':
      self.cls = nn.param(nn.zeros, (D,), rngs)
    self.position_embed = layers.Embed(config.num_tokens, D, init=nn.normal(D**-0.5), rngs=rngs)
    init = nn.xavier_uniform
    spec = BlockSpec(
        norm=functools.partial(layers.LayerNorm, D, eps=config.norm_eps),
        attention=AttentionSpec(
            D, config.num_heads, D // config.num_heads, bias=True, scaled=True, init=init,
            q_init=init, fused=execution.attention == 'fused'),
        mlp=nn.MLPSpec(D, config.d_ff, gated=False, activation=config.activation, bias=True,
                       init=init, dropout_rate=config.dropout_rate),
        dropout_rate=config.dropout_rate)
    self.encoder = Stack(spec, config.num_layers, config.moe, config.sparse_layers(),
                         execution=execution, rngs=rngs)
    self.head = layers.Dense(D, config.num_classes, bias=True, init=nn.fan_in_normal(), rngs=rngs)

  def __call__(self, batch: dict, *, train: bool, keys: jax.Array | None) -> tuple[jax.Array, dict]:
    """Class logits of images.

    Args:
      batch: 'image' (B, height, width, C), and 'weight' (B,), 0 for filler examples, which routers
        treat as padding.
      train: chooses the routers' capacity factor.
      keys: (B,) jax keys, one per example; None: no dropout.

    Returns:
      logits (B, classes), at least float32, and {'encoder/layers/01': aux of that MoE layer}.
    """
    pooled, aux = self.features(batch, train=train, keys=keys)
    with jax.named_scope('head'):
      return self.head(pooled, nn.at_least_float32(self.dtype)), aux

  def features(self, batch: dict, *, train: bool,
               keys: jax.Array | None) -> tuple[jax.Array, dict]:
    """The head's input, (B, D) in the compute dtype, and aux; arguments as in __call__."""
    with jax.named_scope('patch_embed'):
      x = layers.patches(batch['image'].astype(self.dtype), self.patch_size)
      x = self.patch_embed(x)                                        # (B, L, D)
      B, _, D = x.shape
      if self.pool == 'cls':
        cls = jnp.broadcast_to(self.cls[...].astype(self.dtype), (B, 1, D))
        x = jnp.concatenate([cls, x], axis=1)
      x = x + self.position_embed.embedding[...].astype(self.dtype)
    with jax.named_scope('encoder'):
      real = jnp.broadcast_to(batch['weight'][:, None] > 0, x.shape[:2])
      x, aux = self.encoder(x, Context(train, real), keys)
      pooled = x[:, 0] if self.pool == 'cls' else x.mean(axis=1)     # (B, D)
    return pooled, {f'encoder/{path}': value for path, value in aux.items()}
