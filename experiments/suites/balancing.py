"""How should token choice be kept balanced: by a loss, by a bias, or not at all?

Claims. He et al. 2024 (2410.07524): a balance loss of 1e-2 to 1e-3 is best for upcycled models,
none leaves dead experts. Wang et al. 2024 (2408.15664): a bias moved by the load, without a loss,
gives a lower loss than the balance loss (perplexity 9.56 to 9.50 at 1B, from scratch) and far
better balance. Weights are on the scale where a balanced load gives 1 (times 2 of flaxformer's at
k=2).

Top-2 in both stacks. Refuted if no loss at all is as good, or the bias worse than the loss.
"""

from experiments import protocol
from experiments.suite import Suite

HE, WANG = 'He et al. 2024 (2410.07524)', 'Wang et al. 2024 (2408.15664)'
ARMS = {'none': {}, 'loss 0.02': {'balance_weight': 0.02}, 'loss 0.2': {'balance_weight': 0.2},
        'bias 0.001': {'bias_rate': 0.001}}


def get_suite(scale: str) -> Suite:
  regime, arms = protocol.text(scale), []
  for pair in regime.pairs():
    arms.append(pair.arm('dense, equal FLOPs', pair.matched_dense(pair.upcycled())))
    for name, balance in ARMS.items():
      moe = {'router': 'top_k', 'k': 2, 'balance_weight': 0.0, **balance}
      arms.append(pair.arm(name, pair.upcycled(moe=moe), reference=name == 'loss 0.02'))
  claims = (
      regime.claim('a balance loss of 0.02 beats none', HE, 'none: dead experts',
                   'loss 0.02', '<', 'none'),
      regime.claim('a balance loss of 0.02 beats a tenfold one', HE, '1e-2 to 1e-3 best',
                   'loss 0.02', '<', 'loss 0.2'),
      regime.claim('a bias without a loss beats the balance loss', WANG, '9.50 and 9.56 (1B)',
                   'bias 0.001', '<', 'loss 0.02'),
  )
  return Suite('balancing', scale, tuple(arms), claims, plot='points')
