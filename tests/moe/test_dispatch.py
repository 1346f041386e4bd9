"""Every dispatch against the definition, in value and in every gradient.

`expected` is that definition once more, written for these tests: all experts on all tokens, summed
with a table of weights. The reference loop must equal it, and so must gather, einsum and grouped;
the two that take a TokenRouting also on all choices of the tokens, where no capacity drops any.
G groups, S group size, D model, F ffn, E experts, K selected, C capacity.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe import dispatch, placement, routing

from . import experts


@dataclasses.dataclass(frozen=True)
class Case:
  name: str
  C: int
  k: int = 0            # 0: expert choice
  padding: float = 0.0  # fraction of tokens; group 0 is all padding when it is above 0
  renormalize: bool = False
  sort: bool = False       # every token ranks the last expert first and expert 0 last
  take_back: bool = False  # some choices of real tokens are not valid, first ones too
  G: int = 2
  S: int = 4
  E: int = 3
  D: int = 6
  F: int = 10

  def __str__(self):
    return self.name


CASES = [
  # Cases share shapes, for one compilation of many.
  Case('expert choice, overlap and unchosen', C=1),
  Case('expert choice, renormalised, padding', C=2, padding=0.5, renormalize=True),
  Case('expert choice, all tokens', C=4),
  Case('top-1 with drops', C=1, k=1),
  Case('top-2 with drops and padding', C=1, k=2, padding=0.4),
  Case('top-2 renormalised, no drop', C=4, k=2, renormalize=True),
  Case('every expert', C=4, k=3),
  Case('one expert with drops', E=1, C=2, k=1, padding=0.2),
  Case('one expert that chooses', E=1, C=2),
  Case('one token', S=1, C=1, k=2),
  Case('all tokens to one expert', C=4, k=1, sort=True),
  Case('all tokens to one expert with drops', C=2, k=1, sort=True),
  Case('an expert without tokens', C=4, k=2, sort=True, padding=0.4),
  Case('choices taken back', C=4, k=2, take_back=True),
  Case('choices taken back, with drops', C=1, k=3, take_back=True),
  # More rows of an expert than a block of the grouped matmul has, and not a multiple of it.
  Case('several blocks, with drops', S=33, C=21, k=2, D=3, F=4),
]
FAST = ['gather', 'einsum', 'grouped']
NAMES = FAST + ['reference']
# What is computed: by which dispatch, and whether of a TokenRouting.
WAYS = [(name, False) for name in NAMES] + [('grouped', True), ('reference', True)]


def named(*names):
  """Cases by their names."""
  return [next(case for case in CASES if case.name == name) for name in names]


# The loop is slow to differentiate; a few cases settle that it is the definition.
LOOPED = {False: named('expert choice, overlap and unchosen', 'top-2 with drops and padding',
                       'one expert with drops', 'one token'),
          True: named('choices taken back, with drops')}
EVERY = [(way, case) for way in WAYS for case in CASES
         if (way[0] != 'reference' or case in LOOPED[way[1]]) and (case.k or not way[1])]


def route(case, logits, mask, dropless=False):
  if not case.k:
    return routing.expert_choice(logits, mask, case.C, renormalize=case.renormalize)
  tokens = routing.top_k(logits, mask, case.k, renormalize=case.renormalize)
  if case.take_back:
    valid = tokens.valid & ((jnp.arange(case.S)[:, None] + jnp.arange(case.k)) % 3 > 0)
    tokens = tokens._replace(valid=valid, weight=jnp.where(valid, tokens.weight, 0.0))
  return tokens if dropless else placement.place(tokens, case.E, case.C)


def inputs(case):
  """Logits, tokens, expert weights, mask, and a random cotangent of y."""
  rng = np.random.default_rng([1, case.S, case.E, case.C, case.k])
  G, S, E, D = case.G, case.S, case.E, case.D
  mask = rng.random((G, S)) >= case.padding
  if case.padding:
    mask[0], mask[1:, 0] = False, True
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  logits = draw(G, S, E)
  return (jnp.sort(logits, axis=-1) if case.sort else logits, draw(G, S, D),
          experts.random_weights(rng, E, D, case.F), jnp.asarray(mask), draw(G, S, D))


def holders(routed, S, E):
  """(G, S, E, A, B) of 0 and 1: entry (a, b) of the routing is token s at expert e (NumPy)."""
  by_slot = isinstance(routed, routing.SlotRouting)
  chosen = np.asarray(routed.index if by_slot else routed.expert)
  hold = np.zeros((len(chosen), S, E, *chosen.shape[1:]), np.float32)
  for g, a, b in np.argwhere(np.asarray(routed.valid)):
    s, e = (chosen[g, a, b], a) if by_slot else (a, chosen[g, a, b])
    hold[g, s, e, a, b] = 1
  return hold


@functools.cache
def routed(case, dropless):
  """The case's routing, and what carries a cotangent of its weights back to the logits."""
  logits, _, _, mask, _ = inputs(case)

  @jax.jit
  def run(logits):
    def split(logits):
      chosen = route(case, logits, mask, dropless)
      return chosen.weight, chosen
    _, pull, chosen = jax.vjp(split, logits, has_aux=True)
    return chosen, pull
  return run(logits)


