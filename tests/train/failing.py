"""One of several processes fails while the others wait, as for it in a collective.

python -m tests.train.failing PORT PROCESSES PROCESS; number 1 fails.
"""

import sys
import time

from moejax.cluster import processes as hosts
from moejax.config import ConfigError


def main(port: int, processes: int, process: int) -> None:
  joined = hosts.join(hosts.Launch(coordinator=f'localhost:{port}', processes=processes,
                                   process=process, join_seconds=120, lost_seconds=20))
  with joined.leaving():
    if process == 1:
      raise ConfigError('config.data: no such file')
    time.sleep(60)


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
