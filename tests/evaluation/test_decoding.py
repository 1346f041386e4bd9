"""Decoding step by step is the whole forward, and the searches are what their names say."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.evaluation import decoding
from moejax.models import t5
from moejax.moe import routing
from moejax.moe.layer import MoEConfig
from tests.models.helpers import made

B, M, L = 6, 7, 6
DENSE = t5.config('tiny')
# Capacity as in decoding, one slot per token, so that the whole forward drops nothing either.
TOP_2 = MoEConfig(layers='1', num_experts=4, router='top_k', k=2, eval_capacity_factor=4.0)
MOE = dataclasses.replace(
    DENSE, decoder_moe=TOP_2,
    encoder_moe=MoEConfig(layers='1', num_experts=4, eval_capacity_factor=4.0))


def short(**changes):
  """One block to each stack, and changes to the decoder's MoE."""
  return dataclasses.replace(DENSE, encoder_layers=1, decoder_layers=1,
                             decoder_moe=dataclasses.replace(TOP_2, layers='0', **changes))


CONFIGS = {
    'dense': DENSE,
    'top-2': MOE,
    'top-1, groups of 3': short(k=1, group_size=3 * L),
    'sigmoid, shared, fine-grained, grouped': short(
        score='sigmoid', renormalize=True, bias_rate=0.1, shared_experts=1, granularity=2,
        dispatch='grouped'),
    'top-p, einsum': short(router='top_p', p=0.5, k=3, dispatch='einsum'),
    'norm': short(router='norm'),
}


def make_batch(V=64):
  """Sources of all lengths; targets without pad, so that every position counts."""
  rng = np.random.default_rng(1)
  source = rng.integers(1, V, (B, M)) * (np.arange(M) < rng.integers(2, M + 1, (B, 1)))
  target = rng.integers(1, V, (B, L))
  return {'encoder_input': source, 'target': target,
          'decoder_input': np.pad(target, ((0, 0), (1, 0)))[:, :-1],
          'weight': np.ones((B, L), np.float32), 'index': np.arange(B)}


@functools.cache
def stepper(config):
  """Jitted (params, batch) -> logits (B, L, V), a step at a time; and its cache."""
  model = models.build(config)

  def run(params, batch):
    encoded = model.encode(params, batch)
    ids = jnp.asarray(batch['decoder_input'])

    def step(cache, position):
      logits, cache = model.decode_step(params, encoded, cache, ids[:, position], position)
      return cache, logits
    empty = model.init_cache(encoded, ids.shape[1])
    cache, logits = jax.lax.scan(step, empty, jnp.arange(ids.shape[1]))
    return logits.swapaxes(0, 1), cache
  return jax.jit(run)


def lively(config):
  """Parameters with stronger cross-attention and head, the latter above all for eos.

  Decoding then follows the source, does not stay with one token, and ends now here, now there.
  """
  def stronger(path, leaf):
    leaf = 3 * leaf if 'cross_attention/o' in path or 'head' in path else leaf
    return leaf * np.where(np.arange(leaf.shape[1]) == t5.EOS, 3, 1) if 'head' in path else leaf
  return trees.map_with_path(stronger, made(config)[1])


