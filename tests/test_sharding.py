"""The mesh, the rule table on the models' real leaves, and work spread over groups.

D 16, F 32, V 64 and E 4 of the tiny models: every dimension that a rule splits divides by 2.
"""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import models, sharding, trees
from moejax.config import ConfigError
from moejax.models import t5, vit
from moejax.moe.layer import MoEConfig
from moejax.sharding import MeshConfig
from moejax.train import optimizer

MOE = MoEConfig(layers='1', num_experts=4, router='top_k')
T5 = t5.config('tiny', encoder_moe=MOE, decoder_moe=MOE)
VIT = vit.config('tiny', head='cls', moe=MOE)
SPLIT = MeshConfig(data=1, fsdp=2, expert=2, model=2)

# Where each kind of leaf goes when every axis is larger than 1; P() is on every device, whole.
T5_PLACES = {
    r'token_embed/embedding': P('model', 'fsdp'),
    r'head/kernel': P('fsdp', 'model'),
    r'(en|de)coder/relative_bias/embedding': P(),
    r'(en|de)coder/(final_norm|layers/0\d/\w+_norm)/scale': P(),
    r'(en|de)coder/layers/0\d/(cross_)?attention/[qkv]/kernel': P('fsdp', 'model'),
    r'(en|de)coder/layers/0\d/(cross_)?attention/o/kernel': P('model', 'fsdp'),
    r'(en|de)coder/layers/00/mlp/wi_(gate|up)': P('fsdp', 'model'),
    r'(en|de)coder/layers/00/mlp/wo': P('model', 'fsdp'),
    r'(en|de)coder/layers/01/moe/router/kernel': P(),
    r'(en|de)coder/layers/01/moe/experts/wi_(gate|up)': P('expert', 'fsdp', 'model'),
    r'(en|de)coder/layers/01/moe/experts/wo': P('expert', 'model', 'fsdp'),
}
VIT_PLACES = {
    r'cls': P(),
    r'(patch_embed/(kernel|bias)|position_embed/embedding)': P(),
    r'head/kernel': P('fsdp', 'model'),
    r'head/bias': P(),
    r'encoder/(final_norm|layers/0\d/\w+_norm)/(scale|bias)': P(),
    r'encoder/layers/0\d/attention/[qkv]/kernel': P('fsdp', 'model'),
    r'encoder/layers/0\d/attention/o/kernel': P('model', 'fsdp'),
    r'encoder/layers/0\d/attention/[qkvo]/bias': P(),
    r'encoder/layers/00/mlp/wi': P('fsdp', 'model'),
    r'encoder/layers/00/mlp/wo': P('model', 'fsdp'),
    r'encoder/layers/00/mlp/w[io]_bias': P(),
    r'encoder/layers/01/moe/router/kernel': P(),
    r'encoder/layers/01/moe/experts/wi': P('expert', 'fsdp', 'model'),
    r'encoder/layers/01/moe/experts/wo': P('expert', 'model', 'fsdp'),
    r'encoder/layers/01/moe/experts/wi_bias': P('expert', 'model'),
    r'encoder/layers/01/moe/experts/wo_bias': P('expert'),
}


@functools.cache
def shapes(config):
  return models.build(config).shapes


def specs(tree, mesh):
  return {p: sharding.spec(p, leaf.shape, mesh) for p, leaf in trees.flatten(tree).items()}


@pytest.mark.parametrize('config, places', [(T5, T5_PLACES), (VIT, VIT_PLACES)], ids=['t5', 'vit'])
def test_every_parameter_of_a_model_stands_where_the_table_says(config, places):
  used = set()
  for path, found in specs(shapes(config), sharding.make_mesh(SPLIT)).items():
    pattern, = (p for p in places if re.fullmatch(p, path))
    used.add(pattern)
    assert found == places[pattern], path
  assert used == set(places)


