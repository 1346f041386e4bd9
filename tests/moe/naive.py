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
  gate, up = token @ weights['wi_gate'][e], token @ weights['wi_up'][e]
  gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
  return (gelu * up) @ weights['wo'][e]


def best(scores, k):
  """The k largest, the lower number first among equals."""
  return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def scores(config, logits):
  return 1 / (1 + np.exp(-logits)) if config.score == 'sigmoid' else softmax(logits)


def choose(config, logits, bias):
  """[(expert, weight)] of one token, best first."""
  shares = scores(config, logits)
  if config.router == 'top_p':
    chosen, total = [], 0.0
    for e in best(shares, config.k):
      chosen.append(e)
      total += shares[e]
      if total >= config.p:
        break
  else:
    chosen = best((logits if config.score == 'softmax_of_chosen' else shares) + bias, config.k)
  weights = softmax(logits[chosen]) if config.score == 'softmax_of_chosen' else shares[chosen]
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


def layer(config, E, params, x, mask, train, bias):
  """The output (G, S, D) of groups x (G, S, D) with mask (G, S), and aux; bias (E,)."""
  x = np.asarray(x, np.float64)
  weights = {name: np.asarray(w, np.float64) for name, w in params['experts'].items()}
  y, token_choice = np.zeros_like(x), config.router != 'expert_choice'
  aux = dict.fromkeys(('tokens', 'assigned', 'unchosen', 'single', 'entropy', 'z'), 0.0)
  aux |= {'load': np.zeros(E), **({'asked': np.zeros(E), 'balance': 0.0} if token_choice else {})}
  for g, (group, real) in enumerate(zip(x, np.asarray(mask))):
    S, tokens = len(group), real.sum()
    if config.router == 'norm':
      logits = np.log([[np.linalg.norm(mlp(weights, e, t)) for e in range(E)] for t in group])
    else:
      logits = group @ np.asarray(params['router']['kernel'], np.float64)
    probs = np.array([scores(config, row) / scores(config, row).sum() for row in logits])
    factor = config.capacity_factor if train else config.eval_capacity_factor
    C = min(max(round(factor * S / E), config.min_capacity), S)
    if token_choice:
      choices = {s: choose(config, logits[s], bias) for s in range(S) if real[s]}
      kept = placed(config, choices, probs.max(-1), C)
      asked = np.bincount([e for chosen in choices.values() for e, _ in chosen], minlength=E)
      aux['asked'] += asked
      aux['balance'] += E * asked / max(asked.sum(), 1) @ probs[real].sum(0)
      aux['assigned'] += asked.sum()
    else:
      kept = expert_choice(config, probs, real, C)
      aux['assigned'] += len(kept)
    for s, e, w in kept:
      y[g, s] += w * mlp(weights, e, group[s])
      aux['load'][e] += 1
    held = np.bincount([s for s, *_ in kept], minlength=S)[real]
    aux['tokens'] += tokens
    aux['unchosen'] += (held == 0).sum()
    aux['single'] += (held == 1).sum()
    aux['entropy'] -= (probs * np.log(probs))[real].sum()
    aux['z'] += (np.log(np.exp(logits).sum(-1))**2)[real].sum()
  return y, aux | {'dropped': aux['assigned'] - aux['load'].sum()}
