"""Maps Hugging Face weights to leaves of moejax's tree, and their layouts.

It shares no code with the checkpoint converters, so that parity can contradict them.
"""

import re

import numpy as np

from moejax import trees


def _keep(w):
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
    (r'shared\.weight', 'token_embed/embedding', _keep),
    (r'lm_head\.weight', 'head/kernel', _transpose),
    (r'(encoder|decoder)\.final_layer_norm\.weight', r'\1/final_norm/scale', _keep),
    (r'(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',
     r'\1/relative_bias/embedding', _keep),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight',
     r'\1/layers/\2/attention/\3/kernel', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.layer_norm\.weight',
     r'\1/layers/\2/attention_norm/scale', _keep),
    (r'decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.([qkvo])\.weight',
     r'decoder/layers/\1/cross_attention/\2/kernel', _transpose),
    (r'decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'decoder/layers/\1/cross_attention_norm/scale', _keep),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_0\.weight',
     r'\1/layers/\2/mlp/wi_gate', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_1\.weight',
     r'\1/layers/\2/mlp/wi_up', _transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wo\.weight',
     r'\1/layers/\2/mlp/wo', _transpose),
    (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'encoder/layers/\1/mlp_norm/scale', _keep),
    (r'decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight',
     r'decoder/layers/\1/mlp_norm/scale', _keep),
)

VIT = (
    (r'vit\.embeddings\.cls_token', 'cls', _first_of_two),
    (r'vit\.embeddings\.position_embeddings', 'position_embed/embedding', _first),
    (r'vit\.embeddings\.patch_embeddings\.projection\.weight', 'patch_embed/kernel', _conv),
    (r'vit\.embeddings\.patch_embeddings\.projection\.bias', 'patch_embed/bias', _keep),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.weight',
     r'encoder/layers/\1/attention/\2/kernel', _transpose),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.bias',
     r'encoder/layers/\1/attention/\2/bias', _keep),
    (r'vit\.layers\.(\d+)\.layernorm_before\.weight',
     r'encoder/layers/\1/attention_norm/scale', _keep),
    (r'vit\.layers\.(\d+)\.layernorm_before\.bias',
     r'encoder/layers/\1/attention_norm/bias', _keep),
    (r'vit\.layers\.(\d+)\.layernorm_after\.weight', r'encoder/layers/\1/mlp_norm/scale', _keep),
    (r'vit\.layers\.(\d+)\.layernorm_after\.bias', r'encoder/layers/\1/mlp_norm/bias', _keep),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.weight', r'encoder/layers/\1/mlp/wi', _transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.bias', r'encoder/layers/\1/mlp/wi_bias', _keep),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.weight', r'encoder/layers/\1/mlp/wo', _transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.bias', r'encoder/layers/\1/mlp/wo_bias', _keep),
    (r'vit\.layernorm\.weight', 'encoder/final_norm/scale', _keep),
    (r'vit\.layernorm\.bias', 'encoder/final_norm/bias', _keep),
    (r'classifier\.weight', 'head/kernel', _transpose),
    (r'classifier\.bias', 'head/bias', _keep),
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
