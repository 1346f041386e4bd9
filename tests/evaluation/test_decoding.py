"""Decoding step by step equals the whole forward, and the searches equal naive ones in Python."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import models, trees
from moejax.evaluation import decoding
from moejax.models import t5
from moejax.moe.layer import MoEConfig
from tests.models.helpers import made

B, M, L = 6, 7, 6
DENSE = t5.config('tiny')
# Capacity as in decoding, one slot per token, so that the whole forward drops nothing either.
TOP_2 = MoEConfig(layers='0', num_experts=4, router='top_k', k=2, eval_capacity_factor=4.0)


def sparse(**changes):
  """One block to each stack; the decoder's is MoE, top-2 with changes."""
  return dataclasses.replace(DENSE, encoder_layers=1, decoder_layers=1,
                             decoder_moe=dataclasses.replace(TOP_2, **changes))


MOE = sparse()
CONFIGS = {
    'dense': DENSE,
    'top-2 in the second of two blocks': dataclasses.replace(
        DENSE, decoder_moe=dataclasses.replace(TOP_2, layers='1'),
        encoder_moe=MoEConfig(layers='1', num_experts=4, eval_capacity_factor=4.0)),
    'top-1, groups of 3': sparse(k=1, group_size=3 * L),
    'sigmoid, shared, fine-grained, grouped': sparse(
        score='sigmoid', renormalize=True, bias_rate=0.1, shared_experts=1, granularity=2,
        dispatch='grouped'),
    'top-p, einsum': sparse(router='top_p', p=0.5, k=3, dispatch='einsum'),
    'norm': sparse(router='norm'),
}


def make_batch():
  """Sources of all lengths; targets without pad, so that every position counts."""
  rng, V = np.random.default_rng(1), DENSE.vocab_size
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


def test_steps_in_bfloat16_are_near_float32_and_give_float32():
  """With all experts chosen, since rounding may otherwise send a token to another expert."""
  wide = sparse(k=4)
  params = made(wide)[1]
  expected, _ = stepper(wide)(params, make_batch())
  steps, cache = stepper(dataclasses.replace(wide, dtype='bfloat16'))(params, make_batch())
  assert steps.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype('bfloat16')}
  error = np.abs(steps - expected).max(-1) / np.abs(expected).max()      # (B, L)
  assert 1e-5 < error.max() < 0.05 and np.median(error) < 0.015


def test_steps_drop_nothing_where_the_forward_does():
  """One slot per expert and sequence: the forward drops, and what it drops depends on the future.

  A later token whose first choice takes the slot pushes out an earlier token's second choice. The
  public code places tokens so too; decoding, where nothing is dropped, is causal.
  """
  tight, roomy = sparse(eval_capacity_factor=0.1), MOE
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


def test_greedy_is_the_most_probable_token_of_the_whole_forward():
  apply, params, batch = made(MOE)[2], lively(MOE), make_batch()
  ids = np.asarray(search(MOE)(params, batch, 0.0))
  for output, source in zip(ids, batch['encoder_input']):
    assert output.tolist() == padded(naive_greedy(log_probs_after(apply, params, source)))
  ends = (ids == t5.EOS).argmax(1)[(ids == t5.EOS).any(1)]
  assert len(set(ends)) > 1 and len(ends) < B   # at different places, and not at all
  assert ids.dtype == np.int32 and ids.shape == (B, L)
  np.testing.assert_array_equal(search(MOE, 1)(params, batch, 0.0), ids)   # a beam of one


def test_beam_search_is_the_naive_one():
  apply, params, batch = made(MOE)[2], lively(MOE), make_batch()
  afters = [log_probs_after(apply, params, source) for source in batch['encoder_input']]
  outputs = []
  for alpha in (0.0, 0.6, 3.0):
    ids = search(MOE, 3)(params, batch, alpha).tolist()
    assert ids == [padded(naive_beam(after, 3, alpha)) for after in afters]
    outputs.append(ids)
  assert outputs[0] != outputs[-1] and outputs[0] != search(MOE)(params, batch, 0.0).tolist()


# What surrounds the model: endings and filler.

def scripted(scripts, V=8):
  """A model whose most probable output for source i is scripts[i], and a list of its steps."""
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
def test_decoding_ends_with_eos_and_stops_with_the_last_example(run):
  model, calls = scripted([[0] * 4, [4, 1, 5, 5], [3, 4, 1, 6], [1, 7, 7, 7]])
  ids = decoded(run, model, [[1, 0], [2, 9], [3, 9], [0, 0]], 9)
  assert ids == [[4, 1] + [0] * 7, [3, 4, 1] + [0] * 6, [1] + [0] * 8, [0] * 9]
  assert [position for position, _ in calls] == [0, 1, 2]
  assert calls[0][1] == [0, 0, 0, 0]            # pad starts every sequence
  assert [last[1] for _, last in calls] == [0, 3, 4]


@SEARCHES
@pytest.mark.parametrize('script, source, length, expected, steps', [
    ([4, 5, 6, 1], [[1]], 3, [[4, 5, 6]], 3),                    # at most so many tokens
    ([4, 5, 6, 1], [[0, 0], [0, 0]], 4, [[0] * 4] * 2, 0),       # filler alone takes no step
    # Pad is most probable, but never chosen; of the others, all alike, eos is the first.
    ([0] * 4, [[1]], 4, [[1, 0, 0, 0]], 1)], ids=['length', 'filler', 'pad'])
def test_where_decoding_stops(run, script, source, length, expected, steps):
  model, calls = scripted([[0] * 4, script])
  assert decoded(run, model, source, length) == expected and len(calls) == steps


@pytest.mark.parametrize('alpha, expected, steps', [(0.0, [1, 0, 0, 0, 0], 1),
                                                  (2.0, [2, 3, 4, 1, 0], 4)])
def test_a_longer_hypothesis_may_still_win(alpha, expected, steps):
  """eos at once has probability 0.4, and 2 3 4 eos has 0.3.

  Over penalties of (6/6)^2 = 1 and (9/6)^2 = 2.25, ln 0.4 = -0.92 loses to ln 0.3 / 2.25 = -0.54.
  Without penalties no hypothesis left can beat 0.4 after the first step.
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
  assert decoded(run, model, [[1]], 5) == [expected] and len(calls) == steps
