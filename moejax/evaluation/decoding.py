"""Autoregressive decoding: greedy and beam search over a model's cached steps.

Each search is one jax.lax.while_loop that ends when all sequences have ended. It runs under jit, a
mesh or a pmap. The decoder starts from pad, as in training. Pad is never chosen; it only follows
eos. (That is our choice: every loss gives pad weight 0, so its logit has no meaning.)

B batch, M source length, N beams, L tokens at most, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import sharding
from moejax.models.t5 import EOS, PAD


def greedy(model, params: dict, batch: dict, max_length: int) -> jax.Array:
  """Decodes the most probable token at each step.

  Args:
    model, params: models.Model of a T5 and its parameters.
    batch: with 'encoder_input' (B, M), 0 at padding; a filler example, which is all padding,
      decodes to padding.
    max_length: L.

  Returns:
    (B, L) int32 ids, up to and including eos, then pad; without eos where L tokens do not suffice.
  """
  encoded, real = model.encode(params, batch), _real(batch)

  def unfinished(state):
    position, _, _, done, _ = state
    return (position < max_length) & ~done.all()

  def advance(state):
    position, ids, last, done, cache = state
    logits, cache = model.decode_step(params, encoded, cache, last, position)
    last = jnp.where(done, PAD, _forbid_pad(logits).argmax(-1)).astype(jnp.int32)
    ids = jax.lax.dynamic_update_slice_in_dim(ids, last[:, None], position, axis=1)
    return position + 1, ids, last, done | (last == EOS), cache

  B, = real.shape
  start = jnp.full(B, PAD, jnp.int32)
  state = (jnp.int32(0), jnp.full((B, max_length), PAD, jnp.int32), start, ~real,
           model.init_cache(encoded, max_length))
  return jax.lax.while_loop(unfinished, advance, state)[1]


class Beams(NamedTuple):
  """State of a beam search.

  Attributes:
    position: int32 scalar, tokens chosen so far.
    live: (B, N, 1 + L) int32 ids of hypotheses without eos, best first; a pad starts each.
    live_score: (B, N) their log-probabilities; -inf where there is no hypothesis.
    finished: (B, 1 + L) int32 ids of the best hypothesis that ends in eos.
    finished_score: (B,) its log-probability over length penalty; -inf where there is none.
    cache: of the live hypotheses, leaves (B*N, L, ...).
  """
  position: jax.Array
  live: jax.Array
  live_score: jax.Array
  finished: jax.Array
  finished_score: jax.Array
  cache: dict


def beam_search(model, params: dict, batch: dict, max_length: int, beams: int,
                alpha: float = 0.6) -> jax.Array:
  """Decodes by a beam of N and returns the finished hypothesis of the highest score.

  The score is log P(y) / ((5 + |y|) / 6)^alpha, |y| counting eos (Wu et al. 2016, eq. 14, without
  its coverage). A step keeps the N best unfinished continuations, and continuations that end in eos
  if they are among the N best of all. A sequence is done when no unfinished hypothesis can still
  beat its best finished one. With N = 1 and alpha = 0 this is `greedy`. (t5x also admits endings up
  to rank 2N, so its beam of one differs from greedy.)

  Args:
    model, params, batch, max_length: as for `greedy`.
    beams: N.
    alpha: >= 0; 0 compares plain log-probabilities, which favours short outputs.

  Returns:
    (B, L) int32 ids as of `greedy`; where no hypothesis is finished, the best unfinished one.
  """
  N = beams
  real = _real(batch)
  B, = real.shape
  encoded = jax.tree.map(lambda x: _repeat(x, N), model.encode(params, batch))

  def unfinished(state: Beams):
    hope = state.live_score[:, 0] / length_penalty(max_length, alpha)
    return (state.position < max_length) & (hope > state.finished_score).any()

  def advance(state: Beams) -> Beams:
    position = state.position
    last = jax.lax.dynamic_index_in_dim(state.live, position, axis=2, keepdims=False)  # (B, N)
    logits, cache = model.decode_step(params, encoded, state.cache, last.reshape(B * N), position)
    score = _forbid_pad(jax.nn.log_softmax(logits, axis=-1)).reshape(B, N, -1)
    total = (state.live_score[..., None] + score).reshape(B, -1)                       # (B, N*V)
    score, flat = _top_k(total, 2 * N)                                                 # (B, 2N)
    parent, token = jnp.divmod(flat, logits.shape[-1])
    ids = jax.lax.dynamic_update_slice_in_dim(
        _take(state.live, parent), token[..., None].astype(jnp.int32), position + 1, axis=2)
    ends = token == EOS   # at most N of the 2N, as a hypothesis has one way to end

    ended = jnp.where(ends & (jnp.arange(2 * N) < N),
                      score / length_penalty(position + 1, alpha), -jnp.inf)
    better = ended.max(1) > state.finished_score                                       # (B,)
    best = _take(ids, ended.argmax(1)[:, None])[:, 0]                                  # (B, 1 + L)
    finished = jnp.where(better[:, None], best, state.finished)
    finished_score = jnp.where(better, ended.max(1), state.finished_score)
    live_score, kept = _top_k(jnp.where(ends, -jnp.inf, score), N)
    parent = _take(parent, kept)
    cache = jax.tree.map(
        lambda x: _take(x.reshape(B, N, *x.shape[1:]), parent).reshape(x.shape), cache)
    return Beams(position + 1, _take(ids, kept), live_score, finished, finished_score, cache)

  nothing = jnp.full((B, N, 1 + max_length), PAD, jnp.int32)
  none = jnp.full((B, N), -jnp.inf)   # the search starts from one hypothesis, or none for filler
  state = jax.lax.while_loop(unfinished, advance, Beams(
      jnp.int32(0), nothing, none.at[:, 0].set(jnp.where(real, 0.0, -jnp.inf)), nothing[:, 0],
      none[:, 0], model.init_cache(encoded, max_length)))
  any_finished = state.finished_score[:, None] > -jnp.inf
  ids = jnp.where(any_finished, state.finished, state.live[:, 0])
  return jnp.where(real[:, None], ids[:, 1:], PAD)


def length_penalty(length, alpha: float) -> jax.Array:
  """((5 + length) / 6)^alpha, which divides a log-probability (Wu et al. 2016, eq. 14)."""
  return ((5.0 + length) / 6.0)**alpha


def _real(batch: dict) -> jax.Array:
  """(B,) bool, False for filler examples."""
  return (batch['encoder_input'] != PAD).any(axis=1)


def _forbid_pad(logits: jax.Array) -> jax.Array:
  """(..., V) with -inf for pad."""
  return logits.at[..., PAD].set(-jnp.inf)


def _repeat(x: jax.Array, N: int) -> jax.Array:
  """(B, ...) -> (B*N, ...), each example N times in succession."""
  return jnp.broadcast_to(x[:, None], (x.shape[0], N, *x.shape[1:])).reshape(-1, *x.shape[1:])


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """(B, N, ...), (B, n) -> (B, n, ...): n of each example's N entries, on the example's device."""
  return jax.vmap(lambda entries, i: entries[i])(x, index)


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """jax.lax.top_k of (B, n) on each device alone: the compiler would gather the whole batch."""
  return sharding.over_groups(lambda x, weights, **_: (jax.lax.top_k(x, k), ()))(x, ())[0]
