"""The MoE layer once more, in slow and plain NumPy: one token after the other.

Nothing here is shared with the code under test but the settings' names. Float64.
E experts, S tokens of a group, D model.
"""

import numpy as np


def softmax(row):
  odds = np.exp(row - row.max())
  return odds / odds.sum()


def mlp(weights, e, token):
  """Expert e, a gated tanh-GELU MLP, on one token (D,)."""
  gate, up = token @ weights['wi_gate'][e], token @ weights['wi'][e]
  gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
  return (gelu * up) @ weights['wo'][e]


def best(scores, k):
  """The k largest, the lower number first among equals."""
  return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def choose(config, logits, bias):
  """[(expert, weight)] of one token, best first."""
  scores = 1 / (1 + np.exp(-logits)) if config.score == 'sigmoid' else softmax(logits)
  if config.router == 'top_p':
    chosen, total = [], 0.0
    for e in best(scores, config.k):
      chosen.append(e)
      total += scores[e]
      if total >= config.p:
        break
  else:
    chosen = best((logits if config.score == 'softmax_of_chosen' else scores) + bias, config.k)
  weights = softmax(logits[chosen]) if config.score == 'softmax_of_chosen' else scores[chosen]
  if config.renormalize:
    weights = weights / weights.sum()
  return list(zip(chosen, weights * config.weight_scale))


def placed(config, choices, priority, C):
  """The (token, expert, weight) that find a slot: `choices` is {token: [(expert, weight)]}."""
  queue = [(n if config.order == 'choice' else 0,
            -priority[s] if config.batch_priority else 0, s, n, e, w)
           for s, chosen in choices.items() for n, (e, w) in enumerate(chosen)]
  filled, kept = {}, []
  for *_, s, _, e, w in sorted(queue, key=lambda q: q[:4]):
    if config.dispatch == 'grouped' or filled.get(e, 0) < C:
      filled[e] = filled.get(e, 0) + 1
      kept.append((s, e, w))
  return kept


def expert_choice(config, probs, real, C):
  """The (token, expert, weight) of experts that choose; probs (S, E)."""
  kept = []
  for e in range(probs.shape[1]):
    order = sorted((s for s in range(len(probs)) if real[s]), key=lambda s: (-probs[s, e], s))
    kept += [(s, e, probs[s, e]) for s in order[:C]]
  if config.renormalize:
    total = {}
    for s, _, w in kept:
      total[s] = total.get(s, 0.0) + w
    kept = [(s, e, w / total[s]) for s, e, w in kept]
  return kept


def layer(config, E, params, x, mask, train, bias=None):
  """The output (G, S, D) of groups x (G, S, D) with mask (G, S), and (experts, tokens) loads."""
  x = np.asarray(x, np.float64)
  weights = {name: np.asarray(w, np.float64) for name, w in params['experts'].items()}
  bias = np.zeros(E) if bias is None else np.asarray(bias, np.float64)
  y, load = np.zeros_like(x), np.zeros(E)
  for g, (group, real) in enumerate(zip(x, np.asarray(mask))):
    if config.router == 'norm':
      logits = np.log([[np.linalg.norm(mlp(weights, e, t)) for e in range(E)] for t in group])
    else:
      logits = group @ np.asarray(params['router']['kernel'], np.float64)
    probs = np.array([softmax(row) for row in logits])
    factor = config.capacity_factor if train else config.eval_capacity_factor
    C = min(max(round(factor * len(group) / E), config.min_capacity), len(group))
    if config.router == 'expert_choice':
      kept = expert_choice(config, probs, real, C)
    else:
      choices = {s: choose(config, logits[s], bias) for s in range(len(group)) if real[s]}
      priority = probs.max(-1)
      if config.score == 'sigmoid':
        odds = 1 / (1 + np.exp(-logits))
        priority = (odds / odds.sum(-1, keepdims=True)).max(-1)
      kept = placed(config, choices, priority, C)
    for s, e, w in kept:
      y[g, s] += w * mlp(weights, e, group[s])
      load[e] += 1
  return y, load
