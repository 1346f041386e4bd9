"""Depth tiling: a deeper model whose blocks are the parent's, each n times.

This is depth growth as in Gopher (Rae et al. 2021; recalled, not checked against its text), and the
baseline of Komatsuzaki et al. (2023), Fig. 5. There are two orders for n copies of the blocks A B:

- 'stack': the whole stack again, A B A B.
- 'layer': each block n times, A A B B.

The new model has n times the blocks, and so n times their parameters and n times their FLOPs per
token; embeddings, final norms, relative biases and head are not repeated. Each stack has its own n,
which may be 1. The new model is not the parent's function at step 0: every block adds to the
residual stream, now n times, and the loss starts well above the parent's.

The learning rate follows `schedule.start`, as in any run with a parent. Optimizer state has the
shapes of its leaves, so it may be carried: each copy gets the parent's moments and count. But these
are moments of another function's gradient, so a re-warmed learning rate (schedule.start='rewarm')
or optimizer='reset' are plausible too.
"""

import re
from collections.abc import Collection

from moejax.config import check, fail
from moejax.trees import rules
from moejax.trees.rules import Rule

_BLOCK = re.compile(r'(?:params/|opt_state/)?(?P<stack>.+)/layers/(?P<name>[^/]+)/.+')


def blocks(paths: Collection[str]) -> dict[str, list[str]]:
  """{stack: names of its blocks in order}, from paths of parameters or optimizer state."""
  stacks: dict[str, set[str]] = {}
  for m in filter(None, map(_BLOCK.fullmatch, paths)):
    stacks.setdefault(m['stack'], set()).add(m['name'])
  return {stack: sorted(names, key=lambda name: (len(name), name))
          for stack, names in stacks.items()}


def block_rules(source_paths: Collection[str], target_paths: Collection[str], tiling: str,
                carry: bool) -> tuple[list[Rule], str]:
  """The rules for all blocks of all stacks.

  Args:
    source_paths, target_paths: of both states.
    tiling: 'stack' or 'layer'.
    carry: whether the rules also take the blocks' optimizer state.

  Returns:
    The rules, and a regular expression of the paths that they take.

  Raises:
    ConfigError: a stack of the target is not n times as deep as the parent's, or none is deeper.
  """
  old, new = blocks(source_paths), blocks(target_paths)
  table, deeper = [], False
  prefix = f'(?:params/{"|opt_state/" if carry else ""})?'
  for stack, names in old.items():
    n, rest = divmod(len(new.get(stack, ())), len(names))
    if rest or not n:
      fail(f'blocks of {stack}', len(new.get(stack, ())),
           f"a multiple of the parent's {len(names)}", "Make the model's depth fit.")
    deeper |= n > 1
    for i, name in enumerate(names):
      copies = new[stack][i * n:(i + 1) * n] if tiling == 'layer' else new[stack][i::len(names)]
      table.append(rules.copy(
          rf'({prefix}{re.escape(stack)}/layers)/{re.escape(name)}/(.+)',
          tuple(rf'\1/{copy}/\2' for copy in copies)))
  check(deeper, 'config.init.mode', 'depth_tile', 'a model with more blocks than the parent',
        "Raise its depth, or use mode='continue'.")
  stacks = '|'.join(map(re.escape, old))
  return table, rf'{prefix}(?:{stacks})/layers/'
