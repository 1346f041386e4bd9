"""End to end: an Orbax checkpoint, read leaf by leaf, upcycled straight into a device sharding."""

import os
import sys

from tests import fork_server

SCRIPT = '''
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import trees
from moejax.checkpoints.orbax import Reader, Writer
from moejax.surgery import upcycle
from moejax.trees import rules
from moejax.surgery.receipt import Receipt

assert jax.device_count() == 8
D, F, E = 4, 6, 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('expert', 'model'))

def on(*axes):
  return NamedSharding(mesh, PartitionSpec(*axes))

# A dense parent, its matrices sharded over 'model', saved and committed.
rng = np.random.default_rng(0)
parent = {}
for layer in ('00', '01'):
  for name, shape in (('wi', (D, F)), ('wo', (F, D))):
    path = f'layers/{layer}/mlp/{name}'
    parent[f'params/{path}'] = rng.normal(size=shape).astype(np.float32)
    parent[f'opt_state/{path}/mu'] = rng.normal(size=shape).astype(np.float32)
    parent[f'opt_state/{path}/count'] = np.int32(5)
parent['params/head'] = jnp.asarray(rng.normal(size=(D, F)), jnp.bfloat16)
parent['step'] = np.int32(5)
state = {p: jax.device_put(v, on(None, 'model') if np.ndim(v) == 2 else on())
         for p, v in parent.items()}
writer = Writer(sys.argv[1], keep=1)
writer.save(5, trees.unflatten(state), {})
writer.close()

# The child: layer 01 is MoE, experts over 'expert' and 'model'.
target, sharding = {}, {}
for path, leaf in parent.items():
  shape, axes = leaf.shape, (None, 'model') if np.ndim(leaf) == 2 else ()
  if '/layers/01/mlp/' in path:
    path, shape, axes = path.replace('/mlp/', '/moe/experts/'), (E, *shape), ('expert', *axes)
  target[path] = jax.ShapeDtypeStruct(shape, leaf.dtype)
  sharding[path] = on(*axes)
for path, shape, dtype in (('params/layers/01/moe/router/kernel', (D, E), jnp.float32),
                           ('opt_state/layers/01/moe/router/kernel/mu', (D, E), jnp.float32),
                           ('opt_state/layers/01/moe/router/kernel/count', (), jnp.int32)):
  target[path], sharding[path] = jax.ShapeDtypeStruct(shape, dtype), on()

router = rng.normal(size=(D, E)).astype(np.float32)
largest = {}

def place(path, make, shape, dtype):
  def part(index):
    values = make(index)
    largest[path] = max(largest.get(path, 0), values.size)
    return values
  return jax.make_array_from_callback(shape, sharding[path], part)

reader = Reader(sys.argv[1])
made, entries = rules.apply(
    rules.plan(upcycle.upcycle_rules(reader.shapes, target, 'carry'), reader.shapes, target),
    reader.read, upcycle.fresh_values(target, lambda path: router), place)

assert sorted(made) == sorted(target)
for path, leaf in made.items():
  assert leaf.sharding.is_equivalent_to(sharding[path], leaf.ndim), path
  assert leaf.dtype == target[path].dtype and leaf.shape == target[path].shape, path
  value = np.asarray(leaf)
  if '/experts/' in path:
    for e in range(E):
      np.testing.assert_array_equal(value[e], parent[path.replace('/moe/experts/', '/mlp/')])
    # No host array larger than a device's part: E/4 experts, half of their columns.
    assert largest[path] == leaf.size // (8 if leaf.ndim == 3 else 4), path
  elif path.endswith('params/layers/01/moe/router/kernel'):
    np.testing.assert_array_equal(value, router)
  elif '/router/' in path:
    assert not value.any()
  else:
    np.testing.assert_array_equal(value, np.asarray(parent[path]))
assert {e.fate for e in entries} == {'copied', 'tiled', 'fresh'}

# The child is a state like any other: saved, and restored into another sharding.
writer = Writer(sys.argv[2], keep=1)
writer.save(5, trees.unflatten(made), {'receipt': Receipt.of(entries).to_json()})
writer.close()
path = 'params/layers/01/moe/experts/wi'
elsewhere = {p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=on('model') if p == path else on())
             for p, v in target.items()}
restored = trees.flatten(Reader(sys.argv[2]).restore(trees.unflatten(elsewhere)))
for p, v in made.items():
  np.testing.assert_array_equal(np.asarray(restored[p]), np.asarray(v))
assert restored[path].sharding.spec == PartitionSpec('model')
assert len(Receipt.from_json(Reader(sys.argv[2]).extra['receipt']).entries) == len(entries)
print('done')
'''


def test_checkpoint_to_sharded_devices(tmp_path):
  env = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
                      'JAX_PLATFORMS': 'cpu'}
  result = fork_server.run([sys.executable, '-c', SCRIPT, tmp_path / 'dense', tmp_path / 'moe'],
                           capture_output=True, text=True, env=env, timeout=120)
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == 'done'
