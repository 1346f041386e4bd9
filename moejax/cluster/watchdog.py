"""Notices that one of several processes is gone or hangs, and ends the others.

A collective waits for all, so when one process dies or hangs the others would wait for as long as
their transport lets them, and none could say for whom. Beside them, every process tells process 0
once a second over TCP that it lives and where it is; process 0 answers. Whoever sees trouble says
what it is and ends its process, whatever its other threads wait for:

  a process that died            at once, by its closed connection
  a host that died or froze      `lost` seconds after it was last heard of
  a process that hangs           `stall` seconds after any of them last got further
  a process that failed          once it has said of what

with exit code LOST, but for the last: then with FAILED, as what it failed of may well come again.

One JSON object a line: {'token', 'process', 'host', 'at', 'count'} from a process, in its last one
also 'failed' or 'done'; {} from process 0, in the end {'trouble', 'code', 'grace'} or {'done'}.
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from moejax.config import fail

LOST = 75        # EX_TEMPFAIL of sysexits.h: the same command again may well succeed
FAILED = 1
EVERY = 1.0      # seconds between signs of life
LAST = 1.0       # seconds by which process 0 outlives the others: JAX aborts them when it is gone
GRACE = 3.0      # seconds for a process to say itself why it failed, as another just did
AGAIN = 'Start the same command again on all hosts: it goes on from the last checkpoint.'


def end_process(trouble: str, code: int) -> None:
  """Says what is wrong and ends this process, from whichever thread."""
  print(f'\nmoejax: {trouble}', file=sys.stderr, flush=True)
  os._exit(code)


@dataclasses.dataclass
class Peer:
  """What process 0 knows of another."""
  host: str
  at: str
  count: int
  heard: float   # when, by time.monotonic
  moved: float   # when `count` last grew


class Watchdog:
  """One process's end.

  Args:
    process, processes: which this is, of how many.
    listener: process 0's listening socket; None elsewhere.
    address: (host, port) where that is reached.
    token: a number that all share, so that a stranger at the port is not taken for one of them.
    lost: seconds without a sign of life after which a process counts as lost.
    stall: seconds without progress of any process after which they count as hanging.
    end: what to do about trouble; called once, with what it is and an exit code.

  Raises:
    ConfigError: process 0 cannot be reached.
  """

  def __init__(self, process: int, processes: int, listener: socket.socket | None,
               address: tuple[str, int], token: int, lost: float, stall: float,
               end: Callable[[str, int], None] = end_process):
    self.process, self.processes, self.token = process, processes, token
    self.lost, self.stall, self.end = lost, stall, end
    self._at, self._count, self._moved = 'starting', 0, time.monotonic()
    self._lock, self._over = threading.Lock(), threading.Event()
    self._peers: dict[int, Peer] = {}
    self._left: set[int] = set()
    self._connections: list[socket.socket] = []
    self._listener = listener
    if listener:
      self._start(self._accept)
      self._start(self._judge)
    else:
      self._to_zero = _connect(address, lost)
      self._start(self._report)
      self._start(self._listen)

  def moved(self, at: str) -> None:
    """This process got further, to `at`: 'training, step 12'."""
    self._at, self._count, self._moved = at, self._count + 1, time.monotonic()

  def leave(self, failed: str = '') -> None:
    """The last word of this process: it is done, or what it failed of, which ends the others."""
    if self._listener and not failed:
      self._wait_for_all()
    with self._lock:
      trouble = self._over.is_set()
      self._over.set()
    if trouble:   # another thread is about to end this process, and to say why
      time.sleep(GRACE + 2 * LAST)
      return
    if not self._listener:
      with contextlib.suppress(OSError):
        _send(self._to_zero, self._sign() | ({'failed': failed} if failed else {'done': True}))
    elif failed:
      self._tell_all({'trouble': f'{self._name(0)} stopped: {failed}', 'code': FAILED,
                      'grace': GRACE})
      time.sleep(GRACE + LAST)
    else:
      self._tell_all({'done': True})

  def _start(self, target: Callable, *args) -> None:
    threading.Thread(target=target, args=args, daemon=True).start()

  def _trouble(self, what: str, code: int = LOST, grace: float = 0) -> None:
    """Ends all, after `grace` seconds in which this process may still leave by itself."""
    if self._over.wait(grace):
      return
    with self._lock:
      if self._over.is_set():
        return
      self._over.set()
    if self._listener:
      self._tell_all({'trouble': what, 'code': code, 'grace': grace})
      time.sleep(grace + LAST)
    self.end(what, code)

  # Process 0.

  def _accept(self) -> None:
    while not self._over.is_set():
      with contextlib.suppress(OSError):
        connection, _ = self._listener.accept()
        self._start(self._follow, connection)

  def _follow(self, connection: socket.socket) -> None:
    """Reads what one process says until it leaves."""
    process = None
    for said in _lines(connection):
      if said.get('token') != self.token:   # not one of ours
        break
      if process is None:
        process = said['process']
        self._connections.append(connection)
      self._heard(said)
      if said.get('done'):
        self._left.add(process)
        return
      if 'failed' in said:
        self._trouble(f'{self._name(process)} stopped: {said["failed"]}', FAILED, GRACE)
        return
      with contextlib.suppress(OSError):
        _send(connection, {})
    if process is None:
      connection.close()
    else:
      self._trouble(f'{self._name(process)} is gone: its connection closed. {AGAIN}')

  def _heard(self, said: dict) -> None:
    now = time.monotonic()
    with self._lock:
      before = self._peers.get(said['process'])
      moved = now if before is None or said['count'] > before.count else before.moved
      self._peers[said['process']] = Peer(said['host'], said['at'], said['count'], now, moved)

  def _judge(self) -> None:
    """Looks once a second for processes that are silent, or all stand still."""
    began = time.monotonic()
    while not self._over.wait(EVERY):
      now = time.monotonic()
      with self._lock:
        peers = dict(self._peers)
      for process, peer in peers.items():
        if process not in self._left and now - peer.heard > self.lost:
          self._trouble(f'{self._name(process)} was not heard of for {self.lost:g} s. {AGAIN}')
      if len(peers) < self.processes - 1 and now - began > self.lost:
        missing = set(range(1, self.processes)) - set(peers)
        self._trouble(f'process {min(missing)} did not report within {self.lost:g} s. {AGAIN}')
      if now - max([self._moved, *(p.moved for p in peers.values())]) > self.stall:
        self._trouble(self._standstill(peers))

  def _standstill(self, peers: dict[int, Peer]) -> str:
    """Where everybody is; those furthest behind, for whom the others wait, by name."""
    counts = {0: (self._count, self._at), **{n: (p.count, p.at) for n, p in peers.items()}}
    least = min(count for count, _ in counts.values())
    behind = [n for n, (count, _) in counts.items() if count == least]
    if len(behind) == len(counts):
      return f'no process got further for {self.stall:g} s; all are at {self._at}. {AGAIN}'
    names = ', '.join(f'{self._name(n)} at {counts[n][1]}' for n in behind)
    ahead = max(counts.values())[1]
    return (f'no process got further for {self.stall:g} s: others at {ahead} wait for {names}. '
            f'{AGAIN}')

  def _name(self, process: int) -> str:
    host = self._peers[process].host if process in self._peers else socket.gethostname()
    return f'process {process} ({host})'

  def _tell_all(self, message: dict) -> None:
    for connection in self._connections:
      with contextlib.suppress(OSError):
        _send(connection, message)

  def _wait_for_all(self) -> None:
    """Process 0 is done: the others are about to be, or in trouble that _judge sees."""
    while not self._over.is_set() and len(self._left) < self.processes - 1:
      time.sleep(0.05)

  # The others.

  def _report(self) -> None:
    while not self._over.is_set():
      with contextlib.suppress(OSError):   # a closed connection is _listen's to see
        _send(self._to_zero, self._sign())
      self._over.wait(EVERY)

  def _sign(self) -> dict:
    """A sign of life."""
    return {'token': self.token, 'process': self.process, 'host': socket.gethostname(),
            'at': self._at, 'count': self._count}

  def _listen(self) -> None:
    self._to_zero.settimeout(self.lost)
    try:
      for said in _lines(self._to_zero):
        if said.get('done'):
          return
        if 'trouble' in said:
          self._trouble(said['trouble'], said['code'], said['grace'])
          return
    except TimeoutError:
      self._trouble(f'process 0 was not heard of for {self.lost:g} s. {AGAIN}')
      return
    self._trouble(f'process 0 is gone: its connection closed. {AGAIN}')


def _connect(address: tuple[str, int], seconds: float) -> socket.socket:
  try:
    return socket.create_connection(address, timeout=seconds)
  except OSError as error:
    fail('--lost_seconds', f'{seconds:g}', f'a way from this host to {address[0]}:{address[1]}, '
         f'where process 0 waits for signs of life ({error.strerror or error})',
         'Open the network between the hosts, or set it to 0 for no watchdog.')


def _send(connection: socket.socket, message: dict) -> None:
  connection.sendall((json.dumps(message) + '\n').encode())


def _lines(connection: socket.socket):
  """The messages of a connection until it closes; what is no message ends it. TimeoutError."""
  rest = b''
  while True:
    try:
      received = connection.recv(65536)
    except TimeoutError:
      raise
    except OSError:
      return
    if not received:
      return
    *whole, rest = (rest + received).split(b'\n')
    for line in whole:
      try:
        yield dict(json.loads(line))
      except (TypeError, ValueError):
        return
