"""The compiled train step, read: tokens travel to experts by all-to-all, and nothing is gathered.

Whatever grows with the global batch must stay on its device, or leave it in an all-to-all of just
the slots that experts elsewhere have for it.
"""

import dataclasses
import functools

import pytest

from moejax import models, trees
from moejax.aot import collectives, hlo, report
from moejax.data import DataConfig
from moejax.data.config import TextConfig
from moejax.models import t5
from moejax.models.scan import REMAT, Execution
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import config as run_config
from moejax.train import optimizer, parallel

E, C, D, F, LENGTH, TARGET = 8, 2.0, 32, 64, 16, 8
LAYERS = 2   # of each stack, every second one sparse
# Ways to run: 'paper' as T5s in configs/paper, with two repetitions for the scan; 'einsum' as its
# ViTs dispatch.
WAYS = {'plain': {}, 'einsum': {'dispatch': 'einsum'},
        'paper': {'layers': 4, 'scan': True, 'remat': 'sent', 'microbatches': 2}}


def config(B, mesh, layers=LAYERS, dispatch='gather', remat='none', scan=False, microbatches=1):
  moe = MoEConfig(layers='every_2', num_experts=E, capacity_factor=C, dispatch=dispatch)
  model = t5.config(
      'tiny', d_model=D, d_ff=F, encoder_layers=layers, decoder_layers=layers,
      encoder_moe=dataclasses.replace(moe, group_size=LENGTH),
      decoder_moe=dataclasses.replace(moe, group_size=TARGET, router='top_k', balance_weight=0.02))
  return run_config.RunConfig(
      model=model, mesh=MeshConfig(**mesh), execution=Execution(scan=scan, remat=remat),
      microbatches=microbatches,
      data=DataConfig(source='stdlib_text', batch_size=B, eval_batch_size=B,
                      text=TextConfig(encoder_length=LENGTH, decoder_length=TARGET)),
      optimizer=optimizer.OptimizerConfig(name='adafactor'))


@functools.cache
def communication(B, way='plain', remat='', **mesh):
  run = config(B, mesh, **WAYS[way] | ({'remat': remat} if remat else {}))
  programs = report.programs_of(run, parallel.make('mesh', run.mesh))
  return collectives.of(hlo.Module(programs.train.compiled.as_text()))


MESHES = [dict(data=1, expert=8), dict(data=2, expert=4)]
MORE = [(MESHES[0], 'einsum'), (MESHES[1], 'paper')]
SPLIT = dict(data=1, fsdp=4, expert=2)   # parameters are gathered where they are used


@pytest.mark.parametrize('mesh, way', [*((mesh, 'plain') for mesh in MESHES), *MORE], ids=str)
def test_all_to_alls_carry_the_slots_and_no_more(mesh, way):
  B, n = 16, mesh['expert']
  found = [c for c in communication(B, way, **mesh) if c.kind == 'all-to-all']
  slots = B // 8 * (LENGTH + TARGET) * C              # of a device's own tokens, both stacks
  sparse = WAYS[way].get('layers', LAYERS) // 2       # of each stack
  # There and back, forward and backward; the float32 of this test.
  expected = 4 * sparse * slots * D * 4 * (n - 1) / n
  assert {c.devices for c in found} == {n}
  assert expected <= sum(c.sent for c in found) <= 1.1 * expected


def test_rematerialising_sends_again_only_where_nothing_is_kept():
  sent = {remat: sum(c.sent for c in communication(16, remat=remat, **MESHES[0])
                     if c.kind == 'all-to-all') for remat in REMAT}
  assert sent['dots'] == sent['sent'] == sent['none']
  assert sent['full'] == pytest.approx(6 / 4 * sent['none'])   # the forward pass twice


@pytest.mark.parametrize('mesh, way', [(MESHES[0], 'plain'), *MORE, (SPLIT, 'paper')], ids=str)
def test_nothing_that_grows_with_the_batch_is_gathered(mesh, way):
  def gathered(B):
    return sorted((c.kind, c.bytes) for c in communication(B, way, **mesh)
                  if c.kind != 'all-to-all')
  # Parameters, gradients, counts and sums: the same for any batch.
  assert gathered(16) == gathered(32)


