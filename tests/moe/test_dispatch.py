"""Every dispatch against the definition, in value and in every gradient.

`expected` is that definition once more, written for these tests: all experts on all tokens, summed
with a table of weights. The reference loop must equal it, and gather and einsum both.
G groups, S group size, D model, F ffn, E experts, K selected, C capacity.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import dispatch, routing

from . import experts


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  C: int
  k: int = 0            # 0: expert choice
  padding: float = 0.0  # fraction of tokens; group 0 is all padding when it is above 0
  renormalize: bool = False
  G: int = 2
  S: int = 4
  E: int = 3
  D: int = 6
  F: int = 10

  def __str__(self):
    return self.name


CASES = [
  Case('expert choice, overlap and unchosen', S=6, C=2),
  Case('expert choice, renormalised, padding', C=3, padding=0.5, renormalize=True),
  Case('expert choice, all tokens', C=4),
  Case('top-1 with drops', C=1, k=1),
  Case('top-2 with drops and padding', C=1, k=2, padding=0.4),
  Case('top-2 renormalised, no drop', C=4, k=2, renormalize=True),
  Case('every expert', C=4, k=3),
  Case('one expert', E=1, C=4, k=1, padding=0.4),
  Case('one expert of limited capacity', E=1, C=2),
  Case('one token', S=1, C=1, k=2),
]
NAMES = ['gather', 'einsum', 'reference']
# The loop is slow to differentiate; a few cases settle that it is the definition.
EVERY = [(name, case) for name in NAMES for case in CASES
         if name != 'reference' or case in (CASES[0], CASES[4], CASES[7], CASES[9])]


def route(case, logits, mask):
  if case.k:
    tokens = routing.top_k(logits, mask, case.k, renormalize=case.renormalize)
    return routing.place(tokens, case.E, case.C)
  return routing.expert_choice(logits, mask, case.C, renormalize=case.renormalize)


def inputs(case):
  """Logits, tokens, expert weights, mask, and a random cotangent of y."""
  rng = np.random.default_rng([1, case.S, case.E, case.C, case.k])
  G, S, E, D = case.G, case.S, case.E, case.D
  mask = rng.random((G, S)) >= case.padding
  if case.padding:
    mask[0], mask[1:, 0] = False, True
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (draw(G, S, E), draw(G, S, D), experts.random_weights(rng, E, D, case.F),
          jnp.asarray(mask), draw(G, S, D))


def holders(slots, S):
  """SlotRouting -> (G, S, E, C) of 0 and 1: slot c of expert e holds token s (NumPy)."""
  hold = np.zeros((len(slots.index), S, *slots.index.shape[1:]), np.float32)
  for g, e, c in np.argwhere(np.asarray(slots.valid)):
    hold[g, slots.index[g, e, c], e, c] = 1
  return hold


def value_and_gradients(run, case, dtype=jnp.float32):
  """y = run(slots, x, weights, apply), and the gradients of <y, cotangent>, by leaf name."""
  logits, x, weights, mask, cotangent = inputs(case)

  def objective(logits, x, weights):
    y = run(route(case, logits, mask), x.astype(dtype), weights, experts.apply)
    return jnp.sum(y.astype(jnp.float32) * cotangent), y

  differentiate = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
  if run is not dispatch.reference:  # unrolled loops take longer to compile than to run
    differentiate = jax.jit(differentiate)
  (_, y), grads = differentiate(logits, x, weights)
  return {name: np.asarray(leaf) for name, leaf in
          {'y': y, 'logits': grads[0], 'x': grads[1], **grads[2]}.items()}


@functools.cache
def computed(name, case):
  return value_and_gradients(getattr(dispatch, name), case)


@functools.cache
def held(case):
  """(G, S) bool: some expert processes the token; and the concrete slots."""
  logits, _, _, mask, _ = inputs(case)
  slots = jax.jit(functools.partial(route, case))(logits, mask)
  return holders(slots, case.S).any(axis=(2, 3)), slots


@functools.cache
def expected(case, dtype=jnp.float32):
  """The definition: every expert on every token, summed by a (G, S, E) table of weights."""
  G, S, E, D = case.G, case.S, case.E, case.D
  hold = jnp.asarray(holders(held(case)[1], S))

  def combined(slots, x, weights, apply):
    table = jnp.einsum('GSEC,GEC->GSE', hold, slots.weight)
    out = apply(weights, jnp.broadcast_to(x.reshape(1, G * S, D), (E, G * S, D)))
    return jnp.einsum('EGSD,GSE->GSD', out.reshape(E, G, S, D), table)

  return value_and_gradients(combined, case, dtype)


def assert_leaves_close(found, wanted, tolerance):
  """Each leaf within tolerance of the wanted one, as a part of that leaf's largest value."""
  assert found.keys() == wanted.keys()
  for name, want in wanted.items():
    have, want = (np.asarray(a, np.float64) for a in (found[name], want))
    error = np.abs(have - want).max() / max(np.abs(want).max(), 1e-6)
    assert error <= tolerance, f'{name}: {error:.2e} of its largest value'


