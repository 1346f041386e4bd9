"""Shards of an MLP and weight scaling: where the function at step 0 is the MLP's, and where not.

N tokens, D model, F hidden units, E experts, G shards of an MLP.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ConfigError
from moejax.moe import presets
from moejax.nn import ACTIVATIONS
from moejax.surgery import upcycle
from moejax.surgery.config import ExpertInit, Gate
from moejax.train import initialize
from moejax.trees import rules
from tests.surgery.states import ADAFACTOR, ADAMW, T5, VIT, make_params, make_state, surgery

D, F, E, G = 8, 16, 8, 4
EXACT = ('relu', 'squared_relu')   # act(s x) = s^n act(x) for s > 0
FORMS = {'plain': ('wi', 'wo'), 'gated': ('wi_gate', 'wi_up', 'wo')}
LAYER = 'params/encoder/layers/00'
ROUTED = 1e-5   # relative error of float32 sums


def make_mlp(form, bias, seed=0):
  rng = np.random.default_rng(seed)
  shapes = {n: (F, D) if n == 'wo' else (D, F) for n in FORMS[form]}
  shapes |= {f'{n}_bias': s[1:] for n, s in shapes.items()} if bias else {}
  return {n: rng.normal(size=s).astype(np.float32) / (1 if n.endswith('_bias') else s[0] ** 0.5)
          for n, s in shapes.items()}


def apply_mlp(weights, x, activation):
  """x (N, D) -> (N, D), as models.layers.MLP has it but in float64 around the activation."""
  act = lambda z: np.asarray(ACTIVATIONS[activation](jnp.asarray(z, jnp.float32)), np.float64)
  project = lambda n, h: h @ weights[n].astype(np.float64) + weights.get(f'{n}_bias', 0.0)
  if 'wi' in weights:
    return project('wo', act(project('wi', x)))
  return project('wo', act(project('wi_gate', x)) * project('wi_up', x))


def best(logits, k):
  """The k largest, of ties the lower number; sums of equal columns may differ in the last bit."""
  return np.argsort(-logits.round(12), kind='stable')[:k]


def apply_moe(weights, kernel, x, activation, gate):
  """x (N, D) through the k best experts of each token, in the plainest way."""
  logits = x @ kernel
  probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  scores = 1 / (1 + np.exp(-logits)) if gate.score == 'sigmoid' else probs
  combine = np.zeros_like(probs)                                    # (N, E)
  for n in range(len(x)):
    chosen = best(logits[n], int(gate.k))
    w = scores[n, chosen]
    if gate.renormalize or gate.score == 'softmax_of_chosen':
      w = w / w.sum()
    combine[n, chosen] = gate.weight_scale * w
  experts = [{name: leaf[e] for name, leaf in weights.items()} for e in range(E)]
  y = np.stack([apply_mlp(expert, x, activation) for expert in experts])
  return np.einsum('NE,END->ND', combine, y)


def upcycle_mlp(mlp, kernel, granularity, **init):
  """(experts, router) of one upcycled layer; kernel (D, E) is what a fresh router would be."""
  source = {f'{LAYER}/mlp/{n}': w for n, w in mlp.items()} | {'params/rest': kernel}
  narrow = lambda n, s: s if n == 'wo_bias' else tuple(F // granularity if d == F else d for d in s)
  target = {f'{LAYER}/moe/experts/{n}': np.zeros((E, *narrow(n, w.shape)), np.float32)
            for n, w in mlp.items()}
  target |= {f'{LAYER}/moe/router/kernel': kernel, 'params/rest': kernel}
  table = upcycle.upcycle_rules(source, target, 'reset', ExpertInit(**init))
  made, _ = rules.apply(rules.plan(table, source, target), source.__getitem__, lambda path: kernel)
  pick = lambda part: {p.split('/')[-1]: v for p, v in made.items() if f'/moe/{part}/' in p}
  return pick('experts'), pick('router')['kernel'].astype(np.float64)


def gap(form, activation, bias, gate, *, granularity=G, router=1.0, **init):
  """Largest difference of MoE and MLP at step 0, relative to the MLP's largest output."""
  mlp, rng = make_mlp(form, bias), np.random.default_rng(1)
  kernel = router * rng.normal(size=(D, E)).astype(np.float32)
  x = rng.normal(size=(20, D))
  gates = {'encoder': gate}
  experts, kernel = upcycle_mlp(mlp, kernel, granularity, gates=gates,
                                squared=activation == 'squared_relu', **init)
  expected = apply_mlp(mlp, x, activation)
  return np.abs(apply_moe(experts, kernel, x, activation, gate) - expected).max() / np.abs(
      expected).max()


