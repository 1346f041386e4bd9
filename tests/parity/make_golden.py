"""Golden arrays from Hugging Face transformers (torch), in float64.

  python -m tests.parity.make_golden           writes t5.npz, vit.npz and buckets.npz beside it
  python -m tests.parity.make_golden --check   computes them again, compares them with the
                                               committed ones, and moejax with torch in every
                                               gradient

Weights are random, scaled so that every pre-activation is O(1): at initial scale a wrong GELU would
be invisible. They are drawn in float16, which float64 holds exactly, to keep the files small.
"""

import argparse
import contextlib
import re
import sys

import numpy as np
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from tests.parity import compare

# Gradients kept in the files: one of each kind of weight, of different layers.
KEPT = {
    't5': ('shared.weight', 'lm_head.weight',
           'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
           'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
           'encoder.block.0.layer.0.SelfAttention.q.weight',
           'encoder.block.1.layer.1.DenseReluDense.wi_0.weight',
           'encoder.block.0.layer.1.layer_norm.weight', 'encoder.final_layer_norm.weight',
           'decoder.block.0.layer.1.EncDecAttention.k.weight',
           'decoder.block.1.layer.0.SelfAttention.o.weight',
           'decoder.block.1.layer.1.layer_norm.weight',
           'decoder.block.2.layer.2.DenseReluDense.wo.weight'),
    'vit': ('vit.embeddings.cls_token', 'vit.embeddings.position_embeddings',
            'vit.embeddings.patch_embeddings.projection.weight',
            'vit.layers.0.attention.q_proj.weight', 'vit.layers.1.attention.k_proj.weight',
            'vit.layers.0.attention.o_proj.bias', 'vit.layers.1.attention.v_proj.bias',
            'vit.layers.0.mlp.fc1.weight', 'vit.layers.0.mlp.fc1.bias',
            'vit.layers.1.mlp.fc2.weight', 'vit.layers.1.mlp.fc2.bias',
            'vit.layers.0.layernorm_before.weight', 'vit.layers.1.layernorm_after.bias',
            'vit.layernorm.weight', 'classifier.weight', 'classifier.bias'),
}
DISTANCES = np.arange(-600, 601)


@contextlib.contextmanager
def float64_throughout():
  """A context in which transformers' casts to float32 (norms, softmax) keep float64."""
  to, softmax = torch.Tensor.to, torch.nn.functional.softmax
  widen = lambda x: torch.float64 if x is torch.float32 else x
  torch.Tensor.to = lambda self, *a, **k: to(
      self, *map(widen, a), **{n: widen(v) for n, v in k.items()})
  torch.nn.functional.softmax = lambda x, *a, **k: softmax(
      x, *a, **{n: widen(v) for n, v in k.items()})
  try:
    yield
  finally:
    torch.Tensor.to, torch.nn.functional.softmax = to, softmax


def draw(rng, name: str, shape) -> np.ndarray:
  """A random weight in float16, of the scale that keeps activations O(1)."""
  z = rng.standard_normal(shape)
  if 'norm' in name and name.endswith('weight'):
    z = 1 + 0.3 * z
  elif name.endswith('bias'):
    z = 0.5 * z
  elif 'projection' in name or not re.search('embed|shared|relative', name):
    z = z * np.prod(shape[1:]) ** -0.5                              # torch has (out, in, ...)
  return (0.6 * z if '.q.' in name else z).astype(np.float16)       # T5 does not scale its logits


def load_weights(model, rng) -> dict[str, np.ndarray]:
  """Gives the model random weights in float64; {name: float16 array} of its distinct parameters."""
  model.double().eval()
  weights = {}
  for name, parameter in model.named_parameters():
    weights[name] = draw(rng, name, tuple(parameter.shape))
    parameter.data = torch.from_numpy(weights[name].astype(np.float64))
  return weights


def finish(weights, model, inputs, logits, loss) -> dict[str, np.ndarray]:
  """The arrays of a case, with the gradients of all parameters."""
  loss.backward()
  case = {f'input/{k}': v for k, v in inputs.items()}
  case |= {f'weight/{k}': v for k, v in weights.items()}
  case |= {f'grad/{k}': p.grad.numpy() for k, p in model.named_parameters()}
  assert all(v.dtype == np.float64 for k, v in case.items() if k.startswith('grad/'))
  return case | {'logits': logits.detach().numpy()}