@pytest.mark.parametrize('name, case', EVERY, ids=str)
def test_dispatch_equals_the_definition_in_value_and_gradients(name, case):
  found = computed(name, case)
  assert found['y'].dtype == np.float32
  assert_leaves_close(found, expected(case), 2e-6)


@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_definition_is_not_vacuous(case):
  """Each case has what its name says, and gradients to compare."""
  mask, wanted, (somewhere, slots) = inputs(case)[3], expected(case), held(case)
  asked = case.k * int(mask.sum()) if case.k else case.G * case.E * case.C
  assert ('drops' in case.name) == (bool(case.k) and int(slots.valid.sum()) < asked)
  assert ('unchosen' in case.name) <= (not somewhere.all())
  assert (case.padding > 0) == (not bool(mask.all()))
  for leaf in ('y', 'x', 'wi_gate', 'wi', 'wo'):
    assert np.abs(wanted[leaf]).max() > 1e-2, leaf
  assert (np.abs(wanted['logits']).max() > 1e-3) == (case.E > 1)


@pytest.mark.parametrize('name, case', EVERY, ids=str)
def test_tokens_in_no_slot_are_exactly_zero(name, case):
  somewhere, found = held(case)[0], computed(name, case)
  np.testing.assert_array_equal(found['y'][~somewhere], 0)
  np.testing.assert_array_equal(found['x'][~somewhere], 0)
  assert (np.abs(found['y'][somewhere]).max(-1) > 0).all()


# Experts that scale: expert 0 by 10, expert 1 by 100 and adds 1 (so an empty slot does not give 0).
# Slots: e0 holds t1 with 1/2 and t0 with 1; e1 holds t1 with 1/4, and its empty slot points at t2.
# y0 = 10 x0; y1 = 5 x1 + (100 x1 + 1) / 4 = 30 x1 + 1/4; y2 = 0.
SCALES = {'scale': jnp.asarray([10.0, 100.0]), 'shift': jnp.asarray([0.0, 1.0])}


def scale(weights, x):
  return x * weights['scale'][:, None, None] + weights['shift'][:, None, None]


@pytest.mark.parametrize('name', NAMES)
def test_dispatch_hand_table(name):
  slots = routing.SlotRouting(jnp.asarray([[[1, 0], [1, 2]]], jnp.int32),
                              jnp.asarray([[[1/2, 1.0], [1/4, 0.0]]]),
                              jnp.asarray([[[True, True], [True, False]]]))
  x = jnp.asarray([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])

  def total(x, weights):
    y = getattr(dispatch, name)(slots, x, weights, scale)
    return jnp.sum(y), y

  both = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (_, y), (gx, gw) = both(x, SCALES)
  np.testing.assert_allclose(y[0], [[10, 20], [90.25, 120.25], [0, 0]], rtol=1e-6)
  np.testing.assert_allclose(gx[0], [[10, 10], [30, 30], [0, 0]], rtol=1e-6)
  # scale: e0 1/2 (3 + 4) + (1 + 2), e1 1/4 (3 + 4); shift: weights times D, the empty slot none.
  np.testing.assert_allclose(gw['scale'], [6.5, 1.75], rtol=1e-6)
  np.testing.assert_allclose(gw['shift'], [3.0, 0.5], rtol=1e-6)


