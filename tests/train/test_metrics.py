"""Numbers from sums, by hand, and the files of one JSON object a line."""

import json

import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.train import metrics

# 20 real tokens and 4 experts: 40 assignments asked for, 36 placed.
LAYER = {'tokens': np.float32(20), 'load': np.array([18, 12, 6, 0], np.float32), 'assigned': 40.,
         'dropped': 4., 'unchosen': 2., 'single': 5., 'entropy': 10., 'z': 30.}
SPLIT = {'loss': 30., 'correct': 3., 'weight': 12.}


def test_evaluation_by_hand():
  layers = {'encoder': {'layers': {'01': LAYER}}, 'decoder': {'layers': {
      '00': LAYER | {'balance': 22., 'load': np.array([8., 8.]), 'assigned': 16., 'dropped': 0.,
                     'asked': np.array([12., 4.]), 'importance': 5., 'smooth_load': 8.}}}}
  found = metrics.summarize({**SPLIT, 'layers': layers})
  assert all(type(v) is float for v in found.values())
  assert found == pytest.approx({
      'loss': 2.5, 'accuracy': 0.25,
      'moe/encoder/01/load_max_over_mean': 2.0,       # 18 over a mean of 9
      'moe/encoder/01/dead_experts': 1, 'moe/encoder/01/dropped': 0.1,
      'moe/encoder/01/unchosen': 0.1, 'moe/encoder/01/single': 0.25,
      'moe/encoder/01/entropy': 0.5, 'moe/encoder/01/z': 1.5,
      'moe/encoder/01/experts_per_token': 2,
      'moe/decoder/00/load_max_over_mean': 1.0, 'moe/decoder/00/dead_experts': 0,
      'moe/decoder/00/dropped': 0, 'moe/decoder/00/unchosen': 0.1, 'moe/decoder/00/single': 0.25,
      'moe/decoder/00/entropy': 0.5, 'moe/decoder/00/z': 1.5, 'moe/decoder/00/balance': 1.1,
      'moe/decoder/00/experts_per_token': 0.8,        # 16 of 20
      'moe/decoder/00/max_violation': 0.5,            # 12 over a mean of 8, less 1
      'moe/decoder/00/importance': 0.25, 'moe/decoder/00/smooth_load': 0.4})


def test_a_train_window_is_divided_by_its_steps():
  found = metrics.summarize({
      **SPLIT, 'steps': 4., 'objective': 12., 'task_objective': 10., 'aux_loss': 2.,
      'grad_norm': 6., 'teacher_agreement': 9., 'teacher_kl': 6.,
      'layers': {'encoder': {'layers': {
          '01': LAYER | {'router_grad_norm': 10., 'router_bias_max': 0.4}}}}})
  assert (found['objective'], found['aux_loss'], found['grad_norm']) == (3, 0.5, 1.5)
  assert found['task_objective'] == 2.5
  assert (found['teacher_agreement'], found['teacher_kl']) == (0.75, 0.5)   # per target
  assert found['moe/encoder/01/router_grad_norm'] == 2.5
  assert found['moe/encoder/01/router_bias_max'] == pytest.approx(0.1)
  assert found['loss'] == 2.5 and found['moe/encoder/01/entropy'] == 0.5   # per token, not per step


def test_a_layer_that_saw_no_token():
  nothing = {k: np.zeros_like(v) for k, v in LAYER.items()}
  found = metrics.summarize({**SPLIT, 'layers': {'encoder': {'layers': {'01': nothing}}}})
  assert found['moe/encoder/01/dead_experts'] == 4
  assert all(np.isfinite(v) for v in found.values())


def steps(path):
  return [line['step'] for line in metrics.read_lines(path)]


def test_json_lines_are_on_disk_when_write_returns(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = metrics.JsonLines(path, resume_at=-1)
  lines.write(2, **{'train/loss': 0.1})
  lines.write(4, seconds=3)
  assert path.read_text() == '{"step": 2, "train/loss": 0.1}\n{"step": 4, "seconds": 3}\n'
  lines.close()


@pytest.mark.parametrize('resume_at, kept', [
    (-1, []), (0, [0]), (4, [0, 2, 4, 4]), (5, [0, 2, 4, 4]), (9, [0, 2, 4, 4, 6])])
def test_resuming_cuts_off_what_came_after(tmp_path, resume_at, kept):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(json.dumps({'step': s, 'x': 0.1}) + '\n' for s in (0, 2, 4, 4, 6)))
  before = path.read_text().splitlines()
  lines = metrics.JsonLines(path, resume_at)
  assert path.read_text().splitlines() == before[:len(kept)]   # kept ones to the byte
  lines.write(8)
  lines.close()
  assert steps(path) == [*kept, 8]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize('torn', [b'{"step": 4, "tr', b'{"step": 4}', b'{"step": 4, "x\xc3',
                                  bytes(50)])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
  """Without its newline even a line that parses was not finished: its number may lack digits."""
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 2}\n' + torn)
  assert steps(path) == [2]
  lines = metrics.JsonLines(path, resume_at=10)
  lines.write(4)
  lines.close()
  assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize('line', [b'{"step": 4, "x', b'{"step\xff": 4}'])
def test_a_damaged_line_that_is_not_the_last_is_named(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 2}\n' + line + b'\n{"step": 6}\n')
  with pytest.raises(ConfigError, match="metrics.jsonl: got 'line 2', .* damaged: .*Delete that"):
    metrics.read_lines(path)


def test_last_evaluation(tmp_path):
  assert metrics.last_evaluation(tmp_path) == ''
  lines = metrics.JsonLines(tmp_path / 'metrics.jsonl', -1)
  for step, split, loss in ((2, 'train', 9), (2, 'validation', 5), (4, 'train', 8),
                            (4, 'validation', 1.23456), (4, 'test', 2)):
    lines.write(step, **{f'{split}/loss': loss, f'{split}/accuracy': 1 / loss,
                         f'{split}/moe/encoder/01/z': 7})
  lines.write(4, **{'probe/1shot_accuracy': 0.25})
  lines.close()
  assert metrics.last_evaluation(tmp_path) == (
      'validation loss 1.2346, accuracy 0.8100; test loss 2.0000, accuracy 0.5000; '
      'probe 1shot_accuracy 0.2500')


def test_headline_is_the_task_and_what_was_decoded_or_a_probes_accuracies():
  values = {'loss': 1.5, 'moe/encoder/01/z': 3.0, 'word_error_rate': 0.25, 'accuracy': 0.5}
  assert metrics.headline(values) == 'loss 1.5000, accuracy 0.5000, word_error_rate 0.2500'
  probe = {'1shot_accuracy': 0.5, '1shot_accuracy_std': 0.1}
  assert metrics.headline(probe) == '1shot_accuracy 0.5000'