@pytest.mark.parametrize('config', [T5, VIT], ids=['t5', 'vit'])
def test_rules_leave_out_only_small_kernels(config):
  """A new kernel that no rule matches would be whole on every device, silently."""
  whole = {re.sub(r'.*/layers/\d+/', '', path)
           for path, leaf in trees.flatten(shapes(config)).items() if len(leaf.shape) >= 2
           and not any(re.search(f'{pattern}(/|$)', path) for pattern, _ in sharding.RULES)}
  assert whole <= {'moe/router/kernel', 'encoder/relative_bias/embedding', 'patch_embed/kernel',
                   'decoder/relative_bias/embedding', 'position_embed/embedding'}


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'sgd'])
@pytest.mark.parametrize('config', [T5, VIT], ids=['t5', 'vit'])
def test_optimizer_slots_can_stand_there(name, config):
  """Slots as large as their parameter stand with it; those of experts are split over experts."""
  chosen = optimizer.OptimizerConfig(
      name=name, momentum=0.9, adafactor=optimizer.AdafactorConfig(min_dim_size_to_factor=8))
  slots = trees.flatten(jax.eval_shape(lambda p: optimizer.init(chosen, p), shapes(config)))
  params = trees.flatten(shapes(config))
  mesh = sharding.make_mesh(SPLIT)
  factored = 0
  for path, slot in slots.items():
    parameter, _, kind = path.rpartition('/')
    found = sharding.spec(path, slot.shape, mesh)
    NamedSharding(mesh, found).shard_shape(slot.shape)   # ValueError where it does not divide
    if slot.shape == params[parameter].shape:
      assert found == sharding.spec(parameter, slot.shape, mesh)
    if '/experts/' in path:
      assert found[0] == 'expert' and slot.shape[0] == 4, path
    elif len(slot.shape) < 2:
      assert found == P(), path
    factored += kind == 'v_row' and slot.shape[-1] > 1
  assert bool(factored) == (name == 'adafactor')


@pytest.mark.parametrize('path, shape, expected', [
    # Adafactor's slots of an expert leaf (E, D, F): rows (E, D), columns (E, F), count (E,).
    ('opt_state/encoder/layers/01/moe/experts/wi_gate/v_row', (4, 16), P('expert')),
    ('opt_state/encoder/layers/01/moe/experts/wi_gate/v_col', (4, 32), P('expert')),
    ('opt_state/encoder/layers/01/moe/experts/wi_gate/v', (4, 1), P('expert')),
    ('opt_state/encoder/layers/01/moe/experts/wi_gate/count', (4,), P('expert')),
    ('opt_state/encoder/layers/01/moe/experts/wi_bias/v_row', (4, 1), P('expert', None)),
    ('opt_state/encoder/layers/01/moe/experts/wo/nu', (4, 32, 16), P('expert', 'model', 'fsdp')),
    ('opt_state/encoder/layers/00/mlp/wi_gate/v_row', (16,), P()),
    ('opt_state/encoder/layers/00/mlp/wi_gate/count', (), P()),
    ('opt_state/encoder/layers/00/mlp/wi_gate/mu', (16, 32), P('fsdp', 'model')),
    ('opt_state/encoder/layers/00/attention/q/bias/mu', (16,), P()),
])
def test_slots(path, shape, expected):
  assert sharding.spec(path, shape, sharding.make_mesh(SPLIT)) == expected


def test_an_axis_that_does_not_divide_or_is_one_is_left_out():
  eight = sharding.make_mesh(MeshConfig(data=1, fsdp=2, model=4))
  assert sharding.spec('head/kernel', (16, 10), eight) == P('fsdp', None)     # 10 by 4
  assert sharding.spec('head/kernel', (15, 12), eight) == P(None, 'model')    # 15 by 2
  # fsdp alone: expert and model have one device.
  fsdp = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
  assert sharding.spec('x/experts/wi', (3, 16, 32), fsdp) == P(None, 'fsdp', None)
  assert sharding.spec('x/mlp/wo', (32, 16), fsdp) == P(None, 'fsdp')


def test_half_an_expert_is_refused():
  mesh = sharding.make_mesh(MeshConfig(expert=2))
  for path, shape in (('a/experts/wi', (3, 16, 32)), ('a/experts/wi/count', (3,))):
    with pytest.raises(ConfigError, match=r'^config\.mesh\.expert: got 2, allowed: '
                       f'a divisor of the 3 experts of {path}'):
      sharding.spec(path, shape, mesh)


def test_shardings_and_batch_sharding():
  mesh = sharding.make_mesh(SPLIT)
  tree = {'mlp': {'wo': jax.ShapeDtypeStruct((32, 16), jnp.float32)}, 'x': jnp.zeros(3)}
  assert sharding.shardings(tree, mesh) == {
      'mlp': {'wo': NamedSharding(mesh, P('model', 'fsdp'))}, 'x': NamedSharding(mesh, P())}
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, expert=2, model=2))
  assert sharding.batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)   # over data * expert = 4


