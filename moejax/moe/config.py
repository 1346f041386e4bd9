"""MoEConfig: the settings of the MoE layers of a stack. Published ones are in presets.py."""

import dataclasses
import re

from moejax.config import check, check_choice, fail
from moejax.moe import dispatch, routing

ROUTERS = ('expert_choice', 'top_k', 'top_p', 'norm')
EXPERTS_CHOOSE = ('expert_choice',)   # experts choose tokens; with the others tokens choose experts
TOKENS_CHOOSE = tuple(router for router in ROUTERS if router not in EXPERTS_CHOOSE)
# A token's experts depend on its own logits alone, so that it can be decoded one token at a time.
CAUSAL = ('top_k', 'top_p', 'norm')

BALANCED = 'Expert choice is balanced by construction.'
# {setting: (routers that read it, advice)}. Under other routers it must have its default. Settings
# that are not here are read by all routers, or may be set without being read (k).
READ_BY = {
    'p': (('top_p',), "Use router='top_p'."),
    'score': (('top_k',), "Use router='top_k'."),
    'weight_scale': (TOKENS_CHOOSE, 'Renormalise instead.'),
    'second_threshold': (('top_k',), 'It is a rule for the second of two experts.'),
    'learned_noise': (('top_k', 'top_p'), "Use router='top_k'."),
    'noise_std': (('expert_choice', 'top_k', 'top_p'), 'Norms of outputs are not noisy logits.'),
    'jitter': (('expert_choice', 'top_k', 'top_p'), 'Norms of outputs are not noisy logits.'),
    'order': (TOKENS_CHOOSE, 'Experts choose tokens, so that no choice is placed.'),
    'batch_priority': (TOKENS_CHOOSE, 'Experts take tokens in order of probability anyway.'),
    'balance_weight': (TOKENS_CHOOSE, BALANCED),
    'balance_counts': (TOKENS_CHOOSE, BALANCED),
    'importance_weight': (TOKENS_CHOOSE, BALANCED),
    'load_weight': (('top_k',), 'The load loss is about the k largest logits.'),
    'entropy_weight': (TOKENS_CHOOSE, "Use router='top_p'."),
    'bias_rate': (('top_k',), "Use router='top_k'."),
}


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """MoE layers of one stack.

  Which and how large:
    layers: which blocks are sparse: 'none', 'every_2' (the 2nd, 4th, ... as in T5), 'last_6', or
      block numbers from 0 such as '1,3'.
    num_experts: E in each of these blocks.
    experts_per_layer: E of each sparse block from the first to the last, in place of num_experts;
      empty: num_experts in all of them.
    granularity: an expert has d_ff / granularity hidden units (fine-grained experts, DeepSeekMoE).
    shared_experts: number of additional experts that process every token, as one MLP, added with
      weight 1.
    dropout_rate: of the experts' hidden activations; negative: the model's dropout_rate.

  Router:
    router: 'expert_choice' (encoders, ViT; not causal); 'top_k'; 'top_p': the most probable
      experts until they reach probability p, at most k; 'norm': the k experts with the largest
      output norm (no router parameters; runs every expert on every token).
    k: experts per token of token choice.
    p: of top_p.
    score: 'softmax' over all experts; 'softmax_of_chosen': over the k chosen (Mixtral); 'sigmoid'.
    renormalize: divide a token's weights by their sum.
    weight_scale: factor of all weights, applied last.
    second_threshold: at k = 2 the second expert is used with probability w2 / (w1 + w2) /
      second_threshold while training (GShard 0.5, ST-MoE 0.2), always in evaluation; 0: always.
    learned_noise: normal noise on logits, with a learned scale per token and expert (Shazeer 2017).
    noise_std: normal noise on logits of standard deviation noise_std / E (V-MoE: 1).
    jitter: router inputs times a uniform factor in 1 +- jitter (Switch). Noise and jitter are for
      training only, and the experts never see them.
    router_init_std: standard deviation of the router's normal initialisation.

  Groups, capacity and dispatch:
    capacity_factor: slots per expert = capacity_factor * group tokens / E while training.
    eval_capacity_factor: capacity_factor in evaluation.
    min_capacity: lower limit of slots per expert.
    group_size: tokens of a routing group, whole sequences or images; 0: each sequence or image is a
      group.
    order: 'choice': all first choices are placed before any second; 'token': token by token.
    batch_priority: tokens with the largest probability of any expert are placed first (not causal).
    dispatch: 'gather', 'einsum', or 'grouped' (dropless: capacity is not used).

  Losses and balance (the losses are means over real tokens, then over the layers that have them):
    balance_weight: of the load-balance loss, whose value is 1 if balanced, for any k.
    balance_counts: whether 'all' choices count in its load, or the 'first' (GShard).
    importance_weight, load_weight: squared coefficients of variation (Shazeer 2017); load needs
      noise.
    z_weight: router z-loss.
    entropy_weight: entropy of the probabilities, which counters flat ones (top_p).
    bias_rate: step of the bias that balances without a loss (Wang et al. 2024); 0: no bias.
  """
  layers: str = 'none'
  num_experts: int = 8
  experts_per_layer: tuple = ()
  granularity: int = 1
  shared_experts: int = 0
  router: str = 'expert_choice'
  k: int = 2
  p: float = 0.4
  score: str = 'softmax'
  renormalize: bool = False
  weight_scale: float = 1.0
  second_threshold: float = 0.0
  learned_noise: bool = False
  noise_std: float = 0.0
  jitter: float = 0.0
  router_init_std: float = 0.02
  capacity_factor: float = 2.0
  eval_capacity_factor: float = 2.0
  min_capacity: int = 1
  group_size: int = 0
  order: str = 'choice'
  batch_priority: bool = False
  dispatch: str = 'gather'
  balance_weight: float = 0.0
  balance_counts: str = 'all'
  importance_weight: float = 0.0
  load_weight: float = 0.0
  z_weight: float = 0.0
  entropy_weight: float = 0.0
  bias_rate: float = 0.0
  dropout_rate: float = -1.0

  def __post_init__(self):
    for key, allowed in (('router', ROUTERS), ('dispatch', dispatch.BY_NAME),
                         ('score', routing.SCORES), ('order', ('choice', 'token')),
                         ('balance_counts', ('all', 'first'))):
      check_choice(f'moe.{key}', getattr(self, key), allowed)
    for key in ('num_experts', 'granularity', 'min_capacity', 'k'):
      check(getattr(self, key) >= 1, f'moe.{key}', getattr(self, key), '>= 1', 'Use 1 or more.')
    check(all(type(e) is int and e >= 1 for e in self.experts_per_layer),
          'moe.experts_per_layer', self.experts_per_layer,
          "integers >= 1, one per sparse block, as in '(4, 8)'",
          'Or leave it empty and set num_experts.')
    for key in ('capacity_factor', 'eval_capacity_factor'):
      check(getattr(self, key) > 0, f'moe.{key}', getattr(self, key), '> 0', 'Usual: 1 to 2.')
    check(self.weight_scale > 0, 'moe.weight_scale', self.weight_scale, '> 0', '1 changes nothing.')
    for key in ('router_init_std', 'group_size', 'shared_experts', 'second_threshold', 'noise_std',
                'bias_rate', *(f'{name}_weight' for name in ('balance', 'importance', 'load', 'z',
                                                             'entropy'))):
      check(getattr(self, key) >= 0, f'moe.{key}', getattr(self, key), '>= 0', '0 turns it off.')
    check(0 <= self.jitter < 1, 'moe.jitter', self.jitter, '0 <= x < 1', 'Switch uses 0.01.')
    check(0 < self.p <= 1, 'moe.p', self.p, '0 < p <= 1', 'It is a probability to reach.')
    check(self.dropout_rate < 1, 'moe.dropout_rate', self.dropout_rate, '[0, 1), or negative',
          "A negative rate stands for the model's.")
    for key, (routers, advice) in READ_BY.items():
      self._check_default(key, self.router in routers, f'router={self.router}', advice)
    if self.token_choice:
      self._check_token_choice()

  def _check_default(self, key: str, read: bool, where: str, advice: str):
    """ConfigError if a setting that is not read has another value than its default."""
    value, default = getattr(self, key), getattr(MoEConfig, key)
    check(read or value == default, f'moe.{key}', value, f'{default!r} with {where}', advice)

  def _check_token_choice(self):
    counts = self.experts_per_layer or (self.num_experts,)
    check(self.k <= min(counts), 'moe.k', self.k, f'1 to num_experts = {min(counts)}',
          'A token cannot choose more experts than there are.')
    if self.k == 1 and max(counts) > 1 and self.router != 'norm':   # norms train no router
      constant = ('A single weight renormalised is the constant 1: the router would get no '
                  'gradient and never learn.')
      check(not self.renormalize, 'moe.renormalize', True, 'False at k = 1', constant)
      check(self.score != 'softmax_of_chosen', 'moe.score', self.score,
            'softmax or sigmoid at k = 1', constant)
    check(not self.second_threshold or self.k == 2, 'moe.second_threshold', self.second_threshold,
          '0, unless k=2', 'It is a rule for the second of two experts.')
    check(not (self.learned_noise and self.noise_std), 'moe.noise_std', self.noise_std,
          '0 with learned_noise', 'Choose one kind of noise.')
    for key in ('order', 'batch_priority'):
      self._check_default(key, not self.dropless, 'dispatch=grouped',
                          'Without a capacity nothing is placed in an order.')
    check(not self.load_weight or self.learned_noise or self.noise_std, 'moe.load_weight',
          self.load_weight, '0 without noise',
          'The load loss is the probability that noise makes an expert win: set learned_noise or '
          'noise_std.')
    check(not (self.load_weight and self.bias_rate), 'moe.load_weight', self.load_weight,
          '0 with bias_rate', 'The load loss is about the largest logits, and the bias makes '
          'others be chosen: balance by one of the two.')

  @property
  def token_choice(self) -> bool:
    """Whether tokens choose experts, rather than experts tokens."""
    return self.router in TOKENS_CHOOSE

  @property
  def dropless(self) -> bool:
    """Whether every choice of a token is computed, without a capacity."""
    return self.token_choice and self.dispatch == 'grouped'

  @property
  def causal(self) -> bool:
    """Whether a token's experts depend on no later token, as long as nothing is dropped."""
    return self.router in CAUSAL and not self.batch_priority

  def sparse_layers(self, depth: int, key: str = 'moe') -> dict[int, int]:
    """{block number: E} of a stack of `depth` blocks; ConfigError on a block not in it."""
    layers = self.layers.replace(' ', '')
    match = re.fullmatch(r'none|(every|last)_(\d+)|\d+(?:,\d+)*', layers)
    if not match:
      fail(f'{key}.layers', self.layers, "'none', 'every_2', 'last_6' or '1,3'",
           'Blocks count from 0.')
    kind, n = match.group(1), int(match.group(2) or 0)
    if layers == 'none':
      chosen = []
    elif kind:
      check(1 <= n <= depth, f'{key}.layers', self.layers, f"'{kind}_1' to '{kind}_{depth}'",
            f'The stack has {depth} blocks.')
      chosen = list(range(n - 1, depth, n)) if kind == 'every' else list(range(depth - n, depth))
    else:
      chosen = sorted(int(i) for i in layers.split(','))
      check(len(set(chosen)) == len(chosen) and max(chosen) < depth, f'{key}.layers', self.layers,
            f'different blocks from 0 to {depth - 1}', f'The stack has {depth} blocks.')
    experts = self.experts_per_layer or (self.num_experts,) * len(chosen)
    check(len(experts) == len(chosen), f'{key}.experts_per_layer', self.experts_per_layer,
          f'{len(chosen)} numbers, one per sparse block', 'Or leave it empty and set num_experts.')
    return dict(zip(chosen, experts))

  def slots_per_expert(self, tokens: int, num_experts: int, train: bool) -> int:
    """C, slots of each expert in a routing group of so many tokens, padding included."""
    factor = self.capacity_factor if train else self.eval_capacity_factor
    return routing.expert_capacity(tokens, num_experts, factor, self.min_capacity)

  def expert_d_ff(self, d_ff: int, key: str = 'moe') -> int:
    """Hidden units of an expert; ConfigError unless granularity divides d_ff."""
    check(d_ff % self.granularity == 0, f'{key}.granularity', self.granularity,
          f'a divisor of d_ff = {d_ff}', 'Hidden units are shared out equally.')
    return d_ff // self.granularity

  def examples_per_group(self, length: int, key: str = 'moe') -> int:
    """Sequences of `length` tokens in a routing group; ConfigError unless a whole number."""
    if not self.group_size:
      return 1
    check(length >= 1, f'{key}.group_size', self.group_size, '0 without a length',
          'Say how many tokens an example has.')
    check(self.group_size % length == 0, f'{key}.group_size', self.group_size,
          f'a multiple of the {length} tokens of one sequence or image',
          f'Nearest: {max(1, round(self.group_size / length)) * length}.')
    return self.group_size // length