def make_t5() -> dict[str, np.ndarray]:
  """A T5 v1.1 case: padded inputs and targets, distances past the last bucket."""
  c, rng = compare.T5_CONFIG, np.random.default_rng(1)
  model = transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=c.vocab_size, d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_heads=c.num_heads,
      num_layers=c.encoder_layers, num_decoder_layers=c.decoder_layers,
      relative_attention_num_buckets=c.relative_buckets,
      relative_attention_max_distance=c.relative_max_distance, layer_norm_epsilon=1e-6,
      dropout_rate=0.0, feed_forward_proj='gated-gelu', tie_word_embeddings=False,
      attn_implementation='eager'))
  # transformers 5 ties the head whatever the config says; v1.1 has its own, and unscaled outputs.
  model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
  assert not model.config.scale_decoder_outputs and model.config.dense_act_fn == 'gelu_new'
  weights = load_weights(model, rng)
  assert 'lm_head.weight' in weights and 'shared.weight' in weights

  B, L, M = 3, 40, 25
  ids = lambda n: rng.integers(1, c.vocab_size, (B, n)).astype(np.int32)
  inputs = {'encoder_input': ids(L), 'target': ids(M), 'weight': np.ones((B, M))}
  inputs['encoder_input'][1, 30:] = 0
  inputs['encoder_input'][2, 7:] = 0
  inputs['target'][1, 12:] = 0
  inputs['weight'][1, 12:] = 0
  inputs['decoder_input'] = np.pad(inputs['target'], ((0, 0), (1, 0)))[:, :-1]
  t = {k: torch.from_numpy(v) for k, v in inputs.items()}
  with float64_throughout():
    logits = model(input_ids=t['encoder_input'].long(), decoder_input_ids=t['decoder_input'].long(),
                   attention_mask=(t['encoder_input'] != 0).long()).logits
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), t['target'].long(), reduction='none')
    return finish(weights, model, inputs, logits, (nll * t['weight']).sum() / t['weight'].sum())


def make_vit() -> dict[str, np.ndarray]:
  """A ViT case with Hugging Face's own choices: erf GELU, eps 1e-12, [cls] head."""
  c, rng = compare.VIT_CONFIG, np.random.default_rng(2)
  model = transformers.ViTForImageClassification(transformers.ViTConfig(
      hidden_size=c.d_model, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
      intermediate_size=c.d_ff, hidden_act='gelu', layer_norm_eps=c.norm_eps,
      image_size=c.image_size, patch_size=c.patch_size, num_channels=c.channels,
      num_labels=c.num_classes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
      attn_implementation='eager'))
  weights = load_weights(model, rng)
  image = rng.standard_normal((4, c.image_size, c.image_size, c.channels)).astype(np.float16)
  inputs = {'image': image, 'label': np.array([0, 6, 3, 3], np.int32),
            'weight': np.array([1.0, 1.0, 0.5, 1.0])}
  t = {k: torch.from_numpy(v) for k, v in inputs.items()}
  with float64_throughout():
    logits = model(pixel_values=t['image'].double().permute(0, 3, 1, 2)).logits
    nll = torch.nn.functional.cross_entropy(logits, t['label'].long(), reduction='none')
    return finish(weights, model, inputs, logits, (nll * t['weight']).sum() / t['weight'].sum())


def make_buckets() -> dict[str, np.ndarray]:
  """Hugging Face's bucket of every distance, in float32 as published models use it."""
  bucket = lambda both, n, far: T5Attention._relative_position_bucket(
      torch.from_numpy(DISTANCES), bidirectional=both, num_buckets=n, max_distance=far)
  return {'distance': DISTANCES} | {
      f'{n}/{far}/{"encoder" if both else "decoder"}': bucket(both, n, far).numpy().astype(np.int16)
      for n, far in ((32, 128), (8, 16), (64, 256)) for both in (True, False)}


def check(name: str, fresh: dict) -> list[str]:
  """Differences between a fresh case and the committed one, and moejax; [] if there are none."""
  committed = compare.load(name)
  problems = []
  for key, value in committed.items():
    drift = np.abs(value - fresh[key]).max() / max(np.abs(value).max(), 1e-300)
    if drift > 1e-12:
      problems.append(f'{name}: committed {key} is off by {drift:.1e}')
  if name in compare.CASES:
    errors = compare.errors(name, fresh)
    worst = max(errors, key=errors.get)
    print(f'{name}: {len(errors)} arrays, worst {worst} {errors[worst]:.1e}')
    problems += [f'{name}: {k} is off by {v:.1e}' for k, v in errors.items()
                 if not v < compare.TOLERANCE]
  return problems


def main():
  parser = argparse.ArgumentParser(description='Golden arrays from Hugging Face transformers.')
  parser.add_argument('--check', action='store_true', help='compare instead of writing')
  args = parser.parse_args()
  print(f'torch {torch.__version__}, transformers {transformers.__version__}')
  problems = []
  for name, make in {'t5': make_t5, 'vit': make_vit, 'buckets': make_buckets}.items():
    case = make()
    if args.check:
      problems += check(name, case)
      continue
    keep = {k: v for k, v in case.items()
            if not k.startswith('grad/') or k.removeprefix('grad/') in KEPT[name]}
    np.savez_compressed(compare.FOLDER / f'{name}.npz', **keep)
  print('\n'.join(problems) or ('parity holds' if args.check else f'written to {compare.FOLDER}'))
  sys.exit(bool(problems))


if __name__ == '__main__':
  main()
