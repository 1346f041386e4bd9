"""Several processes, usually one a host, that train one model together.

How they find each other (`join`), stop at the same step, and check that they were given the same
things (`Hosts`); that one of them is gone is noticed by watchdog.py. A single process has all of
this too, and there it does nothing.
"""

import collections
import contextlib
import hashlib
import os
import random
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.cluster.launch import Launch
from moejax.cluster.watchdog import LOST, Watchdog
from moejax.config import ConfigError, check, fail
from moejax.train.run_log import AHEAD

PATIENCE = 5   # seconds in which the watchdog may end this process instead
GRACE = 30     # seconds beyond --join_seconds after which JAX would abort, with no word to people


class NotAllCame(ConfigError):
  """Not all processes came in time; when they are started again they may."""


def join(launch: Launch) -> 'Hosts':
  """Meets the other processes; call it before anything else of JAX.

  When launch.join_seconds are over the process ends: exit code LOST, and a line.

  Raises:
    NotAllCame: they could not be reached.
    ConfigError: this machine does not know of any.
  """
  way = launch.way(os.environ)
  if way == 'off':
    check((hosts := jax.process_count()) == 1, '--distributed', launch.distributed,
          f'tpu, on a slice of {hosts} hosts', 'Add --distributed=tpu on all of them.')
    return Hosts()
  known = {}
  if way == 'flags':
    known = {'coordinator_address': launch.coordinator, 'num_processes': launch.processes,
             'process_id': launch.process, 'cluster_detection_method': 'deactivate'}
  elif way == 'slurm':
    known = {'cluster_detection_method': 'slurm'}
  elif any(name.startswith(('SLURM_', 'OMPI_')) for name in os.environ):   # JAX asks these first
    known = {'cluster_detection_method':
             'gketpu' if 'TPU_WORKER_HOSTNAMES' in os.environ else 'gcetpu'}
  # JAX's own service would take SIGTERM, and nobody asks it: until training watches for signals
  # (progress.stop_signals), one ends this process, and the watchdogs of the others tell them.
  jax.config.update('jax_enable_preemption_service', False)
  late = threading.Timer(launch.join_seconds, _give_up, [_absent(launch, way, 'not all came')])
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(initialization_timeout=launch.join_seconds + GRACE, **known)
  except (RuntimeError, ValueError, OSError) as error:
    kind = ConfigError if isinstance(error, ValueError) else NotAllCame
    raise kind(_absent(launch, way, str(error).splitlines()[0])) from error
  finally:
    late.cancel()
  watchdog = None
  if launch.lost_seconds and jax.process_count() > 1:
    watchdog = _watchdog(launch)
  return Hosts(watchdog)


def _absent(launch: Launch, way: str, why: str) -> str:
  return (f'--distributed: got {way!r}, allowed: {launch.processes or "all"} processes that find '
          f'each other within {launch.join_seconds} s ({why}). Start the same command on all hosts '
          'at about the same time; or name them: --coordinator=HOST:PORT --processes=N '
          '--process=0..N-1.')


def _give_up(why: str) -> None:
  print(f'moejax: {why}', file=sys.stderr, flush=True)
  os._exit(LOST)   # JAX is waiting, and would end this process by an abort


def _watchdog(launch: Launch) -> Watchdog:
  """Tells all where process 0 listens, and starts one."""
  process, listener = jax.process_index(), None
  told = np.zeros(6, np.int32)
  if process == 0:
    both = socket.has_dualstack_ipv6()   # IPv4 and IPv6
    listener = socket.create_server(('', 0), dualstack_ipv6=both,
                                    family=socket.AF_INET6 if both else socket.AF_INET)
    told[:4] = [int(part) for part in _own_address().split('.')]
    told[4:] = listener.getsockname()[1], random.SystemRandom().randrange(2**31)
  *address, port, token = map(int, multihost_utils.broadcast_one_to_all(told))
  host = launch.coordinator.rpartition(':')[0].strip('[]') or '.'.join(map(str, address))
  return Watchdog(process, jax.process_count(), listener, (host, port), token,
                  launch.lost_seconds, launch.stall_seconds)


def _own_address() -> str:
  """This host's address where packets for others leave it; nothing is sent."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way_out:
    try:
      way_out.connect(('10.255.255.255', 1))
      return way_out.getsockname()[0]
    except OSError:
      return '127.0.0.1'


def digests(value: str) -> np.ndarray:
  """(processes, 2) int32: what each process gave, to be told apart. All have to call it."""
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.int32)
  return multihost_utils.process_allgather(digest)


class Hosts:
  """This process among those that train together; all of them call the same methods in order.

  Args:
    watchdog: of several processes, or None.
  """

  def __init__(self, watchdog: Watchdog | None = None):
    self.process, self.processes = jax.process_index(), jax.process_count()
    self._watchdog = watchdog
    self._asked = collections.deque()
    if self.processes > 1:
      first = {d.process_index: d for d in reversed(jax.devices())}
      mesh = Mesh([first[n] for n in range(self.processes)], ('process',))
      self._each = NamedSharding(mesh, P('process'))
      self._most = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

  def moved(self, at: str) -> None:
    """This process got further, to `at`: 'training, step 12'."""
    if self._watchdog:
      self._watchdog.moved(at)

  def stop(self, signal: int | None) -> int | None:
    """The signal to stop for after this step, or None: the same answer in all processes.

    Call it once a dispatch, which is one step or several. With several processes it is what any of
    them was told AHEAD calls ago, so that nobody waits for this one's steps to end.

    Args:
      signal: what this process was told, or None.
    """
    if self.processes == 1:
      return signal
    told = np.array([signal or 0], np.int32)
    self._asked.append(self._most(jax.make_array_from_process_local_data(self._each, told)))
    return (int(self._asked.popleft()) or None) if len(self._asked) > AHEAD else None

  def same(self, key: str, value: str, fix: str) -> None:
    """Raises ConfigError, naming processes, if `value` is not the same in all of them.

    key: what it is, for the message; fix: what to do about it.
    """
    if self.processes == 1:
      return
    all_ = digests(value)
    others = [n for n in range(self.processes) if (all_[n] != all_[0]).any()]
    if others:
      fail(key, f'another in process {", ".join(map(str, others))} than in process 0',
           'the same in all', fix)

  @contextlib.contextmanager
  def leaving(self):
    """Around all that processes do together: an error in one of them ends all, each at once."""
    if not self._watchdog:
      yield
      return
    try:
      yield
    except BaseException as error:
      if isinstance(error, ConfigError):
        print(f'moejax: {error}', file=sys.stderr)
      elif not isinstance(error, KeyboardInterrupt):
        time.sleep(PATIENCE)   # if a collective failed, the watchdog knows whose end it was
        traceback.print_exc()
      self._watchdog.leave(_why(error))
      sys.stdout.flush()
      os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)   # JAX would wait for the others
    self._watchdog.leave()


def _why(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__
