"""Routings as tables a hand can write: which tokens an expert holds, which experts a token chose.

G groups, S group size, E experts, K selected.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import routing

# One group of four tokens and three experts. Probabilities, token by token:
#   t0  1 2 3 -> 1/6  1/3  1/2
#   t1  4 1 1 -> 2/3  1/6  1/6
#   t2  2 1 1 -> 1/2  1/4  1/4
#   t3  1 2 2 -> 1/5  2/5  2/5
ODDS = [[1, 2, 3], [4, 1, 1], [2, 1, 1], [1, 2, 2]]


def logs(odds):
  """Nested lists of odds, (S, E) or (G, S, E) -> (G, S, E) float32 logits."""
  odds = np.asarray(odds, np.float64)
  return jnp.asarray(np.log(odds if odds.ndim == 3 else odds[None]), jnp.float32)


def real(logits):
  """(G, S) mask without padding."""
  return jnp.ones(logits.shape[:2], bool)


def numpy_of(routed, group):
  """(tokens or experts, weight, valid) of one group, with their dtypes checked."""
  named, weight, valid = (np.asarray(a)[group] for a in routed)
  assert named.dtype == np.int32 and weight.dtype == np.float32 and valid.dtype == bool
  assert (weight[~valid] == 0).all(), 'what is not valid has a weight'
  return named, weight, valid


def buffers(slots, group=0):
  """SlotRouting -> per expert {token: weight} of the valid slots of one group."""
  tables = []
  for tokens, weight, valid in zip(*numpy_of(slots, group), strict=True):
    tokens = tokens[valid].tolist()
    assert len(set(tokens)) == len(tokens), f'an expert holds a token twice: {tokens}'
    tables.append(dict(zip(tokens, weight[valid].tolist(), strict=True)))
  return tables


def assert_buffers(slots, expected, group=0):
  assert buffers(slots, group) == [pytest.approx(table, rel=1e-6) for table in expected]


def token_routing(expert, weight, valid=None):
  """TokenRouting of one group from (S, K) lists."""
  expert = jnp.asarray([expert], jnp.int32)
  valid = jnp.ones_like(expert, bool) if valid is None else jnp.asarray([valid])
  return routing.TokenRouting(expert, jnp.where(valid, jnp.asarray([weight], jnp.float32), 0.0),
                              valid)


def choices(tokens, group=0):
  """TokenRouting -> per token [(expert, weight), ...] of the valid choices; None at padding."""
  expert, weight, valid = numpy_of(tokens, group)
  assert (valid[:, :-1] >= valid[:, 1:]).all(), 'a valid choice comes after an invalid one'
  return [list(zip(e[v].tolist(), w[v].tolist(), strict=True)) if v.any() else None
          for e, w, v in zip(expert, weight, valid, strict=True)]


def assert_choices(tokens, expected, group=0):
  """Experts in order, and their weights."""
  found = choices(tokens, group)
  in_order = lambda rows: [row and [e for e, _ in row] for row in rows]
  assert in_order(found) == in_order(expected)
  for have, want in zip(found, expected, strict=True):
    assert [w for _, w in have or ()] == pytest.approx([w for _, w in want or ()], rel=1e-6)
