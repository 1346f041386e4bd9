"""One file per suite: get_suite(scale), and SCALES where not every scale makes sense."""

CORE = ('dense_vs_upcycled', 'finetuning', 'scratch_vs_upcycled', 'depth_tiling')
ABLATIONS = ('initial_drop', 'router_type', 'capacity_factor', 'expert_init', 'num_experts',
             'moe_layers', 'optimizer_state', 'combine_normalisation', 'dense_pretraining_amount')
BEYOND = ('learning_rate', 'drop_upcycling', 'granularity', 'balancing', 'expert_allocation',
          'mesh', 'explanations', 'sunk_cost', 'extra_budget')
ORDER = (*CORE, *ABLATIONS, *BEYOND)   # of --suite=all