@pytest.mark.parametrize('name', CONFIGS)
def test_steps_are_the_whole_forward(name):
  _, params, apply = made(CONFIGS[name])
  batch = make_batch()
  whole = np.asarray(apply(params, batch)[0])
  steps, _ = stepper(CONFIGS[name])(params, batch)
  np.testing.assert_allclose(steps, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize('k', [2, 4])
def test_steps_in_bfloat16_are_near_float32_and_give_float32(k, monkeypatch):
  """Every token, but one that rounding has sent to another expert: that it did is looked up."""
  seen, real = [], routing.top_k

  def noting(*args, **kwargs):
    chosen = real(*args, **kwargs)
    jax.debug.callback(lambda e: seen.append(np.sort(e[:, 0])), chosen.expert, ordered=True)
    return chosen
  monkeypatch.setattr(routing, 'top_k', noting)

  def decoded(config):   # not the cached stepper: its routing is not noted
    seen.clear()
    logits, cache = stepper.__wrapped__(config)(params, make_batch())
    jax.effects_barrier()
    experts = np.stack(seen)                                            # (L * sparse layers, B, k)
    return np.asarray(logits), cache, experts.reshape(logits.shape[1], -1, *experts.shape[1:])
  wide_config = dataclasses.replace(MOE, decoder_moe=dataclasses.replace(TOP_2, k=k))
  config = dataclasses.replace(wide_config, dtype='bfloat16')
  params = made(config)[1]
  steps, cache, experts = decoded(config)
  assert steps.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}
  wide, _, wide_experts = decoded(wide_config)
  error = np.abs(steps - wide).max(-1) / np.abs(wide).max()             # (B, L), of each token
  moved = (experts != wide_experts).any((1, 3)).T                       # (B, L)
  assert 1e-5 < error[~moved].max() < 0.05
  assert np.median(error) < 0.015 and moved.sum() <= (k < 4)   # 4: all of them, there is no other


def test_steps_drop_nothing_where_the_forward_does():
  """One slot per expert and sequence: the forward drops, and what it drops leaks the future.

  A later token whose first choice takes the slot pushes out an earlier one's second choice. That is
  how the public code places tokens too; decoding, where nothing is dropped, is causal.
  """
  tight, roomy = short(eval_capacity_factor=0.1), short()
  _, params, apply = made(tight)
  batch, other = make_batch(), make_batch()
  other['decoder_input'][:, -1] = 1 + other['decoder_input'][:, -1] % 63
  steps = stepper(tight)(params, batch)[0]
  np.testing.assert_allclose(steps, made(roomy)[2](params, batch)[0], rtol=1e-4, atol=1e-5)
  a, b = (np.asarray(apply(params, x)[0])[:, :-1] for x in (batch, other))
  assert np.abs(a - steps[:, :-1]).max() > 1e-2
  assert np.abs(a - b).max() > 1e-2
  after = stepper(tight)(params, other)[0]
  np.testing.assert_array_equal(steps[:, :-1], after[:, :-1])
  assert (np.abs(steps - after)[:, -1].max(-1) > 1e-3).all()


# Searches by the whole forward, in Python.

def log_probs_after(apply, params, source):
  """prefix -> (V,) log-probabilities, pad excepted, of the token after it, without any cache."""
  @functools.cache
  def after(prefix):
    ids = np.zeros((B, L), np.int32)
    ids[:, 1:len(prefix) + 1] = prefix
    batch = make_batch() | {'encoder_input': np.stack([source] * B), 'decoder_input': ids}
    logits = np.asarray(apply(params, batch)[0], np.float64)[0, len(prefix)]
    logp = logits - np.log(np.exp(logits).sum())
    logp[t5.PAD] = -np.inf
    return logp
  return lambda prefix: after(tuple(prefix))


def penalty(length, alpha):
  return ((5 + length) / 6)**alpha


def naive_greedy(after):
  ids = []
  while len(ids) < L and t5.EOS not in ids:
    ids.append(int(after(ids).argmax()))
  return ids


def naive_beam(after, beams, alpha):
  best_first = lambda items: sorted(items, key=lambda item: -item[0])
  live, done = [(0.0, [])], []
  for n in range(1, L + 1):
    if len(done) == beams and live[0][0] / penalty(L, alpha) <= done[-1][0]:
      break
    found = best_first((score + logp, [*ids, token]) for score, ids in live
                       for token, logp in enumerate(after(ids)) if logp > -np.inf)
    ends = [(score / penalty(n, alpha), ids) for score, ids in found[:beams] if ids[-1] == t5.EOS]
    done = best_first(done + ends)[:beams]
    live = [item for item in found if item[1][-1] != t5.EOS][:beams]
  return (done or live)[0][1]


def padded(ids):
  return [*ids] + [t5.PAD] * (L - len(ids))


