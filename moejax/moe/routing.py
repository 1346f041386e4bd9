"""Routers: pure functions from logits to a routing.

A router says which token meets which expert and with what weight; it knows nothing of how tokens
are moved (that is dispatch). There are two ways to say it:

- SlotRouting: each expert has a buffer of C slots and names the token in each slot.
- TokenRouting: each token names its K experts.

Expert choice gives the first directly. Token choice gives the second, and `place` turns it into the
first by filling the buffers in order of priority; what does not fit is dropped. Noise is added to
the logits before they come here; whatever random numbers a rule needs are arguments.

Dimensions: G groups, S tokens per group, E experts, C slots per expert and group, K choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = 'routing'   # what models.stack's policies keep goes by this name


class SlotRouting(NamedTuple):
  """Each expert's buffer names its tokens.

  Attributes:
    index: (G, E, C) int32 in [0, S), the token's position in its group; means nothing if not valid.
    weight: (G, E, C) float32, factor of the expert's output for that token; 0 where not valid.
    valid: (G, E, C) bool, False at empty slots.
  """
  index: jax.Array
  weight: jax.Array
  valid: jax.Array


class TokenRouting(NamedTuple):
  """Each token names its experts, best first.

  Attributes:
    expert: (G, S, K) int32.
    weight: (G, S, K) float32, factor of that expert's output; 0 where not valid.
    valid: (G, S, K) bool, False at padding and at choices a rule took back (top_p, keep_second);
      a real token's first choice is always valid.
  """
  expert: jax.Array
  weight: jax.Array
  valid: jax.Array


def expert_capacity(tokens: int, num_experts: int, factor: float, minimum: int = 1) -> int:
  """Slots per expert and group: factor * S / E, rounded half to even, within [minimum, S].

  No K in the formula: a factor of 2 gives every token two slots on average whichever the router
  (flaxformer's convention; vmoe multiplies by K). Padding counts as tokens.
  """
  return min(max(round(factor * tokens / num_experts), minimum), tokens)


# What experts are ranked by, from float32 logits (G, S, E).
SCORES = {
    'softmax': jax.nn.softmax,
    'softmax_of_chosen': lambda logits: logits,
    'sigmoid': jax.nn.sigmoid,
}


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest along the last axis, with gradient, and where they are."""
  index = _kept(jax.lax.top_k(jax.lax.stop_gradient(values), k)[1])
  return jnp.take_along_axis(values, index, axis=-1), index


def _kept(index: jax.Array) -> jax.Array:
  """What a sort found out: small, and dear to find out again when blocks are rematerialised."""
  return checkpoint_name(index, KEPT)


def probabilities(logits: jax.Array, score: str = 'softmax') -> jax.Array:
  """Each token's distribution over all experts, for balance losses and telemetry.

  Args:
    logits: (G, S, E).
    score: as of `top_k`. 'softmax' and 'softmax_of_chosen': the softmax of the logits; 'sigmoid':
      sigmoid scores divided by their sum (DeepSeek-V3).

  Returns:
    (G, S, E) float32 whatever the dtype of the logits.
  """
  logits = logits.astype(jnp.float32)
  if score == 'sigmoid':   # s / sum(s) = softmax(log s), which is not 0/0 when all scores underflow
    logits = jax.nn.log_sigmoid(logits)
  return jax.nn.softmax(logits, axis=-1)


def expert_choice(logits: jax.Array, mask: jax.Array, capacity: int, *,
                  renormalize: bool = False) -> SlotRouting:
  """Each expert picks its top tokens (Zhou et al. 2022, eq. 1-2).

  Perfectly balanced, so there is no auxiliary loss; but a token's experts depend on the tokens
  after it, so it is not causal and has no place in a decoder.

  Args:
    logits: (G, S, E) router logits.
    mask: (G, S) bool, False at padding: never chosen before a real token, never valid.
    capacity: C, slots per expert and group, 1 <= C <= S.
    renormalize: divide a token's weights by their sum, so that an upcycled model keeps its
      parent's function (Komatsuzaki et al. 2023, B.7). A token nobody chose stays at 0; a token
      with a single expert has weight 1 and gives its router no gradient.

  Returns:
    SlotRouting with C = capacity.
  """
  G, S, E = logits.shape
  probs = jnp.where(mask[..., None], probabilities(logits), -1.0)   # padding ranks last
  weight, index = _top_k(probs.swapaxes(1, 2), capacity)            # (G, E, C)
  valid = weight >= 0
  weight = jnp.where(valid, weight, 0.0)
  if renormalize:
    group = jnp.arange(G)[:, None, None]
    total = jnp.zeros((G, S)).at[group, index].add(weight)          # (G, S)
    total = jnp.where(total > 0, total, 1.0)[group, index]          # (G, E, C)
    weight = weight / total
  return SlotRouting(index, weight, valid)


def top_k(logits: jax.Array, mask: jax.Array, k: int, *, score: str = 'softmax',
          renormalize: bool = False, scale: float = 1.0,
          bias: jax.Array | None = None) -> TokenRouting:
  """Each token picks the k experts it scores highest (Shazeer et al. 2017; Switch at k=1).

  Args:
    logits: (G, S, E) router logits; ties go to the expert with the lower number.
    mask: (G, S) bool, False at padding.
    k: experts per token, 1 <= k <= E.
    score: 'softmax' over all experts, the k largest of which are the weights (V-MoE, Switch, Grok);
      'softmax_of_chosen': softmax over the k largest logits only (Shazeer's softmax(KeepTopK),
      Mixtral); 'sigmoid' of each logit alone (DeepSeek-V3; Wang et al. 2024).
    renormalize: divide a token's k weights by their sum. With 'softmax' that is
      'softmax_of_chosen', which it leaves as it is.
    scale: factor of all weights, after that (2.5 in DeepSeek-V3).
    bias: (E,), or with axes of groups and tokens before it, added to the scores to choose experts,
      never to weigh them, and without gradient (Wang et al. 2024, 2408.15664).

  Returns:
    TokenRouting with K = k, best expert first by score plus bias. At k=1 renormalised weights are
    the constant 1, and so are those of 'softmax_of_chosen': the router gets no gradient from them.
  """
  logits = logits.astype(jnp.float32)
  scores = SCORES[score](logits)                                    # (G, S, E)
  ranked = scores if bias is None else scores + bias
  _, expert = _top_k(ranked, k)                                     # (G, S, K)
  if renormalize or score == 'softmax_of_chosen':
    # As a softmax of log-scores, because a bias can choose experts whose scores all underflow.
    log_scores = jax.nn.log_sigmoid(logits) if score == 'sigmoid' else logits
    weight = jax.nn.softmax(jnp.take_along_axis(log_scores, expert, axis=-1), axis=-1)
  else:
    weight = jnp.take_along_axis(scores, expert, axis=-1)
  valid = jnp.broadcast_to(mask[..., None], expert.shape)
  return TokenRouting(expert, jnp.where(valid, scale * weight, 0.0), valid)


def top_p(logits: jax.Array, mask: jax.Array, p: float, k: int, *, renormalize: bool = False,
          scale: float = 1.0) -> TokenRouting:
  """Each token picks its most probable experts until they sum to p (Huang et al. 2024, 2403.07652).

  An unsure token thus asks for more experts than a sure one, but for one at least. To ask for all,
  a router can make its probabilities flat: `balance.entropy_penalty` is against that.

  Args:
    logits: (G, S, E) router logits; ties go to the expert with the lower number.
    mask: (G, S) bool, False at padding.
    p: probability to reach, 0 < p <= 1: a choice is valid if those before it sum to less.
    k: most experts per token, 1 <= k <= E (K is a static shape; E for no limit).
    renormalize: divide a token's weights by their sum. A token with a single expert then has
      weight 1 and gives its router no gradient.
    scale: factor of all weights, after that.

  Returns:
    TokenRouting with K = k, best expert first, the valid ones in front.
  """
  weight, expert = _top_k(probabilities(logits), k)                 # (G, S, K)
  enough = jnp.cumsum(weight, axis=-1) - weight >= p                # before this choice
  weight = jnp.where(enough, 0.0, weight)
  if renormalize:
    weight = weight / weight.sum(-1, keepdims=True)
  valid = mask[..., None] & ~enough
  return TokenRouting(expert, jnp.where(valid, scale * weight, 0.0), valid)


def keep_second(routing: TokenRouting, uniform: jax.Array, threshold: float) -> TokenRouting:
  """Keeps each token's second choice with probability min(1, w2 / (w1 + w2) / threshold).

  GShard's random routing: where the second expert would add little, save its slot for another token
  (GShard, algorithm 1, where 2 * g2 > uniform is a threshold of 0.5; Mesh TensorFlow's default, and
  ST-MoE's, is 0.2). Nothing else changes: in particular the first weight does not.

  Args:
    routing: TokenRouting with K = 2.
    uniform: (G, S) drawn uniformly from [0, 1).
    threshold: share of the second choice from which it is always kept; 0 keeps all.

  Returns:
    TokenRouting with second choices that are not kept no longer valid.
  """
  keep = uniform * threshold * routing.weight.sum(-1) < routing.weight[..., 1]    # (G, S)
  valid = routing.valid & jnp.stack([jnp.ones_like(keep), keep], axis=-1)
  return TokenRouting(routing.expert, jnp.where(valid, routing.weight, 0.0), valid)


def place(routing: TokenRouting, num_experts: int, capacity: int, *, order: str = 'choice',
          priority: jax.Array | None = None) -> SlotRouting:
  """Fills each expert's C slots in order of priority; assignments past the last slot are dropped.

  With order 'choice' all first choices come before any second choice (GShard, flaxformer, vmoe).
  When slots run out, a token's second choice is thus lost to a later token's first choice: under a
  binding capacity the layer is causal only within one order of choice. With order 'token' all
  choices of a token come before those of the next, and no later token can take a slot from it. A
  priority other than the sequence is never causal while capacity binds. With C = S nothing is lost
  and everything is causal.

  Args:
    routing: TokenRouting of G groups, S tokens, K choices; only valid ones take slots.
    num_experts: E.
    capacity: C, 1 <= C <= S.
    order: 'choice' or 'token', see above.
    priority: (G, S), tokens with the largest are served first and ties in sequence, within one
      order of choice or token by token: batch-prioritised routing (Riquelme et al. 2021) with the
      probability of the first choice. None: in sequence.

  Returns:
    SlotRouting; slots of expert e are its assignments in order of priority.
  """
  G, S, K = routing.expert.shape
  E, C = num_experts, capacity
  token = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (G, S))
  if priority is not None:
    token = jnp.argsort(-jax.lax.stop_gradient(priority), axis=1).astype(jnp.int32)   # stable
  # Everybody stands in one line, as assignment numbers token * K + choice.
  choice = jnp.arange(K, dtype=jnp.int32)
  line = {'choice': token[:, None] * K + choice[:, None],           # (G, K, S)
          'token': token[..., None] * K + choice}[order].reshape(G, K * S)
  expert = jnp.where(routing.valid, routing.expert, E).reshape(G, S * K)   # invalid ones queue last
  # A stable sort by expert keeps the order within each expert, so its queue is one run.
  expert, line = map(_kept, jax.lax.sort_key_val(
      jnp.take_along_axis(expert, line, axis=1), line, is_stable=True))
  count = (expert[:, None] == jnp.arange(E)[:, None]).sum(-1, keepdims=True)      # (G, E, 1)
  start = jnp.cumsum(count, axis=1) - count
  slot = jnp.arange(C)                                              # (C,)
  valid = slot < count                                              # (G, E, C)
  queue = jnp.minimum(start + slot, K * S - 1).reshape(G, E * C)
  chosen = jnp.take_along_axis(line, queue, axis=1)                 # (G, E*C) in [0, K*S)
  weight = jnp.take_along_axis(routing.weight.reshape(G, S * K), chosen, axis=1)
  index = (chosen // K).reshape(G, E, C)
  return SlotRouting(index, jnp.where(valid, weight.reshape(G, E, C), 0.0), valid)
