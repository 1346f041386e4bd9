"""Jobs that take no time, for tests of what runs when."""

import dataclasses
import pathlib

WORK = '''
import pathlib, sys, time
folder, until, code = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with (folder.parent / 'order.txt').open('a') as order:
  order.write(folder.name + '\\n')
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
    return ['-c', WORK, str(folder / self.name), self.until, str(self.code)]

  def finished(self, folder: pathlib.Path) -> bool:
    return (folder / self.name / 'done').exists()

  def done(self, folder: pathlib.Path) -> int:
    return self.work if self.finished(folder) else self.begun


def order(folder: pathlib.Path) -> list[str]:
  """Names of the jobs in the order in which they began."""
  file = folder / 'order.txt'
  return file.read_text().split() if file.exists() else []