# Weights whose sum does not depend on the router: any router will do.
SUMMED = (Gate(G, renormalize=True), Gate(2 * G, renormalize=True),
          Gate(G, score='softmax_of_chosen'),
          Gate(G, score='sigmoid', renormalize=True, weight_scale=2.5))
# The others need a router without preferences.
UNIFORM = (Gate(G), Gate(2 * G), Gate(G, weight_scale=16.0), Gate(G, score='sigmoid'))


@pytest.mark.parametrize('moe, begins', [
    (presets.deepseek_moe(num_experts=E), 0.19),   # 6 / 8 / 4
    (presets.deepseek_v3(num_experts=E), 0.63)], ids=['deepseek_moe', 'deepseek_v3'])
def test_what_the_docs_say_of_how_far_below_the_mlp_presets_begin(moe, begins):
  """The routed experts' output along the MLP's, over tokens that choose all kinds of shards."""
  mlp, rng = make_mlp('gated', False), np.random.default_rng(1)
  gate, x = initialize._gate(moe, 'k'), rng.normal(size=(4000, D))
  kernel = 1e-3 * rng.normal(size=(D, E)).astype(np.float32)
  experts, kernel = upcycle_mlp(mlp, kernel, moe.granularity)
  nudged = kernel + 1e-6 * rng.normal(size=(D, E))   # as rounding or noise break ties
  expected = apply_mlp(mlp, x, 'silu')
  found = apply_moe(experts, nudged, x, 'silu', gate)
  assert (found * expected).sum() / (expected**2).sum() == pytest.approx(begins, abs=0.01)


@pytest.mark.parametrize('scaling', ['output', 'all'])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_where_scaling_is_exact(form, activation, scaling):
  """Of all matrices: for homogeneous activations. With others the layer resembles the MLP."""
  for bias in (False, True):
    gaps = [gap(form, activation, bias, gate, scaling=scaling) for gate in SUMMED]
    gaps += [gap(form, activation, bias, gate, scaling=scaling, router=0.0) for gate in UNIFORM]
    if scaling == 'output' or activation in EXACT:
      assert max(gaps) < ROUTED
    else:
      changed = [g for g, gate in zip(gaps, SUMMED + UNIFORM)
                 if abs(G / gate.total(E) - 1) > 1e-6]
      assert len(changed) >= 6
      assert min(changed) > 0.01 and max(changed) < 0.3


def test_the_published_factor():
  """E G^2 / T of the paper's E groups of G and T experts per token: E8G8T8 -> 8, E8G1T1 -> 8."""
  for groups, granularity, k in ((8, 8, 8), (8, 8, 16), (8, 1, 1), (8, 1, 2)):
    gate = Gate(k)
    assert granularity / gate.total(groups * granularity) == pytest.approx(
        groups * granularity**2 / k)


def test_a_nearly_uniform_router_is_nearly_exact():
  """As a router starts, N(0, 0.02), the softmax is uniform but for a few hundredths."""
  assert 1e-4 < gap('gated', 'silu', False, Gate(G), scaling='output', router=0.02) < 0.1


