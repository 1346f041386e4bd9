"""Which machine does which jobs, so that all machines know without talking to each other."""

import dataclasses
import re
from collections.abc import Sequence

from experiments.jobs import Job
from moejax.config import fail


@dataclasses.dataclass(frozen=True)
class Shard:
  """Number `index` of `count` machines, 1 <= index <= count."""
  index: int
  count: int

  @classmethod
  def parse(cls, text: str) -> 'Shard':
    """'2/8' -> Shard(2, 8). Raises ConfigError."""
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
      fail('--shard', text, 'i/n with 1 <= i <= n', 'The second of eight machines is --shard=2/8.')
    return cls(int(match[1]), int(match[2]))

  def __str__(self) -> str:
    return f'{self.index}/{self.count}'

  def own(self, jobs: Sequence[Job]) -> set[str]:
    """Keys of the jobs this machine does first.

    Jobs that descend from one parent stay together, since its checkpoint is then at hand. These
    chains are dealt out, the costliest first, each to whoever has the least so far.
    """
    chains: dict[str, list[Job]] = {}
    for job in jobs:
      chains.setdefault(_root(job).key, []).append(job)
    cost = {root: sum(job.cost for job in chain) for root, chain in chains.items()}
    load, hands = [0.0] * self.count, [set() for _ in range(self.count)]
    for root in sorted(chains, key=lambda root: (-cost[root], root)):
      least = load.index(min(load))
      load[least] += cost[root]
      hands[least] |= {job.key for job in chains[root]}
    return hands[self.index - 1]


def _root(job: Job) -> Job:
  while job.parent:
    job = job.parent
  return job
