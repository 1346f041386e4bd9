"""Auxiliary losses that keep routers healthy, and the telemetry that shows whether they are.

Everything is float32 and comes as sums over groups, never as means: sums can be added over groups,
devices, microbatches and eval batches, and the mean is formed once, from totals.

Dimensions: G groups, S tokens per group, E experts, C slots, K choices.
"""

import jax
import jax.numpy as jnp

from moejax.moe.routing import SlotRouting, TokenRouting


def load_balance(probs: jax.Array, routing: TokenRouting, mask: jax.Array, *,
                 first_only: bool = False) -> jax.Array:
  """Load-balance loss of each group: E * sum_e f_e p_e (Switch eq. 4-6).

  f_e is the fraction of the group's assignments that go to expert e (sums to 1 for any K, before
  any drop), p_e the mean probability of e over real tokens. Balanced value 1, worst E. flaxformer's
  f sums to K, so its loss weight w is K * w here. The gradient flows through p alone.

  Args:
    probs: (G, S, E) float32, the softmax the router took its weights from (not softmaxed again).
    routing: TokenRouting before placement.
    mask: (G, S) bool, False at padding.
    first_only: f_e counts first choices only, as GShard, Mesh TensorFlow and vmoe do.

  Returns:
    (G,) float32; 0 for a group of padding only.
  """
  E = probs.shape[-1]
  if first_only:
    routing = jax.tree.map(lambda a: a[..., :1], routing)
  f = _assignments(routing, E)                                                     # (G, E)
  f = f / jnp.maximum(f.sum(-1, keepdims=True), 1)
  p = jnp.where(mask[..., None], probs, 0.0).sum(1)                                # (G, E)
  p = p / jnp.maximum(mask.sum(1), 1)[:, None]
  return E * (f * p).sum(-1)