@functools.cache
def search(config, beams=0):
  """Jitted (params, batch, alpha) -> ids (B, L) by beam search, or greedy if beams is 0."""
  model = models.build(config)
  if not beams:
    return jax.jit(lambda params, batch, alpha: decoding.greedy(model, params, batch, L))
  return jax.jit(lambda params, batch, alpha: decoding.beam_search(
      model, params, batch, L, beams, alpha))


@pytest.mark.parametrize('config', [DENSE, MOE], ids=['dense', 'moe'])
def test_greedy_is_the_most_probable_token_of_the_whole_forward(config):
  apply, params, batch = made(config)[2], lively(config), make_batch()
  ids = np.asarray(search(config)(params, batch, 0.0))
  for row, source in zip(ids, batch['encoder_input']):
    assert row.tolist() == padded(naive_greedy(log_probs_after(apply, params, source)))
  ends = (ids == t5.EOS).argmax(1)[(ids == t5.EOS).any(1)]
  assert len(set(ends)) > 1 and len(ends) < B   # ended here, there, and not at all
  assert ids.dtype == np.int32 and ids.shape == (B, L)


def test_a_beam_of_one_is_greedy():
  params, batch = lively(MOE), make_batch()
  a, b = (search(MOE, beams)(params, batch, 0.0) for beams in (0, 1))
  np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('beams', [2, 4])
def test_beam_search_is_the_naive_one(beams):
  apply, params, batch = made(MOE)[2], lively(MOE), make_batch()
  afters = [log_probs_after(apply, params, source) for source in batch['encoder_input']]
  found = []
  for alpha in (0.0, 0.6, 3.0):
    ids = search(MOE, beams)(params, batch, alpha).tolist()
    assert ids == [padded(naive_beam(after, beams, alpha)) for after in afters]
    found.append(ids)
  assert found[0] != found[-1] and found[0] != search(MOE)(params, batch, 0.0).tolist()


