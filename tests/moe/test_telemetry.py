"""What became of the tokens, counted by hand. G groups, S group size, E experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import routing, telemetry

from .tables import token_routing

# Two groups of four tokens, three experts, two slots each. Group 0: t3 is padding; e0 holds t0 and
# t1, e1 holds t0, and its empty slot points at t2, whom nobody processes. Group 1: only t1 is real,
# and e2 holds it.
MASK = [[True, True, True, False], [False, True, False, False]]
INDEX = [[[0, 1], [0, 2], [0, 0]], [[0, 0], [0, 0], [1, 1]]]
VALID = [[[True, True], [True, False], [False, False]], [[False] * 2, [False] * 2, [True, False]]]
# Entropies in nats: ln 2, 0, ln 3, (padding) and ln 2 for the one token of group 1.
ROUTER = [[[1/2, 1/2, 0], [1, 0, 0], [1/3, 1/3, 1/3], [1/3, 1/3, 1/3]],
          [[1/3, 1/3, 1/3], [0, 1/2, 1/2], [1/2, 1/2, 0], [1, 0, 0]]]


@pytest.mark.parametrize('num_choices', [None, 7])
def test_telemetry_of_slots(num_choices):
  """Four real tokens chose two experts each, but one chose one: 7. Expert choice: what it fills."""
  valid = jnp.asarray(VALID)
  slots = routing.SlotRouting(jnp.asarray(INDEX, jnp.int32), valid.astype(jnp.float32), valid)
  found = jax.jit(telemetry.sums)(slots, jnp.asarray(ROUTER, jnp.float32), jnp.asarray(MASK),
                                  num_choices and jnp.float32(num_choices))
  assert all(v.dtype == jnp.float32 for v in found.values())
  np.testing.assert_array_equal(found.pop('load'), [2, 1, 1])   # four slots are filled
  assert float(found.pop('entropy')) == pytest.approx(2 * np.log(2) + np.log(3), rel=1e-6)
  assert {name: float(value) for name, value in found.items()} == {
      'tokens': 4, 'assigned': num_choices or 4, 'dropped': (num_choices or 4) - 4,
      'unchosen': 1,   # t2 of group 0
      'single': 2}     # t1 of group 0 and t1 of group 1


def test_telemetry_without_capacity_reads_the_choices():
  # t0 chooses e1 and e0, t1 only e1, t2 is padding; nothing is dropped.
  tokens = token_routing([[1, 0], [1, 2], [0, 1]], [[.6, .3], [.5, .4], [.5, .3]],
                         valid=[[True, True], [True, False], [False, False]])
  probs = jnp.asarray([[[1/3, 2/3, 0], [0, 1, 0], [1/3, 1/3, 1/3]]], jnp.float32)
  found = jax.jit(telemetry.sums)(tokens, probs, jnp.asarray([[True, True, False]]))
  np.testing.assert_array_equal(found['load'], [1, 2, 0])
  assert {name: float(found[name]) for name in ('tokens', 'assigned', 'dropped', 'unchosen',
                                                'single')} == {
      'tokens': 2, 'assigned': 3, 'dropped': 0, 'unchosen': 0, 'single': 1}
