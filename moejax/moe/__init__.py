"""Mixture-of-Experts layers. Read this room in the following order:

  routing.py         router logits -> which token meets which expert, and with what weight
  placement.py       choices of tokens -> slots of experts, where capacity is limited
  dispatch.py        tokens to their experts and outputs back; its first function is the definition
  balance.py         auxiliary losses, and the bias that balances without a loss
  telemetry.py       loads, drops, entropy
  config.py          MoEConfig, the settings of a stack's layers; presets.py has published ones
  router.py          Router: tokens -> logits; route: logits -> routing and losses
  experts.py         MLPs stacked on a leading axis, and their dropout
  layer.py           MoELayer: logits, route, dispatch, shared experts
  grouped_matmul.py  the matmuls of dispatch='grouped'; grouped_matmul_gpu.py, their GPU kernels

Dimensions, in shapes and in einsum strings:

  B batch          G routing groups         E experts
  L length         S tokens of a group      C slots of an expert in a group (its capacity)
  D model          K experts of a token     N assignments: pairs of a token and an expert of it
  F ffn (hidden)   P rows of the buffer of assignments sorted by expert

A *choice* is an expert that a token names, a *slot* a place in an expert's buffer. Both are an
*assignment* of a token to an expert. Padding is assigned nowhere.
"""
