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


def buffers(slots, group=0):
  """SlotRouting -> per expert {token: weight} of the valid slots of one group."""
  index, weight, valid = (np.asarray(a)[group] for a in (slots.index, slots.weight, slots.valid))
  assert index.dtype == np.int32 and weight.dtype == np.float32 and valid.dtype == bool
  tables = []
  for e in range(len(index)):
    tokens = index[e][valid[e]].tolist()
    assert len(set(tokens)) == len(tokens), f'expert {e} holds a token twice: {tokens}'
    tables.append(dict(zip(tokens, weight[e][valid[e]].tolist(), strict=True)))
  assert (weight[~valid] == 0).all(), 'an empty slot has a weight'
  return tables


def assert_buffers(slots, expected, group=0):
  found = buffers(slots, group)
  assert [set(b) for b in found] == [set(b) for b in expected]
  for have, want in zip(found, expected, strict=True):
    for token, weight in want.items():
      assert have[token] == pytest.approx(weight, rel=1e-6), (token, found)


def token_routing(expert, weight, valid=None):
  """TokenRouting of one group from (S, K) lists."""
  expert = jnp.asarray([expert], jnp.int32)
  valid = jnp.ones_like(expert, bool) if valid is None else jnp.asarray([valid])
  return routing.TokenRouting(expert, jnp.where(valid, jnp.asarray([weight], jnp.float32), 0.0),
                              valid)


def choices(tokens, group=0):
  """TokenRouting -> per token [(expert, weight), ...] of the valid choices; None at padding."""
  expert, weight, valid = (np.asarray(a)[group] for a in
                           (tokens.expert, tokens.weight, tokens.valid))
  assert expert.dtype == np.int32 and weight.dtype == np.float32 and valid.dtype == bool
  assert (weight[~valid] == 0).all(), 'an invalid choice has a weight'
  assert (valid[:, :-1] >= valid[:, 1:]).all(), 'a valid choice comes after an invalid one'
  return [list(zip(e[v].tolist(), w[v].tolist(), strict=True)) if v.any() else None
          for e, w, v in zip(expert, weight, valid, strict=True)]


def assert_choices(tokens, expected, group=0):
  found = choices(tokens, group)
  assert len(found) == len(expected)
  for have, want in zip(found, expected, strict=True):
    if want is None:
      assert have is None
      continue
    assert [e for e, _ in have] == [e for e, _ in want], (have, want)
    assert [w for _, w in have] == pytest.approx([w for _, w in want], rel=1e-6)