@functools.cache
def differentiated(run):
  """(routing, x, weights, cotangent) -> (loss, y), gradients; cases of a shape share it."""
  def objective(weight, x, weights, chosen, cotangent):
    y = run(chosen._replace(weight=weight), x, weights, experts.apply)
    return jnp.sum(y.astype(jnp.float32) * cotangent), y

  differentiate = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
  # Unrolled loops take longer to compile than to run.
  return differentiate if run is dispatch.reference else jax.jit(differentiate)


def value_and_gradients(run, case, dropless, dtype=jnp.float32):
  """y = run(routing, x, weights, apply), and the gradients of <y, cotangent>, by leaf name."""
  _, x, weights, _, cotangent = inputs(case)
  chosen, pull = routed(case, dropless)
  (_, y), grads = differentiated(run)(chosen.weight, x.astype(dtype), weights, chosen, cotangent)
  return {name: np.asarray(leaf) for name, leaf in
          {'y': y, 'logits': pull(grads[0])[0], 'x': grads[1], **grads[2]}.items()}


def processed(case, dropless):
  """(G, S) bool: some expert processes the token."""
  return holders(routed(case, dropless)[0], case.S, case.E).any(axis=(2, 3, 4))


@functools.partial(jax.jit, static_argnames='dtype')
def by_table(table, x, weights, cotangent, dtype):
  """The definition: every expert on every token, summed by a (G, S, E) table of weights."""
  def objective(table, x, weights):
    (G, S, D), E = x.shape, table.shape[-1]
    out = experts.apply(weights, jnp.broadcast_to(x.reshape(1, G * S, D), (E, G * S, D)))
    y = jnp.einsum('EGSD,GSE->GSD', out.reshape(E, G, S, D), table).astype(x.dtype)
    return jnp.sum(y.astype(jnp.float32) * cotangent), y
  return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(table, x.astype(dtype), weights)


@functools.cache
def expected(case, dropless, dtype=jnp.float32):
  """What value_and_gradients returns for a dispatch."""
  _, x, weights, _, cotangent = inputs(case)
  chosen, pull = routed(case, dropless)
  hold = holders(chosen, case.S, case.E)
  table = np.einsum('GSEAB,GAB->GSE', hold, chosen.weight)
  (of_table, of_x, of_weights), y = by_table(table, x, weights, cotangent, dtype)
  of_weight = np.einsum('GSEAB,GSE->GAB', hold, of_table)
  return {name: np.asarray(leaf) for name, leaf in
          {'y': y, 'logits': pull(of_weight)[0], 'x': of_x, **of_weights}.items()}


def assert_leaves_close(found, wanted, tolerance):
  """Each leaf within tolerance of the wanted one, as a part of that leaf's largest value."""
  assert found.keys() == wanted.keys()
  for name, want in wanted.items():
    have, want = (np.asarray(a, np.float64) for a in (found[name], want))
    error = np.abs(have - want).max() / max(np.abs(want).max(), 1e-6)
    assert error <= tolerance, f'{name}: {error:.2e} of its largest value'


@pytest.mark.parametrize('way, case', EVERY, ids=str)
def test_dispatch_equals_the_definition_in_value_and_gradients(way, case):
  """And tokens without an expert are exactly 0 in both."""
  name, dropless = way
  found = value_and_gradients(getattr(dispatch, name), case, dropless)
  assert found['y'].dtype == np.float32
  assert_leaves_close(found, expected(case, dropless), 2e-6)
  somewhere = processed(case, dropless)
  np.testing.assert_array_equal(found['y'][~somewhere], 0)
  np.testing.assert_array_equal(found['x'][~somewhere], 0)
  assert (np.abs(found['y'][somewhere]).max(-1) > 0).all()


# Experts that scale: expert 0 by 10, expert 1 by 100 and adds 1 (so an empty slot does not give 0).
# Slots: e0 holds t1 with 1/2 and t0 with 1; e1 holds t1 with 1/4, and its empty slot points at t2.
# y0 = 10 x0; y1 = 5 x1 + (100 x1 + 1) / 4 = 30 x1 + 1/4; y2 = 0.
SCALES = {'scale': jnp.asarray([10.0, 100.0]), 'shift': jnp.asarray([0.0, 1.0])}


def scale(weights, x, layout=None):
  spread = lambda w: w[:, None, None] if layout is None else layout.expand(w[:, None], x.dtype)
  return x * spread(weights['scale']) + spread(weights['shift'])


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


@pytest.mark.parametrize('name', FAST)
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


