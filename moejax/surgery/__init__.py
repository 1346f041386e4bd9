"""Surgery: turns one state into another, by rules on the paths of leaves; no model, no training.

Reading order: config.py (settings), upcycle.py (the tables of rules), expert_init.py (the rules of
one new MoE layer), depth_tile.py, receipt.py. The rules themselves are in trees/rules.py.
"""