def test_a_wide_beam_finds_the_best_of_all():
  """Four ids, two tokens: all 63 sequences that end, scored by the whole forward."""
  V, tokens = 4, (2, 3)
  config = dataclasses.replace(DENSE, vocab_size=V)
  apply, params, batch = made(config)[2], lively(config), make_batch(V)
  bodies = (itertools.product(tokens, repeat=n) for n in range(L))
  every = [[*body, t5.EOS] for body in itertools.chain(*bodies)]
  assert len(every) == 63
  logp = np.zeros((B, len(every)))
  for i, ids in enumerate(every):
    target = np.tile(padded(ids), (B, 1))
    shifted = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    logits = np.asarray(apply(params, batch | {'decoder_input': shifted})[0], np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    logp[:, i] = np.take_along_axis(logits, target[..., None], 2)[:, :len(ids), 0].sum(1)
  lengths = np.array([len(ids) for ids in every])
  found = []
  for alpha in (0.0, 0.6, 2.0):
    best = (logp / penalty(lengths, alpha)).argmax(1)
    # 32 live hypotheses at most, hence 96 candidates for the last token.
    ids = search(config, 96)(params, batch, alpha).tolist()
    assert ids == [padded(every[i]) for i in best]
    found.append(ids)
  assert found[0] != found[1] != found[2]     # longer ones gain


# What surrounds the model: endings, fillers, other rows.

def scripted(scripts, V=8):
  """A model whose most probable output of row i is scripts[i]; it notes down its steps."""
  scripts = jnp.asarray(scripts)
  calls = []

  def decode_step(params, encoded, cache, ids, position):
    jax.debug.callback(lambda *call: calls.append([np.asarray(x).tolist() for x in call]),
                       position, ids, ordered=True)
    token = scripts[encoded, jnp.minimum(position, scripts.shape[1] - 1)]
    return 5.0 * jax.nn.one_hot(token, V), cache
  model = types.SimpleNamespace(
      encode=lambda params, batch: batch['encoder_input'][:, 0],
      init_cache=lambda encoded, length: {'kept': jnp.zeros((encoded.shape[0], length))},
      decode_step=decode_step)
  return model, calls


def decoded(run, model, source, length):
  ids = jax.jit(lambda batch: run(model, {}, batch, length))({'encoder_input': jnp.array(source)})
  jax.effects_barrier()
  return ids.tolist()


SEARCHES = pytest.mark.parametrize('run', [
    decoding.greedy, functools.partial(decoding.beam_search, beams=1, alpha=0.0)],
    ids=['greedy', 'beam'])


@SEARCHES
def test_decoding_ends_with_eos_and_stops_with_the_last_row(run):
  model, calls = scripted([[0] * 4, [4, 1, 5, 5], [3, 4, 1, 6], [1, 7, 7, 7]])
  ids = decoded(run, model, [[1, 0], [2, 9], [3, 9], [0, 0]], 9)
  assert ids == [[4, 1] + [0] * 7, [3, 4, 1] + [0] * 6, [1] + [0] * 8, [0] * 9]
  assert [position for position, _ in calls] == [0, 1, 2]
  assert calls[0][1] == [0, 0, 0, 0]            # pad starts every sequence
  assert [last[1] for _, last in calls] == [0, 3, 4]


@SEARCHES
def test_decoding_ends_at_max_length(run):
  model, calls = scripted([[0] * 4, [4, 5, 6, 1]])
  assert decoded(run, model, [[1]], 3) == [[4, 5, 6]] and len(calls) == 3


@SEARCHES
def test_a_batch_of_fillers_takes_no_step(run):
  model, calls = scripted([[0, 0]])
  assert decoded(run, model, [[0, 0], [0, 0]], 4) == [[0] * 4] * 2 and calls == []


@SEARCHES
def test_pad_is_never_chosen(run):
  """Though the most probable; all others are alike, so that the first of them, eos, is taken."""
  model, _ = scripted([[0] * 4, [0] * 4])
  assert decoded(run, model, [[1]], 4) == [[1, 0, 0, 0]]


def test_neither_padding_nor_the_rest_of_the_batch_matters():
  params, batch = lively(MOE), make_batch()
  run = lambda source: np.asarray(search(MOE, 2)(params, {'encoder_input': source}, 0.6))
  source = batch['encoder_input']
  ids = run(source)
  assert len({tuple(row) for row in ids.tolist()}) > 3
  np.testing.assert_array_equal(run(np.pad(source, ((0, 0), (0, 3)))), ids)
  order, filler = [3, 0, 5, 5, 2], np.zeros((1, M), int)
  others = run(np.concatenate([source[order], filler]))
  np.testing.assert_array_equal(others, [*ids[order], [0] * L])


@pytest.mark.parametrize('alpha, wanted, steps', [(0.0, [1, 0, 0, 0, 0], 1),
                                                  (2.0, [2, 3, 4, 1, 0], 4)])
def test_a_longer_hypothesis_may_still_win(alpha, wanted, steps):
  """eos at once has probability 0.4, the sure way 2 3 4 eos 0.3.

  Over penalties of (6/6)^2 = 1 and (9/6)^2 = 2.25, ln 0.4 = -0.92 loses to ln 0.3 / 2.25 = -0.54.
  Without them nothing that is left can beat 0.4 after the first step.
  """
  table = np.full((5, 5), 1e-9)
  table[0] = 0, 0.4, 0.3, 0.15, 0.15
  table[2, 3] = table[3, 4] = table[4, 1] = 1.0
  calls = []

  def decode_step(params, encoded, cache, ids, position):
    jax.debug.callback(calls.append, position, ordered=True)
    return jnp.log(jnp.asarray(table))[ids], cache
  model = types.SimpleNamespace(
      encode=lambda params, batch: batch, init_cache=lambda encoded, length: {},
      decode_step=decode_step)
  run = functools.partial(decoding.beam_search, beams=1, alpha=alpha)
  assert decoded(run, model, [[1]], 5) == [wanted] and len(calls) == steps


def test_length_penalty_by_hand():
  assert decoding.length_penalty(1, 0.6) == 1 and decoding.length_penalty(7, 0) == 1
  assert decoding.length_penalty(7, 2.0) == 4      # (12 / 6)^2