@pytest.mark.parametrize('config, sizes', [
    (MeshConfig(), (8, 1, 1, 1)),
    (MeshConfig(data=1, expert=-1), (1, 1, 8, 1)),
    (MeshConfig(fsdp=2, model=2), (2, 2, 1, 2)),
    (MeshConfig(data=2, fsdp=1, expert=2, model=2), (2, 1, 2, 2)),
    (MeshConfig(data=2, fsdp=2, expert=2, model=-1), (2, 2, 2, 1))])
def test_make_mesh(config, sizes):
  mesh = sharding.make_mesh(config)
  assert tuple(mesh.shape[a] for a in ('data', 'fsdp', 'expert', 'model')) == sizes
  assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_make_mesh_of_given_devices():
  assert sharding.make_mesh(MeshConfig(), jax.devices()[:3]).shape['data'] == 3


@pytest.mark.parametrize('config', [
    MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(expert=16),
    MeshConfig(data=-1, fsdp=-1), MeshConfig(data=0), MeshConfig(fsdp=-2),
    MeshConfig(data=-2, fsdp=-4), MeshConfig(data=-2, fsdp=-2, expert=-1)])
def test_axes_that_do_not_multiply_to_the_devices(config):
  given = f'data={config.data} x fsdp={config.fsdp} x expert={config.expert} x model=1'
  with pytest.raises(ConfigError, match=f"config.mesh: got '{given}', allowed: .*8 devices.*-1"):
    sharding.make_mesh(config)


def scaled_sums(groups, weights, *, exchange, total):
  """Doubles every group through `exchange` of per-expert buffers; and the sum of all groups."""
  apply = lambda w, x: x * w[:, None, None]
  buffers = jnp.stack([groups['x']] * 4)                     # (E, G, D) of local groups
  y = (exchange or (lambda f: f))(apply)(weights, buffers)   # expert e times its weight
  return y.sum(0), {'sum': total(groups['x'].sum())}


@pytest.mark.parametrize('config', [
    None, MeshConfig(data=8), MeshConfig(data=2, expert=4), MeshConfig(data=2, fsdp=2, expert=2)])
def test_over_groups_is_the_same_however_groups_and_experts_are_spread(config):
  """Weights 1, 10, 100, 1000 of four experts: each token meets each expert once, so times 1111."""
  x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)       # (G, D)
  weights = jnp.array([1., 10., 100., 1000.])
  run = jax.jit(sharding.over_groups(scaled_sums))
  if config is None:
    assert sharding.axis_sizes() == {'data': 1, 'fsdp': 1, 'expert': 1, 'model': 1}
    y, sums = run({'x': x}, weights)
  else:
    with jax.set_mesh(sharding.make_mesh(config)):
      assert sharding.axis_sizes()['expert'] == config.expert
      y, sums = run({'x': x}, weights)
  np.testing.assert_array_equal(y, 1111 * x)
  assert sums == {'sum': 23 * 24 / 2}


def test_groups_that_do_not_divide_are_refused():
  with (jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, expert=4))),
        pytest.raises(ConfigError, match=r'routing groups per step: got 6.*fsdp\*expert = 8')):
    sharding.over_groups(scaled_sums)({'x': jnp.zeros((6, 3))}, jnp.ones(4))


def across(processes, local, **sizes):
  """What host_of asks of a mesh of so many processes with `local` devices each."""
  devices = np.array([types.SimpleNamespace(process_index=n // local)
                      for n in range(processes * local)])
  return types.SimpleNamespace(devices=devices.reshape(tuple(sizes.values())), shape=sizes,
                               size=devices.size)


@pytest.mark.parametrize('processes, local, data, model, hosts', [
    (2, 4, 8, 1, [(0, 2), (1, 2)]),
    (2, 4, 4, 2, [(0, 2), (1, 2)]),
    (2, 4, 1, 8, [(0, 1), (0, 1)]),                       # both hold all rows
    (4, 2, 2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)])])      # pairs hold the same half
def test_a_process_loads_the_rows_its_devices_hold(processes, local, data, model, hosts):
  mesh = across(processes, local, data=data, model=model)
  assert [sharding.host_of(mesh, data, n) for n in range(processes)] == hosts


def test_a_process_that_holds_more_rows_than_others_is_refused_in_all():
  mesh = across(3, 4, data=2, model=6)   # the second has devices of both halves
  for process in range(3):
    with pytest.raises(ConfigError, match='config.mesh: got .data=2 x model=6.*of the 4 devices'):
      sharding.host_of(mesh, 2, process)
