"""Runs whose blocks are scanned: the same steps, the same checkpoints, resumed and continued."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from moejax import models, trees
from moejax.checkpoints import orbax
from moejax.config import ConfigError
from moejax.models.scan import Execution
from moejax.moe.config import MoEConfig
from moejax.train import config as run_config
from moejax.train import initialize, loop, metrics, optimizer, parallel
from moejax.train.optimizer import check_stacked
from tests.train import small

MOE = MoEConfig(layers='last_2', num_experts=4, router='top_k', bias_rate=0.01, group_size=16,
                balance_weight=0.01)   # of three blocks: 00 and 01+1x2
SCAN = {'execution.scan': True, 'execution.remat': 'dots'}
FIRST = 4   # the step of the parent


def config(moe=MOE, **changes):
  """A tiny run with factored moments, a bias that the step moves, dropout and noise."""
  return small.digits(moe, **{
      'steps': 8, 'log_every': 2, 'eval_every': 4, 'checkpoint_every': 4,
      'schedule.cooldown_steps': 4, 'model.num_layers': 3, 'model.dropout_rate': 0.1,
      'optimizer.name': 'adafactor', 'optimizer.adafactor.min_dim_size_to_factor': 8,
      'data.batch_size': 32, 'data.eval_batch_size': 32, 'data.eval_examples': 32,
      'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 2, **changes})


@pytest.fixture(autouse=True, scope='module')
def four_devices():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(parallel, 'make', functools.partial(parallel.make, devices=jax.devices()[:4]))
    yield


def child(folder, **changes):
  return config(**{'init.mode': 'upcycle', 'init.parent': str(folder / 'parent'), **changes})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folder of a dense parent and of its children, one scanned, one unrolled."""
  folder = tmp_path_factory.mktemp('runs')
  dense = config(MoEConfig())
  devices = parallel.make('mesh', dense.mesh)
  state, _ = initialize.first_state(dense, models.build(dense.model), devices, None)
  writer = orbax.Writer(folder / 'parent', 1)
  writer.save(FIRST, {**state.as_dict(), 'step': np.int32(FIRST)})
  writer.close()
  (folder / 'parent/config.json').write_text(run_config.to_json(dense))
  (folder / 'parent/run.json').write_text(json.dumps({'trunk_step': FIRST}))
  for name, changes in (('unrolled', {}), ('scanned', SCAN)):
    assert loop.run(child(folder, **changes), str(folder / name)) == 0
  return folder


def leaves(workdir):
  reader = orbax.Reader(workdir)
  return {path: reader.read(path) for path in reader.shapes}


def test_the_checkpoints_have_single_blocks_and_the_same_values(runs):
  unrolled, scanned = leaves(runs / 'unrolled'), leaves(runs / 'scanned')
  assert scanned.keys() == unrolled.keys()
  assert 'opt_state/encoder/layers/02/moe/experts/wi/v_row' in scanned
  assert scanned['opt_state/encoder/layers/02/moe/experts/wi/v_row'].shape == (4, 16)
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
  assert {'train/moe/encoder/01/router_grad_norm', 'train/moe/encoder/02/router_bias_max'} <= {
      key for line in scanned for key in line}, sorted({key for line in scanned for key in line})
  made = [json.loads((runs / name / 'receipt.json').read_text())
          for name in ('unrolled', 'scanned')]
  gaps = [receipt.pop('measured')['step0_gap'] for receipt in made]
  assert made[0] == made[1] and np.isclose(*gaps, atol=1e-5)


def test_a_scanned_run_resumes_bit_for_bit(runs, tmp_path):
  shutil.copytree(runs / 'scanned', tmp_path / 'scanned')
  last, trunk = reversed(orbax.finished_steps(runs / 'scanned' / orbax.SUBDIR)[-2:])
  shutil.rmtree(tmp_path / 'scanned' / orbax.SUBDIR / str(last))
  assert loop.run(child(runs, **SCAN), str(tmp_path / 'scanned')) == 0
  assert orbax.finished_steps(tmp_path / 'scanned' / orbax.SUBDIR)[-1] == last > trunk
  before, after = leaves(runs / 'scanned'), leaves(tmp_path / 'scanned')
  for path in before:
    np.testing.assert_array_equal(after[path], before[path], err_msg=path)


def test_blocks_of_a_scan_that_are_treated_differently_are_refused():
  model = models.build(config().model, Execution(scan=True))
  for changes in ({'groups': ((r'layers/01/', 0.5, 1.0),)}, {'freeze': r're:layers/0[0-1]/'},
                  {'weight_decay_mask': r'layers/02/.*wo$'}):
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
  update = jax.jit(functools.partial(optimizer.update, made))
  single = update(grads, state, params, 0.1)
  stacked = update(together(grads), together(state), together(params), 0.1)
  for a, b in zip(single, stacked):
    flat = trees.flatten(b)
    assert flat.keys() == trees.flatten(together(a)).keys()
    for path, leaf in trees.flatten(together(a)).items():
      np.testing.assert_allclose(flat[path], leaf, rtol=1e-6)
