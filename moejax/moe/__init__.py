"""Mixture-of-Experts layers. Read this folder in the following order:

  routing.py         router logits -> which token meets which expert, and with what weight
  placement.py       choices of tokens -> slots of experts, where capacity is limited
  dispatch.py        tokens to their experts and outputs back; its first function is the definition
  telemetry.py       loads, drops, entropy
  balance.py         auxiliary losses, and the bias that balances without a loss
  config.py          MoEConfig, the settings of a stack's layers; presets.py has published ones
  router.py          Router: tokens -> logits; route: logits -> routing, losses, telemetry
  experts.py         MLPs stacked on a leading axis (nn.MLPParams), and their dropout
  layer.py           MoELayer: logits, route, dispatch, shared experts; split over devices by
                     sharding.over_groups
  grouped_matmul.py  the matmuls of dispatch='grouped'; grouped_matmul_gpu.py, their GPU kernels

Dimensions, in shapes and in einsum strings:

  B batch          G routing groups         E experts
  L length         S tokens of a group      C slots of an expert in a group (its capacity)
  D model          K choices of a token     N assignments
  F ffn (hidden)   P rows of the buffer of assignments sorted by expert

A *choice* is an expert that a token names, a *slot* a place in an expert's buffer. An *assignment*
is a token that an expert will process: a filled slot, or without a capacity a valid choice. Padding
is assigned nowhere. (The metric 'assigned' counts the choices before drops: an older name.)
"""