@pytest.mark.parametrize('execution', [Execution(), Execution(scan=True, remat='full')],
                         ids=['plain', 'scanned'])
def test_nor_in_a_dense_model_whose_parameters_are_split(execution):
  """Parameters go to the tokens and not tokens to the parameters, where no experts hold these."""
  def moved(B):
    run = config(B, dict(data=2, fsdp=4))
    run = dataclasses.replace(run, execution=execution, model=t5.config(
        'tiny', d_model=D, d_ff=F, encoder_layers=4, decoder_layers=4))
    programs = report.programs_of(run, parallel.make('mesh', run.mesh))
    found = collectives.of(hlo.Module(programs.train.compiled.as_text()))
    return sum(c.sent for c in found if c.kind != 'collective-permute')
  assert moved(64) == pytest.approx(moved(16), rel=0.01)


def test_over_model_activations_are_added_where_a_matmul_ends_and_nowhere_else():
  """Heads, hidden units and logits stay split: what grows with the batch is what a layer puts out,
  and what its gradients say of its input, once per matrix that reads it."""
  B, mesh = 16, dict(data=2, expert=2, model=2)
  moved = lambda B, kind: sum(c.bytes for c in communication(B, **mesh) if c.kind == kind)
  grown = lambda kind: moved(2 * B, kind) - moved(B, kind)
  source, target = (B // 4 * length * D * 4 for length in (LENGTH, TARGET))   # of one device
  read, ends = {'attention': 3, 'mlp': 2}, 1                # q, k, v; gate and up
  sparse = C * (read['mlp'] + ends)                         # slots in place of tokens
  encoder = LAYERS * (read['attention'] + ends) + read['mlp'] + ends + sparse
  cross = LAYERS * (ends + 1)                               # of the target, q alone reads
  embedded, logits = 1, 1
  assert 0 < grown('all-reduce') <= 1.01 * (
      source * (encoder + embedded + LAYERS * 2)            # k and v of cross-attention
      + target * (encoder + embedded + cross + logits))
  # Of every part of the logits a token's largest and its place, for loss and accuracy.
  assert grown('all-gather') <= mesh['model'] * B // 4 * TARGET * (4 + 4)
  # Each device of `model` sends the slots of its own tokens; nothing else moves.
  assert grown('all-to-all') <= 1.1 * 4 * C * (source + target)
  assert grown('collective-permute') == grown('reduce-scatter') == 0


def test_experts_are_gathered_over_fsdp_and_not_over_expert():
  found = communication(16, **SPLIT)
  over = lambda kind: {c.devices for c in found if c.kind == kind}
  assert (over('all-gather'), over('all-to-all')) == ({SPLIT['fsdp']}, {SPLIT['expert']})
  largest = max(c.bytes for c in found if c.kind == 'all-gather')
  assert largest == E // SPLIT['expert'] * D * F * 4   # one matrix of the experts of a device


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_no_expert_leaves_its_device(mesh):
  shapes = trees.flatten(models.build(config(16, mesh).model).shapes)
  size = lambda experts: 4 * sum(trees.count({path: leaf}) for path, leaf in shapes.items()
                                 if ('/experts/' in path) == experts)
  found = communication(16, **mesh)
  assert all(c.bytes < D * F * 4 for c in found if c.kind == 'all-gather')
  # Gradients are added over the devices that hold the same parameters: those of an expert over
  # `data` alone, so not at all if that is 1. Both stacks read the embedding, and each adds its own;
  # beside that there are counts and sums, all of it less than one expert.
  own = size(True) / mesh['expert'] if mesh['data'] > 1 else 0
  added = sum(c.bytes for c in found if c.kind == 'all-reduce')
  assert size(False) + own <= added < size(False) + own + 3 * D * F * 4