def test_without_scaling_the_output_is_a_share_of_the_mlps():
  """T / G of it, bias included: one half with weights that sum to 1, in two shards."""
  mlp, rng = make_mlp('plain', True), np.random.default_rng(1)
  x, kernel = rng.normal(size=(20, D)), rng.normal(size=(D, E))
  gate = Gate(2, renormalize=True)
  experts, kernel = upcycle_mlp(mlp, kernel, 2)
  y = apply_moe(experts, kernel, x, 'gelu_tanh', gate)
  np.testing.assert_allclose(y, apply_mlp(mlp, x, 'gelu_tanh') / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scaling', ['none', 'output', 'all'])
@pytest.mark.parametrize('form', FORMS)
def test_identical_experts_are_the_mlp(form, scaling):
  """G = 1 and weights that sum to 1: nothing is scaled, the experts are copies bit for bit."""
  gate = Gate(2, renormalize=True)
  assert gap(form, 'gelu_tanh', True, gate, granularity=1, scaling=scaling) < ROUTED
  mlp = make_mlp(form, True)
  experts, kernel = upcycle_mlp(mlp, np.ones((D, E)), 1, scaling=scaling,
                                gates={'encoder': gate})
  for name, leaf in experts.items():
    np.testing.assert_array_equal(leaf, np.broadcast_to(mlp[name], leaf.shape))


def test_every_token_gets_whole_mlps():
  """The k = G best experts of a token are the G different shards."""
  rng = np.random.default_rng(0)
  _, kernel = upcycle_mlp(make_mlp('plain', False), rng.normal(size=(D, E)), G)
  logits = rng.normal(size=(50, D)) @ kernel
  chosen = np.stack([best(row, G) for row in logits])
  assert (np.sort(chosen % G, axis=1) == np.arange(G)).all()
  assert len({tuple(sorted(c)) for c in chosen}) == E // G   # and every MLP has its tokens


@pytest.mark.parametrize('config', [ADAMW, ADAFACTOR], ids=['adamw', 'adafactor'])
def test_shards_start_without_moments(config):
  mlp = VIT
  source = make_state(make_params(mlp, {}), config)
  target = make_state(make_params(mlp, {'encoder': (1,)}, E=4, G=2), config, steps=0)
  gates = {'encoder': Gate(2, renormalize=True)}
  table = upcycle.upcycle_rules(source, target, 'carry', ExpertInit(scaling='output', gates=gates))
  made, entries = surgery(table, source, target)
  fates = {e.target: e.fate for e in entries}
  path = 'encoder/layers/01/moe/experts'
  for name, fate in (('wi', 'sharded'), ('wi_bias', 'sharded'), ('wo', 'sharded, scaled'),
                     ('wo_bias', 'tiled')):   # T = 1: wo_bias is the MLP's in every expert
    assert fates[f'params/{path}/{name}'] == fate
    np.testing.assert_array_equal(made[f'opt_state/{path}/{name}/count'],
                                  [3 if name == 'wo_bias' else 0] * 4)
    for leaf in (p for p in made if p.startswith(f'opt_state/{path}/{name}/')):
      assert np.any(made[leaf]) == (name == 'wo_bias'), leaf


def test_the_stack_decides():
  """Each stack has its own gate; one without a gate is refused, as is a k of parts of an MLP."""
  stacks = ('encoder', 'decoder')
  source = make_state(make_params(T5, {}, stacks, depth=1), ADAMW)
  target = make_state(make_params(T5, {'encoder': (0,), 'decoder': (0,)}, stacks, depth=1, E=4,
                                  G=2), ADAMW, steps=0)
  gates = {'encoder': Gate(2, renormalize=True), 'decoder': Gate(2)}
  make = lambda gates: surgery(upcycle.upcycle_rules(
      source, target, 'carry', ExpertInit(scaling='output', gates=gates)), source, target)[0]
  made = make(gates)
  for stack, c in (('encoder', 2), ('decoder', 4)):   # G; E G / k = 4 * 2 / 2
    np.testing.assert_allclose(made[f'params/{stack}/layers/00/moe/experts/wo'][0],
                               c * source[f'params/{stack}/layers/00/mlp/wo'][:3], rtol=1e-6)
  with pytest.raises(ConfigError, match="scaling: got 'output', allowed: 'none' in decoder"):
    make({'encoder': gates['encoder']})
  with pytest.raises(ConfigError, match='decoder_moe.k: got 3, allowed: a multiple of .*2'):
    make(gates | {'decoder': Gate(3, key='config.model.decoder_moe.k')})
  make(gates | {'decoder': Gate(1.25, multiple=False)})   # expert choice: shards tie anyway
