"""Connects several processes, usually one per host, that train one model together.

`join` connects them. `Hosts` makes them stop at the same step, and checks that all have the same
config, data and folder; with a single process it does nothing. watchdog.py notices a lost process.
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

AHEAD = 2      # calls of the train step that may be on the devices while the next is prepared
PATIENCE = 5   # seconds in which the watchdog may end this process instead
GRACE = 30     # seconds beyond --join_seconds after which JAX aborts the process, with no reason


class NotAllCame(ConfigError):
  """Not all processes came in time; started again, they may."""


def join(launch: Launch) -> 'Hosts':
  """Connects to the other processes; must come before all other use of JAX.

  After launch.join_seconds the process ends with exit code LOST and one line of why.

  Raises:
    NotAllCame: they could not be reached.
    ConfigError: the environment names no other process.
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
  # JAX's preemption service catches SIGTERM, but nothing here reads what it notes. Without it,
  # SIGTERM ends this process until the train loop listens (run_log.stop_signals).
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
  os._exit(LOST)   # JAX is waiting, and would abort


def _watchdog(launch: Launch) -> Watchdog:
  """Starts the watchdog of this process; process 0 sends the others its address."""
  process, listener = jax.process_index(), None
  reach = np.zeros(6, np.int32)   # IPv4 address, port, token
  if process == 0:
    both = socket.has_dualstack_ipv6()   # IPv4 and IPv6
    listener = socket.create_server(('', 0), dualstack_ipv6=both,
                                    family=socket.AF_INET6 if both else socket.AF_INET)
    reach[:4] = [int(part) for part in _own_address().split('.')]
    reach[4:] = listener.getsockname()[1], random.SystemRandom().randrange(2**31)
  *address, port, token = map(int, multihost_utils.broadcast_one_to_all(reach))
  host = launch.coordinator.rpartition(':')[0].strip('[]') or '.'.join(map(str, address))
  return Watchdog(process, jax.process_count(), listener, (host, port), token,
                  launch.lost_seconds, launch.stall_seconds)


def _own_address() -> str:
  """Returns the address from which this host sends to others; sends nothing."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outgoing:
    try:
      outgoing.connect(('10.255.255.255', 1))
      return outgoing.getsockname()[0]
    except OSError:
      return '127.0.0.1'


def digests(value: str) -> np.ndarray:
  """Returns hashes of `value` from all processes, (processes, 2) int32.

  Collective: every process must call it.
  """
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.int32)
  return multihost_utils.process_allgather(digest)


class Hosts:
  """The processes that train together, seen from this one.

  Collective: every process must call `stop` and `same` in one order.

  Args:
    watchdog: of this process, if there are several, or None.
  """

  def __init__(self, watchdog: Watchdog | None = None):
    self.process, self.processes = jax.process_index(), jax.process_count()
    self._watchdog = watchdog
    self._signals = collections.deque()
    if self.processes > 1:
      first = {d.process_index: d for d in reversed(jax.devices())}
      mesh = Mesh([first[n] for n in range(self.processes)], ('process',))
      self._by_process = NamedSharding(mesh, P('process'))
      self._max = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

  def moved(self, at: str) -> None:
    """Notes that this process got further, to `at`, such as 'training, step 12'."""
    if self._watchdog:
      self._watchdog.moved(at)

  def stop(self, signal: int | None) -> int | None:
    """Returns the signal to stop for, or None; all processes get the same answer.

    Call it after each call of the train step. With several processes the answer is the largest
    signal that any of them had received AHEAD calls ago, so that none waits for steps to end.

    Args:
      signal: what this process has received, or None.
    """
    if self.processes == 1:
      return signal
    own = np.array([signal or 0], np.int32)
    self._signals.append(self._max(
        jax.make_array_from_process_local_data(self._by_process, own)))
    return (int(self._signals.popleft()) or None) if len(self._signals) > AHEAD else None

  def same(self, key: str, value: str, fix: str) -> None:
    """Raises ConfigError, naming processes, if `value` differs between them.

    key: what it is, for the message; fix: what to do about it.
    """
    if self.processes == 1:
      return
    hashes = digests(value)
    others = [n for n in range(self.processes) if (hashes[n] != hashes[0]).any()]
    if others:
      fail(key, f'another in process {", ".join(map(str, others))} than in process 0',
           'the same in all', fix)

  @contextlib.contextmanager
  def leaving(self):
    """Context of all that processes do together: an error in one of them ends all at once."""
    if not self._watchdog:
      yield
      return
    try:
      yield
    except BaseException as error:
      if isinstance(error, ConfigError):
        print(f'moejax: {error}', file=sys.stderr)
      elif not isinstance(error, KeyboardInterrupt):
        time.sleep(PATIENCE)   # if a collective failed, the watchdog knows which process ended
        traceback.print_exc()
      self._watchdog.leave(_why(error))
      sys.stdout.flush()
      os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)   # else JAX waits for the others
    self._watchdog.leave()


def _why(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return f'{type(error).__name__}: {lines[0]}' if lines else type(error).__name__