@pytest.mark.parametrize('dirty', [False, True])
def test_invalid_choices_and_what_experts_make_of_padding_have_no_effect(dirty):
  """An expert out of range, a weight that is NaN, outputs of padding that are NaN."""
  def apply(weights, buffer, layout):
    out = scale(weights, buffer, layout)
    return jnp.where(layout.valid[:, None], out, jnp.nan) if dirty else out

  tokens = routing.TokenRouting(jnp.asarray([[[1, 7], [-3, 0]]], jnp.int32),
                                jnp.asarray([[[1/4, jnp.nan], [jnp.inf, 1/2]]]),
                                jnp.asarray([[[True, False], [False, True]]]))

  def total(weight, x, weights):
    y = dispatch.grouped(tokens._replace(weight=weight), x, weights, apply)
    return jnp.sum(y), y

  x = jnp.asarray([[[3.0, 4.0], [5.0, 6.0]]])
  differentiate = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
  (_, y), (gweight, gx, gw) = differentiate(tokens.weight, x, SCALES)
  np.testing.assert_allclose(y[0], [[75.25, 100.25], [25, 30]], rtol=1e-6)
  np.testing.assert_allclose(gweight[0], [[702, 0], [0, 110]], rtol=1e-6)
  np.testing.assert_allclose(gx[0], [[25, 25], [5, 5]], rtol=1e-6)
  np.testing.assert_allclose(gw['scale'], [5.5, 1.75], rtol=1e-6)
  np.testing.assert_allclose(gw['shift'], [1.0, 0.5], rtol=1e-6)


def test_padding_of_a_block_reads_nothing():
  """Expert 1 would overflow on token 0, which is expert 0's, and 0 * inf is not 0."""
  tokens = routing.TokenRouting(jnp.asarray([[[0], [1]]], jnp.int32), jnp.ones((1, 2, 1)),
                                jnp.ones((1, 2, 1), bool))

  def total(weight, weights):
    y = dispatch.grouped(tokens._replace(weight=weight), jnp.asarray([[[8.0], [0.5]]]), weights,
                         lambda *args, **how: jnp.exp(scale(*args, **how)))
    return jnp.sum(y), y

  (_, y), (gradient, of_experts) = jax.jit(jax.value_and_grad(
      total, argnums=(0, 1), has_aux=True))(tokens.weight, SCALES)
  a, b = np.exp(8.0 * 10), np.exp(0.5 * 100 + 1)     # and exp(801) is inf
  np.testing.assert_allclose(y[0], [[a], [b]], rtol=1e-4)
  np.testing.assert_allclose(gradient[0], [[a], [b]], rtol=1e-4)
  np.testing.assert_allclose(of_experts['scale'], [8 * a, b / 2], rtol=1e-4)


def test_what_a_dispatch_cannot_take_is_refused():
  _, x, weights, *_ = inputs(CASES[3])
  with pytest.raises(ConfigError, match='config.mesh.expert = 1'):
    dispatch.grouped(routed(CASES[3], False)[0], x, weights, experts.apply, lambda apply: apply)
  for run in (dispatch.gather, dispatch.einsum):
    with pytest.raises(TypeError, match='SlotRouting, got TokenRouting: call placement.place'):
      run(routed(CASES[3], True)[0], x, weights, experts.apply)


@pytest.mark.parametrize('way, case', [
  *((way, 'top-2 with drops and padding') for way in WAYS[:3]),
  (('grouped', True), 'several blocks, with drops')], ids=str)
def test_dispatch_in_bfloat16(way, case):
  """bfloat16 tokens give bfloat16 outputs; gradients of float32 weights stay float32."""
  name, dropless = way
  case, = named(case)
  found = value_and_gradients(getattr(dispatch, name), case, dropless, jnp.bfloat16)
  assert {name: leaf.dtype for name, leaf in found.items()} == {
    name: jnp.bfloat16 if name in ('y', 'x') else np.float32 for name in found}
  # bfloat16 keeps 8 bits, 0.4 %. Against experts that round alike what is left is dispatch's own:
  # the weight, the product, the sum. Against float32 the experts' chain of roundings comes on top.
  assert_leaves_close(found, expected(case, dropless, jnp.bfloat16), 0.02)
  assert_leaves_close(found, expected(case, dropless), 0.08)


@pytest.mark.parametrize('name', FAST)
def test_what_many_slots_add_to_a_token_is_added_in_float32(name):
  """1 and 256 times 1/256 are 2; added one by one in bfloat16 they stay 1. So do gradients."""
  E = 257
  slots = routing.SlotRouting(
      jnp.zeros((1, E, 1), jnp.int32), jnp.where(jnp.arange(E) == 0, 1, 1 / 256)[None, :, None],
      jnp.ones((1, E, 1), bool))
  weights = {'scale': jnp.ones(E), 'shift': jnp.zeros(E)}

  def total(x):
    y = getattr(dispatch, name)(slots, x, weights, scale16)
    return y.astype(jnp.float32).sum(), y
  gradient, y = jax.jit(jax.grad(total, has_aux=True))(jnp.ones((1, 1, 1), jnp.bfloat16))
  assert float(y[0, 0, 0]) == float(gradient[0, 0, 0]) == 2


def scale16(weights, x, layout=None):
  return scale(weights, x, layout).astype(x.dtype)
