"""End to end: an Orbax checkpoint, read leaf by leaf, upcycled straight into a device sharding."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moejax import trees
from moejax.checkpoints.orbax import Reader, Writer
from moejax.surgery import upcycle
from moejax.surgery.receipt import Receipt
from moejax.trees import rules
from tests.surgery.states import ADAMW, VIT, make_params, make_state

E = 8


def test_checkpoint_to_sharded_devices(tmp_path):
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('expert', 'model'))

  def sharding(path, shape):
    """Experts over 'expert', and the last axis of matrices over 'model'."""
    axes = ['expert'] if '/experts/' in path else []
    matrix = len(shape) == len(axes) + 2 and shape[-1] % 2 == 0
    axes += [None] * (len(shape) - len(axes) - matrix) + ['model'] * matrix
    return NamedSharding(mesh, PartitionSpec(*axes))

  def save(name, state):
    writer = Writer(tmp_path / name, keep=1)
    writer.save(3, trees.unflatten(state))
    writer.close()

  parent = make_state(make_params(VIT, {}, depth=2), ADAMW)
  target = make_state(make_params(VIT, {'encoder': (1,)}, depth=2, E=E), ADAMW, steps=0)
  for state in (parent, target):
    state['params/head/kernel'] = state['params/head/kernel'].astype(jnp.bfloat16)
  save('dense', {p: jax.device_put(v, sharding(p, v.shape)) for p, v in parent.items()})

  rng, largest = np.random.default_rng(0), {}
  fresh = {p: rng.normal(size=v.shape).astype(np.float32) for p, v in target.items()
           if p.startswith('params/') and '/router/' in p}

  def place(path, make, shape, dtype):
    def part(index):
      values = make(index)
      largest[path] = max(largest.get(path, 0), values.size)
      return values
    return jax.make_array_from_callback(shape, sharding(path, shape), part)

  reader = Reader(tmp_path / 'dense')
  planned = rules.plan(upcycle.upcycle_rules(reader.shapes, target, 'carry'), reader.shapes, target)
  values = upcycle.fresh_values(target, fresh.__getitem__)
  made, entries = rules.apply(planned, reader.read, values, place)
  assert sorted(made) == sorted(target)
  for path, leaf in made.items():
    assert leaf.sharding.is_equivalent_to(sharding(path, leaf.shape), leaf.ndim), path
    assert leaf.dtype == target[path].dtype and leaf.shape == target[path].shape, path
    value = np.asarray(leaf)
    if '/experts/' in path:
      for e in range(E):
        np.testing.assert_array_equal(value[e], parent[path.replace('/moe/experts/', '/mlp/')])
      # No host array is larger than a device's part: E/4 experts, half of a matrix' columns.
      assert largest[path] == leaf.size // (8 if leaf.ndim == 3 else 4), path
    elif '/router/' in path:
      np.testing.assert_array_equal(value, fresh.get(path, 0))
    else:
      np.testing.assert_array_equal(value, parent[path])
  assert {e.fate for e in entries} == {'copied', 'tiled', 'fresh'}

  # The child is a state like any other: it is saved, and restored into another sharding.
  save('moe', made)
  child, path = Reader(tmp_path / 'moe'), 'params/encoder/layers/01/moe/experts/wi'
  elsewhere = {p: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(
      mesh, PartitionSpec('model') if p == path else PartitionSpec())) for p, v in target.items()}
  restored = trees.flatten(child.restore(trees.unflatten(elsewhere)))
  for p, leaf in made.items():
    np.testing.assert_array_equal(restored[p], leaf)
  assert restored[path].sharding.spec == PartitionSpec('model')
  receipt = Receipt.of(entries)
  assert len(Receipt.from_json(receipt.to_json()).entries) == len(entries)
