"""Turns sums into named means, and writes them to JSON-lines files.

`metrics.jsonl` holds what a rerun must reproduce bit for bit, hence no time; `timing.jsonl` holds
the seconds. Both are cut back to the restored step on resume.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moejax import trees
from moejax.config import fail

# Sums of a layer that are counted per real token, where it has them.
PER_TOKEN = ('unchosen', 'single', 'entropy', 'z', 'balance', 'importance', 'smooth_load')
# Sums of a layer that are counted per step, and of a train window as a whole.
PER_STEP = ('router_grad_norm', 'router_bias_max')
OF_WINDOW = ('objective', 'task_objective', 'aux_loss', 'grad_norm')


def summarize(sums: Mapping[str, Any]) -> dict[str, float]:
  """Turns the sums of a train window or of an evaluation into named means.

  Args:
    sums: nested; 'loss', 'correct', 'weight'; with a teacher 'teacher_agreement', 'teacher_kl';
      train windows also 'steps', 'objective', 'task_objective', 'aux_loss', 'grad_norm' (each
      summed over steps); 'layers' nests one dict per MoE layer (see MoELayer), in train windows
      with 'router_grad_norm', 'router_bias_max' summed over steps.

  Returns:
    'loss' is plain cross-entropy, whatever the objective is; 'task_objective' the objective without
    auxiliary losses. Per MoE layer, under 'moe/<layer>/':
    load_max_over_mean (of filled slots), dropped (fraction of assignments), unchosen and single
    (fractions of real tokens), entropy (nats), dead_experts (number without any token), z,
    experts_per_token (chosen by the token; for expert choice received).
    Token choice: max_violation, (max - mean) / mean of the assignments to each expert, before any
    is dropped, in the whole window or pass (MaxVio of Wang et al. 2024), and balance.
    With such a loss: importance and smooth_load (squared coefficients of variation).
    Train windows: router_grad_norm, router_bias_max (largest magnitude).
  """
  flat = {k: np.asarray(v, np.float64) for k, v in trees.flatten(sums).items()}
  out = {'loss': flat['loss'] / flat['weight'], 'accuracy': flat['correct'] / flat['weight']}
  out |= {name: flat[name] / flat['weight'] for name in ('teacher_agreement', 'teacher_kl')
          if name in flat}
  steps = flat.get('steps')
  out |= {name: flat[name] / steps for name in OF_WINDOW if name in flat}
  for path in flat:
    if not path.endswith('/tokens'):
      continue
    layer = path.removesuffix('tokens')
    name = 'moe/' + layer.removeprefix('layers/').replace('/layers/', '/')
    tokens, load = max(flat[path], 1.0), flat[layer + 'load']
    out |= {
        name + 'load_max_over_mean': load.max() / max(load.mean(), 1e-9),
        name + 'dead_experts': (load == 0).sum(),
        name + 'dropped': flat[layer + 'dropped'] / max(flat[layer + 'assigned'], 1.0),
        name + 'experts_per_token': flat[layer + 'assigned'] / tokens,
    }
    if layer + 'asked' in flat:
      asked = flat[layer + 'asked']
      out[name + 'max_violation'] = (asked.max() - asked.mean()) / max(asked.mean(), 1e-9)
    out |= {name + k: flat[layer + k] / tokens for k in PER_TOKEN if layer + k in flat}
    out |= {name + k: flat[layer + k] / steps for k in PER_STEP if layer + k in flat}
  return {k: float(v) for k, v in out.items()}


class JsonLines:
  """A file of one JSON object a line, each with a 'step'; durable line by line."""

  def __init__(self, path: os.PathLike | str, resume_at: int):
    """Opens for appending after dropping lines past step `resume_at` (and any torn last line)."""
    self.path = pathlib.Path(path)
    kept = [line for line in read_lines(self.path) if line['step'] <= resume_at]
    temporary = self.path.with_suffix('.tmp')
    with temporary.open('w') as file:
      file.writelines(json.dumps(line) + '\n' for line in kept)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(self.path)
    self._file = self.path.open('a')

  def write(self, step: int, **values) -> None:
    """Appends one line and forces it to disk before returning."""
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def read_lines(path: os.PathLike | str) -> list[dict]:
  """Returns the objects of a JSON-lines file, [] if there is none, without a torn last line.

  Raises ConfigError: another line is damaged.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], 1):   # the last one is torn
    try:
      lines += [json.loads(line)] if line else []
    except ValueError as error:   # no JSON, or not even text
      fail(str(path), f'line {number}', 'a JSON object a line',
           f'It is damaged: {error}. Delete that line, or make the file again.')
  return lines


# The metrics people look at first.
HEADLINE = ('loss', 'accuracy', 'exact_match', 'phoneme_error_rate', 'word_error_rate')


def headline(values: Mapping[str, float]) -> str:
  """Returns 'loss 1.2345, accuracy 0.6789' of metrics, or all means of a probe."""
  chosen = [k for k in HEADLINE if k in values] or [k for k in values if not k.endswith('_std')]
  return ', '.join(f'{k} {values[k]:.4f}' for k in chosen)


def last_evaluation(workdir: os.PathLike | str) -> str:
  """Returns 'validation loss 1.2345, accuracy 0.6789; test ...', the last of each split."""
  last = {}
  for line in read_lines(pathlib.Path(workdir) / 'metrics.jsonl'):
    for split in {k.split('/')[0] for k in line if k != 'step'} - {'train'}:
      last[split] = {k.removeprefix(f'{split}/'): v for k, v in line.items()
                     if k.startswith(f'{split}/')}
  return '; '.join(f'{split} {headline(values)}' for split, values in last.items())
