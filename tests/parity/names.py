"""Maps Hugging Face weights to leaves of moejax's tree, and their layouts.

It shares no code with the checkpoint converters, so that parity can contradict them.
"""

import re

import numpy as np


def _conv(w):
  return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])            # (D, C, P, P) -> (P*P*C, D)


# (pattern of a name, path, layout); torch Linear is (out, in).
T5 = (
    (r'shared\.weight', 'token_embed/embedding', np.asarray),
    (r'lm_head\.weight', 'head/kernel', np.transpose),
    (r'(encoder|decoder)\.final_layer_norm\.weight', r'\1/final_norm/scale', np.asarray),
    (r'(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight',
     r'\1/relative_bias/embedding', np.asarray),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight',
     r'\1/layers/\2/attention/\3/kernel', np.transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.0\.layer_norm\.weight',
     r'\1/layers/\2/attention_norm/scale', np.asarray),
    (r'decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.([qkvo])\.weight',
     r'decoder/layers/\1/cross_attention/\2/kernel', np.transpose),
    (r'decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'decoder/layers/\1/cross_attention_norm/scale', np.asarray),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_0\.weight',
     r'\1/layers/\2/mlp/wi_gate', np.transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wi_1\.weight',
     r'\1/layers/\2/mlp/wi_up', np.transpose),
    (r'(encoder|decoder)\.block\.(\d+)\.layer\.[12]\.DenseReluDense\.wo\.weight',
     r'\1/layers/\2/mlp/wo', np.transpose),
    (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'encoder/layers/\1/mlp_norm/scale', np.asarray),
    (r'decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight',
     r'decoder/layers/\1/mlp_norm/scale', np.asarray),
)

VIT = (
    (r'vit\.embeddings\.cls_token', 'cls', np.squeeze),
    (r'vit\.embeddings\.position_embeddings', 'position_embed/embedding', np.squeeze),
    (r'vit\.embeddings\.patch_embeddings\.projection\.weight', 'patch_embed/kernel', _conv),
    (r'vit\.embeddings\.patch_embeddings\.projection\.bias', 'patch_embed/bias', np.asarray),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.weight',
     r'encoder/layers/\1/attention/\2/kernel', np.transpose),
    (r'vit\.layers\.(\d+)\.attention\.([qkvo])_proj\.bias',
     r'encoder/layers/\1/attention/\2/bias', np.asarray),
    (r'vit\.layers\.(\d+)\.layernorm_before\.weight',
     r'encoder/layers/\1/attention_norm/scale', np.asarray),
    (r'vit\.layers\.(\d+)\.layernorm_before\.bias',
     r'encoder/layers/\1/attention_norm/bias', np.asarray),
    (r'vit\.layers\.(\d+)\.layernorm_after\.weight',
     r'encoder/layers/\1/mlp_norm/scale', np.asarray),
    (r'vit\.layers\.(\d+)\.layernorm_after\.bias', r'encoder/layers/\1/mlp_norm/bias', np.asarray),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.weight', r'encoder/layers/\1/mlp/wi', np.transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc1\.bias', r'encoder/layers/\1/mlp/wi_bias', np.asarray),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.weight', r'encoder/layers/\1/mlp/wo', np.transpose),
    (r'vit\.layers\.(\d+)\.mlp\.fc2\.bias', r'encoder/layers/\1/mlp/wo_bias', np.asarray),
    (r'vit\.layernorm\.weight', 'encoder/final_norm/scale', np.asarray),
    (r'vit\.layernorm\.bias', 'encoder/final_norm/bias', np.asarray),
    (r'classifier\.weight', 'head/kernel', np.transpose),
    (r'classifier\.bias', 'head/bias', np.asarray),
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
