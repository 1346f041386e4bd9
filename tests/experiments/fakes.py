"""Jobs that take no time, for tests of what runs when.

python -m tests.experiments.fakes FOLDER SHARD   does `chains` there as one of several machines.
"""

import dataclasses
import pathlib
import sys

from experiments import scheduler
from experiments.scheduler import Shard

WORK = '''
import os, pathlib, sys, time
folder, until, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with (folder.parent / 'order.txt').open('a') as order:
  order.write(folder.name + '\\n')
(folder / 'pid').write_text(str(os.getpid()))
given_up = time.monotonic() + 60
while until and not pathlib.Path(until).exists() and time.monotonic() < given_up:
  time.sleep(0.02)
if code:
  sys.exit(f'no luck in {folder.name}')
(folder / 'done').write_text('')
'''


@dataclasses.dataclass(frozen=True)
class Fake:
  """A job that notes when it began, in `order.txt` beside its folder.

  Attributes:
    name: of its folder, and its label and key.
    until: a file it waits for; '' for none.
    code: its exit code.
    begun: how much of its work an earlier attempt has done.
  """
  name: str
  parent: 'Fake | None' = None
  cost: float = 1.0
  until: str = ''
  code: int = 0
  work: int = 1
  begun: int = 0

  @property
  def label(self) -> str:
    return self.name

  @property
  def key(self) -> str:
    return self.name

  def command(self, folder: pathlib.Path) -> list[str]:
    return ['-S', '-c', WORK, str(folder / self.name), self.until, str(self.code)]

  def finished(self, folder: pathlib.Path) -> bool:
    return (folder / self.name / 'done').exists()

  def done(self, folder: pathlib.Path) -> int:
    return self.work if self.finished(folder) else self.begun


def order(folder: pathlib.Path) -> list[str]:
  """Names of the jobs in the order in which they began."""
  file = folder / 'order.txt'
  return file.read_text().split() if file.exists() else []


def chains(*costs: float, until: str = '') -> list[Fake]:
  """A parent and a child per cost; the first parent waits until there is such a file."""
  parents = [Fake(f'p{i}', cost=cost, until='' if i else until) for i, cost in enumerate(costs)]
  return [job for p in parents for job in (p, Fake(f'c{p.name}', p, cost=0.5))]


if __name__ == '__main__':
  scheduler.POLL, scheduler.REFRESH = 0.02, 0.1   # which no test waits for
  runs = pathlib.Path(sys.argv[1])
  scheduler.Scheduler({'s': chains(8, 1, until=str(runs.parent / 'go'))}, runs, 1,
                      shard=Shard.parse(sys.argv[2])).do_all()
