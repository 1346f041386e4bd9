"""The flags of moejax.main about processes, checked: how this process finds the others.

This file is separate from processes.py, because importing JAX takes a second or more, and a wrong
flag is reported before that.
"""

import dataclasses
from collections.abc import Mapping

from moejax.config import check, check_choice

WAYS = ('auto', 'off', 'tpu', 'slurm', 'flags')
LEAST_LOST = 5   # seconds: several signs of life, of which there is one every watchdog.EVERY


@dataclasses.dataclass(frozen=True)
class Launch:
  """The flags of moejax.main about processes.

  Attributes:
    distributed: 'tpu' and 'slurm' find the others by the environment, 'flags' by the next three;
      'auto' chooses one of these, 'off' trains alone whatever the environment is.
    coordinator: HOST:PORT of process 0, free there and reached from everywhere.
    processes, process: how many there are, and the index of this one.
    join_seconds: seconds to wait for all to start.
    lost_seconds, stall_seconds: see Watchdog; lost_seconds=0: no watchdog.
  """
  distributed: str = 'auto'
  coordinator: str = ''
  processes: int = 0
  process: int = -1
  join_seconds: int = 300
  lost_seconds: float = 60
  stall_seconds: float = 1800

  def __post_init__(self):
    check_choice('--distributed', self.distributed, WAYS)
    given = (bool(self.coordinator), self.processes > 0, self.process >= 0)
    check(all(given) or not (any(given) or self.distributed == 'flags'),
          '--coordinator, --processes, --process',
          (self.coordinator, self.processes, self.process), 'all of HOST:PORT, N, 0..N-1, or none',
          'Give all three on every host; they differ in --process alone.')
    check(not any(given) or self.distributed in ('auto', 'flags'), '--distributed',
          self.distributed, 'auto or flags with --coordinator', 'Leave one of the two out.')
    check(not any(given) or self.process < self.processes, '--process', self.process,
          f'0 to {self.processes - 1}', 'Processes are counted from 0.')
    port = self.coordinator.rpartition(':')[2]
    check(not self.coordinator or (':' in self.coordinator and port.isdigit()), '--coordinator',
          self.coordinator, 'HOST:PORT', 'Any free port of the host of process 0 will do.')
    for name in ('join_seconds', 'stall_seconds'):
      check(getattr(self, name) >= 1, f'--{name}', getattr(self, name), '>= 1', 'Give seconds.')
    check(self.lost_seconds == 0 or self.lost_seconds >= LEAST_LOST, '--lost_seconds',
          self.lost_seconds, f'0, or >= {LEAST_LOST}',
          'Processes send a sign of life a second; 0: no watchdog.')

  def way(self, environment: Mapping[str, str]) -> str:
    """Returns 'off', 'tpu', 'slurm' or 'flags': what 'auto' chooses in this environment."""
    if self.distributed != 'auto':
      return self.distributed
    if self.coordinator:
      return 'flags'
    if int(environment.get('SLURM_STEP_NUM_TASKS', '1')) > 1:   # within srun, not beside it
      return 'slurm'
    workers = environment.get('TPU_WORKER_HOSTNAMES', '')
    return 'tpu' if ',' in workers else 'off'
