"""Runs whose blocks are scanned: the same steps, the same checkpoints, resumed and continued."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs.pretrain import vit_glyphs
from configs.upcycle import vit_glyphs_upcycled
from moejax import models, trees
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.models.scan import Execution
from moejax.train import config as run_config
from moejax.train import loop, metrics, optimizer
from moejax.train.parameter_groups import check_stacked

DEPTH = 4   # the last two sparse: 00+1x2 and 02+1x2


def config(get_config, **changes):
  """A tiny run with factored slots, a bias that the step moves, dropout and noise."""
  found = get_config('runlocal')
  found.model.update(num_layers=DEPTH, d_model=16, d_ff=32, dropout_rate=0.1)
  found.optimizer.name = 'adafactor'
  found.optimizer.adafactor.min_dim_size_to_factor = 8
  found.data.batch_size = found.data.eval_batch_size = 32
  found.mesh.update(data=2, fsdp=2, expert=2)
  for key, value in changes.items():
    found.update_from_flattened_dict({key: value})
  return run_config.resolve(found)


def upcycled(parent, **changes):
  return config(vit_glyphs_upcycled.get_config, **{
      'init.parent': str(parent), 'init.optimizer': 'carry', 'model.moe.layers': 'last_2',
      'model.moe.num_experts': 4, 'model.moe.router': 'top_k', 'model.moe.bias_rate': 0.01,
      'model.moe.group_size': 64, 'model.moe.balance_weight': 0.01, **changes})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folder of a dense parent and of its children, one scanned, one unrolled."""
  folder = tmp_path_factory.mktemp('runs')
  scan = {'execution.scan': True, 'execution.remat': 'dots'}
  assert loop.run(config(vit_glyphs.get_config), str(folder / 'parent')) == 0
  for name, changes in (('unrolled', {}), ('scanned', scan)):
    assert loop.run(upcycled(folder / 'parent', **changes), str(folder / name)) == 0
  return folder


def leaves(workdir):
  reader = orbax.Reader(workdir)
  return {path: reader.read(path) for path in reader.shapes}


def test_the_checkpoints_have_single_blocks_and_the_same_values(runs):
  unrolled, scanned = leaves(runs / 'unrolled'), leaves(runs / 'scanned')
  assert scanned.keys() == unrolled.keys()
  assert 'opt_state/encoder/layers/03/moe/experts/wi/v_row' in scanned
  assert scanned['opt_state/encoder/layers/03/moe/experts/wi/v_row'].shape == (4, 16)
  for path, leaf in unrolled.items():
    if leaf.dtype.kind == 'f':
      # The true gradient of a key's bias is 0: what there is of it is rounding.
      atol = 1e-4 if '/k/bias' in path else 1e-4 * np.abs(leaf).max() + 1e-7
      np.testing.assert_allclose(scanned[path], leaf, atol=atol, rtol=0, err_msg=path)
    else:
      np.testing.assert_array_equal(scanned[path], leaf, err_msg=path)
  biases = [path for path in unrolled if path.endswith('no_grad/bias')]
  assert len(biases) == 2
  assert all(np.abs(scanned[path]).max() > 0 for path in biases)


def test_the_metrics_and_the_receipt_name_every_layer(runs):
  unrolled, scanned = (metrics.read_lines(runs / name / 'metrics.jsonl')
                       for name in ('unrolled', 'scanned'))
  assert len(scanned) == len(unrolled)
  for a, b in zip(scanned, unrolled):
    assert a.keys() == b.keys()
    assert all(np.isclose(a[k], b[k], rtol=1e-3, atol=1e-3) for k in a), (a, b)
  assert {'train/moe/encoder/02/router_grad_norm', 'train/moe/encoder/03/router_bias_max'} <= {
      key for line in scanned for key in line}, sorted({key for line in scanned for key in line})
  made = [json.loads((runs / name / 'receipt.json').read_text())
          for name in ('unrolled', 'scanned')]
  gaps = [receipt.pop('measured')['step0_gap'] for receipt in made]
  assert made[0] == made[1] and np.isclose(*gaps, atol=1e-5)


def test_a_scanned_run_resumes_bit_for_bit(runs, tmp_path):
  shutil.copytree(runs / 'scanned', tmp_path / 'scanned')
  last, trunk = reversed(orbax.finished_steps(runs / 'scanned' / orbax.SUBDIR)[-2:])
  shutil.rmtree(tmp_path / 'scanned' / orbax.SUBDIR / str(last))
  run = upcycled(runs / 'parent', **{'execution.scan': True, 'execution.remat': 'dots'})
  assert loop.run(run, str(tmp_path / 'scanned')) == 0
  assert orbax.finished_steps(tmp_path / 'scanned' / orbax.SUBDIR)[-1] == last > trunk
  before, after = leaves(runs / 'scanned'), leaves(tmp_path / 'scanned')
  for path in before:
    np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_blocks_of_a_scan_that_are_treated_differently_are_refused():
  model = models.build(upcycled('nowhere').model, Execution(scan=True))
  for changes in ({'groups': ((r'layers/01/', 0.5, 1.0),)}, {'freeze': r're:layers/0[0-2]/'},
                  {'weight_decay_mask': r'layers/03/.*wo$'}):
    with pytest.raises(ConfigError, match='config.execution.scan.*treats .* and .* differently'):
      check_stacked(optimizer.OptimizerConfig(**changes), model.param_paths)
  check_stacked(optimizer.OptimizerConfig(freeze='experts'), model.param_paths)


def test_a_stacked_leaf_is_updated_block_by_block():
  # Adafactor clips by the root mean square of what it takes for one leaf.
  made = optimizer.OptimizerConfig(name='adafactor', adafactor=optimizer.AdafactorConfig(
      min_dim_size_to_factor=2))
  rng = np.random.default_rng(0)
  names = {name: {'moe': {'experts': {'wo': rng.normal(size=(3, 4, 5)).astype(np.float32)}}}
           for name in ('00', '01')}
  params = {'layers': names}
  grads = jax.tree.map(lambda x: (100 * x**2).astype(np.float32), params)
  state = optimizer.init(made, params)
  together = lambda tree: {'layers': {'00+1x2': jax.tree.map(
      lambda a, b: np.stack([a, b]), tree['layers']['00'], tree['layers']['01'])}}
  single = optimizer.update(made, grads, state, params, 0.1)
  stacked = optimizer.update(made, together(grads), together(state), together(params), 0.1)
  for a, b in zip(single, stacked):
    flat = trees.flatten(b)
    assert flat.keys() == trees.flatten(together(a)).keys()
    for path, leaf in trees.flatten(together(a)).items():
      np.testing.assert_allclose(flat[path], leaf, rtol=1e-6)
