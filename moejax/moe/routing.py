"""Routing: which token meets which expert, and with what weight, from the router's logits.

Pure functions. They know nothing of how tokens are moved, which is dispatch.py's. A routing has one
of two forms:

- SlotRouting: each expert has a buffer of C slots and names the token in each slot.
- TokenRouting: each token names its K experts.

Expert choice returns the first form. Token choice returns the second, and placement.py converts it
into the first. Noise is added to the logits before they are passed here; a function that needs
other random numbers takes them as arguments.

Dimensions: G groups, S tokens per group, E experts, C slots per expert and group, K choices of a
token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SORT_INDICES = 'sort_indices'   # name of the results of sorts in the policies of models/scan.py


class SlotRouting(NamedTuple):
  """For each slot of each expert: the token in it and its weight.

  Attributes:
    index: (G, E, C) int32 in [0, S), the token's position in its group; arbitrary if not valid.
    weight: (G, E, C) float32, factor of the expert's output for that token; 0 where not valid.
    valid: (G, E, C) bool, False at empty slots.
  """
  index: jax.Array
  weight: jax.Array
  valid: jax.Array


class TokenRouting(NamedTuple):
  """For each token: the experts it chooses, best first, and their weights.

  Attributes:
    expert: (G, S, K) int32.
    weight: (G, S, K) float32, factor of that expert's output; 0 where not valid.
    valid: (G, S, K) bool, False at padding and at choices that top_p or keep_second withdrew; a
      real token's first choice is always valid.
  """
  expert: jax.Array
  weight: jax.Array
  valid: jax.Array


def expert_capacity(tokens: int, num_experts: int, factor: float, minimum: int = 1) -> int:
  """Slots per expert and group: factor * S / E, rounded half to even, within [minimum, S].

  No K in the formula: a factor of 2 gives every token two slots on average, whichever the router
  (flaxformer's convention; vmoe multiplies by K). Padding counts as tokens.
  """
  return min(max(round(factor * tokens / num_experts), minimum), tokens)


def save_under_remat(index: jax.Array) -> jax.Array:
  """Marks sort indices to be saved under remat: small, and expensive to recompute."""
  return checkpoint_name(index, SORT_INDICES)


# Scores by which tokens rank experts, from float32 logits (G, S, E).
SCORES = {
    'softmax': jax.nn.softmax,
    'softmax_of_chosen': lambda logits: logits,   # ranks by logit; `top_k` has the softmax
    'sigmoid': jax.nn.sigmoid,
}


def _top_k(values: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest along the last axis, with gradient, and their indices."""
  index = save_under_remat(jax.lax.top_k(jax.lax.stop_gradient(values), k)[1])
  return jnp.take_along_axis(values, index, axis=-1), index


def probabilities(logits: jax.Array, score: str = 'softmax') -> jax.Array:
  """Each token's distribution over all experts, for balance losses and telemetry.

  Args:
    logits: (G, S, E).
    score: `score` as in `top_k` below. 'sigmoid' gives sigmoid scores divided by their sum
      (DeepSeek-V3), the others the softmax of the logits.

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
  after it, so it is not causal and is refused in decoders.

  Args:
    logits: (G, S, E) router logits.
    mask: (G, S) bool, False at padding: never chosen before a real token, never valid.
    capacity: C, slots per expert and group, 1 <= C <= S.
    renormalize: divide a token's weights by their sum, so that an upcycled model keeps its
      parent's function (Komatsuzaki et al. 2023, B.7). A token that no expert chose stays at 0; a
      token with a single expert has weight 1 and gives its router no gradient.

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
    renormalize: divide a token's k weights by their sum. 'softmax' then equals
      'softmax_of_chosen', whose weights sum to 1 already.
    scale: factor of all weights, applied last (2.5 in DeepSeek-V3).
    bias: broadcastable to (G, S, E), added to the scores where experts are chosen, never to
      weights, and without gradient (Wang et al. 2024, 2408.15664).

  Returns:
    TokenRouting with K = k, best expert first by score plus bias. At k=1 the weight is the constant
    1 if renormalised or with 'softmax_of_chosen', and gives the router no gradient.
  """
  logits = logits.astype(jnp.float32)
  scores = SCORES[score](logits)                                    # (G, S, E)
  ranked = scores if bias is None else scores + bias
  _, expert = _top_k(ranked, k)                                     # (G, S, K)
  if renormalize or score == 'softmax_of_chosen':
    # A softmax of log-scores, because a bias can choose experts whose scores all underflow.
    log_scores = jax.nn.log_sigmoid(logits) if score == 'sigmoid' else logits
    weight = jax.nn.softmax(jnp.take_along_axis(log_scores, expert, axis=-1), axis=-1)
  else:
    weight = jnp.take_along_axis(scores, expert, axis=-1)
  valid = jnp.broadcast_to(mask[..., None], expert.shape)
  return TokenRouting(expert, jnp.where(valid, scale * weight, 0.0), valid)


def top_p(logits: jax.Array, mask: jax.Array, p: float, k: int, *, renormalize: bool = False,
          scale: float = 1.0) -> TokenRouting:
  """Each token picks its most probable experts until they sum to p (Huang et al. 2024, 2403.07652).

  An unsure token uses more experts than a sure one, and every token uses at least one. A router
  could make its probabilities flat to use them all: `balance.entropy_penalty` counters that.

  Args:
    logits: (G, S, E) router logits; ties go to the expert with the lower number.
    mask: (G, S) bool, False at padding.
    p: probability to reach, 0 < p <= 1: a choice is valid if those before it sum to less.
    k: upper limit of experts per token, 1 <= k <= E. K must be static; k = E sets no limit.
    renormalize: divide a token's weights by their sum. A token with a single expert then has
      weight 1 and gives its router no gradient.
    scale: factor of all weights, applied last.

  Returns:
    TokenRouting with K = k, best expert first, the valid ones in front.
  """
  weight, expert = _top_k(probabilities(logits), k)                 # (G, S, K)
  reached = jnp.cumsum(weight, axis=-1) - weight >= p               # before this choice
  weight = jnp.where(reached, 0.0, weight)
  if renormalize:
    weight = weight / weight.sum(-1, keepdims=True)
  valid = mask[..., None] & ~reached
  return TokenRouting(expert, jnp.where(valid, scale * weight, 0.0), valid)


def keep_second(choices: TokenRouting, uniform: jax.Array, threshold: float) -> TokenRouting:
  """Keeps each token's second choice with probability min(1, w2 / (w1 + w2) / threshold).

  GShard's random routing: where the second expert would add little, its slot is left to another
  token. GShard (algorithm 1): threshold 0.5. Mesh TensorFlow and ST-MoE: 0.2. First choices keep
  their weights.

  Args:
    choices: TokenRouting with K = 2.
    uniform: (G, S) drawn uniformly from [0, 1).
    threshold: share of the second choice from which it is always kept; 0 keeps all.

  Returns:
    TokenRouting in which the other second choices are not valid.
  """
  keep = uniform * threshold * choices.weight.sum(-1) < choices.weight[..., 1]    # (G, S)
  valid = choices.valid & jnp.stack([jnp.ones_like(keep), keep], axis=-1)
  return TokenRouting(choices.expert, jnp.where(valid, choices.weight, 0.0), valid)
