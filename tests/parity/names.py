"""Which Hugging Face weight is which leaf of moejax's tree, and how its layout changes.

Written apart from the checkpoint converters on purpose: parity has to be able to contradict them.
"""

import re

import numpy as np

from moejax import trees


def _same(w):
  return w


def _transpose(w):
  return w.T                                                        # torch Linear is (out, in)


def _conv(w):
  return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])            # (D, C, P, P) -> (P*P*C, D)


def _first(w):
  return w[0]


def _first_of_two(w):
  return w[0, 0]


T5 = (
    (r'shared\.weight', 'token_embed/embedding', _same),
    (r'lm_head\.weight', 'head/kernel', _transpose),
    (r'(encoder|decoder)\.final_layer_norm\.weight', r'\1/final_norm/scale', _same),
    (r'(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',
     r'\1/relative_bias/embedding', _same),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight',
     r'\1/layers/\2/attention/\3/kernel', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.layer_norm\.weight',
     r'\1/layers/\2/attention_norm/scale', _same),
    (r'decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.([qkvo])\.weight',
     r'decoder/layers/\1/cross_attention/\2/kernel', _transpose),
    (r'decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'decoder/layers/\1/cross_attention_norm/scale', _same),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_0\.weight',
     r'\1/layers/\2/mlp/wi_gate', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_1\.weight',
     r'\1/layers/\2/mlp/wi_up', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wo\.weight',
     r'\1/layers/\2/mlp/wo', _transpose),
    (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'encoder/layers/\1/mlp_norm/scale', _same),
    (r'decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight',
     r'decoder/layers/\1/mlp_norm/scale', _same),
)

VIT = (
    (r'vit\.embeddings\.cls_token', 'cls', _first_of_two),
    (r'vit\.embeddings\.position_embeddings', 'position_embed/embedding', _first),
    (r'vit\.embeddings\.patch_embeddings\.projection\.weight', 'patch_embed/kernel', _conv),
    (r'vit\.embeddings\.patch_embeddings\.projection\.bias', 'patch_embed/bias', _same),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.weight',
     r'encoder/layers/\1/attention/\2/kernel', _transpose),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.bias',
     r'encoder/layers/\1/attention/\2/bias', _same),
    (r'vit\.layers\.(\d+)\.layernorm_before\.weight',
     r'encoder/layers/\1/attention_norm/scale', _same),
    (r'vit\.layers\.(\d+)\.layernorm_before\.bias',
     r'encoder/layers/\1/attention_norm/bias', _same),
    (r'vit\.layers\.(\d+)\.layernorm_after\.weight', r'encoder/layers/\1/mlp_norm/scale', _same),
    (r'vit\.layers\.(\d+)\.layernorm_after\.bias', r'encoder/layers/\1/mlp_norm/bias', _same),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.weight', r'encoder/layers/\1/mlp/wi', _transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.bias', r'encoder/layers/\1/mlp/wi_bias', _same),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.weight', r'encoder/layers/\1/mlp/wo', _transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.bias', r'encoder/layers/\1/mlp/wo_bias', _same),
    (r'vit\.layernorm\.weight', 'encoder/final_norm/scale', _same),
    (r'vit\.layernorm\.bias', 'encoder/final_norm/bias', _same),
    (r'classifier\.weight', 'head/kernel', _transpose),
    (r'classifier\.bias', 'head/bias', _same),
)


def to_moejax(table, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """{Hugging Face name: array} -> {'a/b/c': array} in moejax's layout.

  Raises ValueError on a name that no row of the table, or more than one, matches.
  """
  flat = {}
  for name, array in weights.items():
    rows = [(m, path, layout) for pattern, path, layout in table
            if (m := re.fullmatch(pattern, name))]
    if len(rows) != 1:
      raise ValueError(f'{name}: matched by {len(rows)} rows of the table')
    match, path, layout = rows[0]
    path = re.sub(r'/(\d+)/', lambda n: f'/{int(n.group(1)):02d}/', match.expand(path))
    flat[path] = layout(array)
  return flat


def to_tree(table, weights: dict[str, np.ndarray]) -> dict:
  """`to_moejax` as a nested dict."""
  return trees.unflatten(to_moejax(table, weights))
