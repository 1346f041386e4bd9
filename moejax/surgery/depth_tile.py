"""Depth tiling: a deeper dense or sparse model whose blocks are the parent's, n times over.

Depth growth as in Gopher (Rae et al. 2021; recalled, not checked against its text) and the baseline
of Komatsuzaki et al. (2023), Fig. 5. Two ways to order n copies of the blocks A B:

- 'stack': the whole stack again, A B A B.
- 'layer': each block n times, A A B B.

The new model has n times the blocks, and so n times their parameters and n times their FLOPs per
token; embeddings, final norms, relative biases and head are single, as before. Stacks may have
different n, 1 included. It is not the parent's function at step 0: every block adds to the residual
stream, n times now, and the loss starts well above the parent's.

The schedule is that of any run with a parent: steps go on counting from the parent's, and
schedule.start says what the rate does. Optimizer
slots have their leaves' shapes, so they may be carried, each copy with its parent's moments and
count; what they are moments of is another function's gradient, so a re-warmed learning rate
(schedule.start='rewarm') or optimizer='reset' are as plausible.
"""

import re
from collections.abc import Collection

from moejax.config import check, check_choice, fail
from moejax.trees import rules
from moejax.trees.rules import Rule

TILINGS = ('stack', 'layer')
_BLOCK = re.compile(r'(?:params/|opt_state/)?(?P<stack>.+)/layers/(?P<name>[^/]+)/.+')


def blocks(paths: Collection[str]) -> dict[str, list[str]]:
  """{stack: names of its blocks in order}, parameters and optimizer state alike."""
  found: dict[str, set[str]] = {}
  for m in filter(None, map(_BLOCK.fullmatch, paths)):
    found.setdefault(m['stack'], set()).add(m['name'])
  return {stack: sorted(names, key=lambda name: (len(name), name))
          for stack, names in found.items()}


def block_rules(source_paths: Collection[str], target_paths: Collection[str], tiling: str,
                carry: bool) -> tuple[list[Rule], str]:
  """The rules for all blocks of all stacks.

  Args:
    source_paths, target_paths: paths of the states.
    tiling: 'stack' or 'layer'.
    carry: whether the rules are for the blocks' optimizer state too.

  Returns:
    The rules, and the regular expression of the paths they take.

  Raises:
    ConfigError: a stack of the target is not n times as deep as the parent's, or none is deeper.
  """
  check_choice('config.init.tiling', tiling, TILINGS)
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