def router_z(logits: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over each group's real tokens of logsumexp(logits)^2 (ST-MoE eq. 5); (G,) float32.

  Divide the total by the number of real tokens for the loss.
  """
  z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)         # (G, S)
  return jnp.where(mask, z**2, 0.0).sum(1)


def entropy_penalty(probs: jax.Array, mask: jax.Array) -> jax.Array:
  """Sum over each group's real tokens of the entropy of probs (Huang et al. 2024, 2403.07652).

  Keeps gates of top-p routing from going flat, which would make every token ask for every expert.
  Divide the total by the number of real tokens for the loss.

  Args:
    probs: (G, S, E) float32.
    mask: (G, S) bool, False at padding.

  Returns:
    (G,) float32, nats.
  """
  return jnp.where(mask, _entropy(probs), 0.0).sum(1)


def importance(weights: jax.Array, mask: jax.Array) -> jax.Array:
  """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6-7).

  0 if each expert has the same, E - 1 if one has all. Says nothing of how many tokens that is:
  `load` does.

  Args:
    weights: (G, S, E) float32: Shazeer's are the sparse gates (`gates`), V-MoE's the softmax over
      all experts, before noise.
    mask: (G, S) bool, False at padding.

  Returns:
    (G,) float32; 0 for a group of padding only.
  """
  return _cv_squared(jnp.where(mask[..., None], weights, 0.0).sum(1))


def gates(routing: TokenRouting, num_experts: int) -> jax.Array:
  """(G, S, E) float32 weight of each expert for each token, 0 where not chosen."""
  hot = jax.nn.one_hot(routing.expert, num_experts)                 # (G, S, K, E)
  return (hot * routing.weight[..., None]).sum(2)


def load(clean: jax.Array, noisy: jax.Array, std: jax.Array | float, k: int, mask: jax.Array, *,
         exclude_self: bool) -> jax.Array:
  """Squared coefficient of variation of experts' expected loads (Shazeer et al. 2017, eq. 8-11).

  How many tokens choose an expert has no gradient. Its expectation has, if the noise of that expert
  were drawn again while all else stays: Phi((clean - threshold) / std), where the threshold is what
  the expert's noisy logit must exceed.

  Args:
    clean: (G, S, E) logits before noise.
    noisy: (G, S, E) logits the router took its top k from.
    std: > 0, standard deviation of the noise; a number (V-MoE: noise_std / E) or (G, S, E)
      (Shazeer: softplus of a learned map of the token).
    k: experts per token, 1 <= k <= E.
    mask: (G, S) bool, False at padding.
    exclude_self: the threshold is the k-th largest of the other experts' noisy logits (Shazeer;
      at k = E nothing has to be exceeded and every probability is 1); else the k-th largest of all,
      the expert's own old draw among them (vmoe).

  Returns:
    (G,) float32; 0 for a group of padding only.
  """
  E = clean.shape[-1]
  clean, noisy = clean.astype(jnp.float32), noisy.astype(jnp.float32)
  if exclude_self and k == E:
    chosen = jnp.ones_like(clean)
  else:
    top = jax.lax.top_k(noisy, k + exclude_self)[0]                 # (G, S, k or k + 1)
    kth, last = top[..., k - 1:k], top[..., -1:]                    # last: kth, or the one after it
    threshold = jnp.where(noisy >= kth, last, kth)                  # (G, S, E)
    # Far below float32's useful range a softplus is 0, and 0/0 or 0 * inf would follow.
    std = jnp.maximum(std, 1e-6)
    chosen = jax.scipy.stats.norm.cdf((clean - threshold) / std)
  return _cv_squared(jnp.where(mask[..., None], chosen, 0.0).sum(1))


def asked(routing: TokenRouting, num_experts: int) -> jax.Array:
  """(E,) float32, assignments each expert was asked for by all groups, before any drop."""
  return _assignments(routing, num_experts).sum(0)


def update_bias(bias: jax.Array, asked: jax.Array, rate: float) -> jax.Array:
  """The router's bias after a step: up by rate if underloaded, else down (2408.15664, algorithm 1).

  Args:
    bias: (E,) float32 added to the scores for selection.
    asked: (E,) assignments per expert of the whole batch (of all devices) that used this bias. Only
      later batches may see the result: within the batch it would leak later tokens.
    rate: step in units of score, >= 0 (1e-3 is usual).

  Returns:
    (E,) float32; an expert at exactly the mean load keeps its bias.
  """
  # Without a division, which compilers may round so that an expert at the mean would move.
  return bias + rate * jnp.sign(asked.sum() - asked.size * asked)


def telemetry(routing: SlotRouting | TokenRouting, probs: jax.Array, mask: jax.Array,
              asked: jax.Array | None = None) -> dict:
  """What became of the tokens, as float32 sums over all groups.

  Args:
    routing: who meets whom: the slots after capacity, or, where nothing is dropped, the choices.
    probs: (G, S, E) float32 router probabilities.
    mask: (G, S) bool, False at padding.
    asked: scalar, valid choices before capacity; None: as many as there are in `routing` (expert
      choice, where tokens do not ask, or no capacity).

  Returns:
    dict of scalars 'tokens' (real ones), 'assigned' (assignments asked for), 'dropped' (asked for
    and not placed), 'unchosen' (real tokens without any expert), 'single' (with exactly one),
    'entropy' (of probs, nats, summed over real tokens), and 'load' (E,), assignments per expert.
  """
  G, S, E = probs.shape
  valid = routing.valid.astype(jnp.float32)
  if isinstance(routing, TokenRouting):
    experts, load = valid.sum(2), _assignments(routing, E).sum(0)
  else:
    experts = jnp.zeros((G, S)).at[jnp.arange(G)[:, None, None], routing.index].add(valid)
    load = valid.sum((0, 2))
  placed = valid.sum()
  assigned = placed if asked is None else asked
  return jax.lax.stop_gradient({
      'tokens': mask.sum(dtype=jnp.float32),
      'load': load,
      'assigned': assigned,
      'dropped': assigned - placed,
      'unchosen': (mask & (experts == 0)).sum(dtype=jnp.float32),
      'single': (mask & (experts == 1)).sum(dtype=jnp.float32),
      'entropy': entropy_penalty(probs, mask).sum(),
  })


def _assignments(routing: TokenRouting, num_experts: int) -> jax.Array:
  """(G, E) float32, valid choices of each expert."""
  hot = jax.nn.one_hot(routing.expert, num_experts)                 # (G, S, K, E)
  return (hot * routing.valid[..., None]).sum((1, 2))


def _entropy(probs: jax.Array) -> jax.Array:
  """(..., E) -> (...), nats; 0 log 0 = 0."""
  return -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(-1)


def _cv_squared(total: jax.Array) -> jax.Array:
  """(G, E) -> (G,): variance over squared mean, 0 where all are 0."""
  mean = total.mean(-1, keepdims=True)
  return jnp.var(total / jnp.where(mean > 0, mean, 1.0), axis=-1)