@pytest.mark.parametrize('name', ['gather', 'einsum'])
def test_an_empty_slot_reads_nothing(name):
  """Its expert would overflow on the token it points at, and 0 * inf is not 0."""
  slots = routing.SlotRouting(jnp.asarray([[[0], [1]]], jnp.int32), jnp.asarray([[[1.0], [0.0]]]),
                              jnp.asarray([[[True], [False]]]))

  def total(weights):
    y = getattr(dispatch, name)(slots, jnp.asarray([[[1.0], [3e38]]]), weights, scale)
    return jnp.sum(y), y

  (_, y), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(SCALES)
  np.testing.assert_array_equal(y[0], [[10], [0]])
  np.testing.assert_array_equal(grads['scale'], [1, 0])
  np.testing.assert_array_equal(grads['shift'], [1, 0])


def test_reference_takes_token_routing_and_drops_nothing():
  case = CASES[5]
  logits, x, weights, mask, _ = inputs(case)
  tokens = routing.top_k(logits, mask, case.k, renormalize=case.renormalize)
  y = dispatch.reference(tokens, x, weights, experts.apply)
  np.testing.assert_allclose(y, expected(case)['y'], rtol=1e-5, atol=1e-6)


def test_reference_of_token_routing_by_hand():
  tokens = routing.TokenRouting(jnp.asarray([[[1, 0], [0, 1]]], jnp.int32),
                                jnp.asarray([[[1/4, 1/2], [0.0, 0.0]]]),
                                jnp.asarray([[[True, True], [False, False]]]))
  y = dispatch.reference(tokens, jnp.asarray([[[3.0, 4.0], [5.0, 6.0]]]), SCALES, scale)
  np.testing.assert_allclose(y[0], [[90.25, 120.25], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize('name', ['gather', 'einsum'])
@pytest.mark.parametrize('case', [CASES[1], CASES[4]], ids=str)
def test_dispatch_in_bfloat16(name, case):
  """bfloat16 tokens give bfloat16 outputs; gradients of float32 leaves stay float32."""
  found = value_and_gradients(getattr(dispatch, name), case, jnp.bfloat16)
  assert {name: leaf.dtype for name, leaf in found.items()} == {
    name: jnp.bfloat16 if name == 'y' else np.float32 for name in found}
  # bfloat16 keeps 8 bits, 0.4 %. Against experts that round alike what is left is dispatch's own:
  # the weight, the product, the sum. Against float32 the experts' chain of roundings comes on top.
  assert_leaves_close(found, expected(case, jnp.bfloat16), 0.02)
  assert_leaves_close(found, expected(case), 0.08)


@pytest.mark.parametrize('name', ['gather', 'einsum'])
def test_dispatch_under_jit_with_swapped_groups(name):
  """Groups are independent: their order is the outputs' order."""
  case = CASES[4]
  logits, x, weights, mask, _ = inputs(case)
  function = jax.jit(lambda l, x, m: getattr(dispatch, name)(
    route(case, l, m), x, weights, experts.apply))
  np.testing.assert_allclose(function(logits[::-1], x[::-1], mask[::-1])[::-1],
                             function(logits, x, mask), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('name', ['gather', 'einsum'])
def test_tokens_never_chosen_may_hold_anything(name):
  """A huge token in no slot, padding for instance, touches neither outputs nor gradients."""
  case = CASES[4]
  logits, x, weights, mask, cotangent = inputs(case)
  slots = route(case, logits, mask)

  def run(x):
    def total(weights):
      y = getattr(dispatch, name)(slots, x, weights, experts.apply)
      return jnp.sum(y * cotangent), y
    (_, y), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(weights)
    return y, grads

  filled = jnp.where(mask[..., None], x, 1e6)
  jax.tree.map(np.testing.assert_array_equal, run(x), run(filled))
