"""Notices that one of several processes is lost or hangs, and ends the others.

A collective waits for all processes. So if one process dies or hangs, the others wait for as long
as their transport allows, and do not know for which process. Therefore every process sends a sign
of life to process 0 once a second over TCP, with the phase and step where it is; process 0 answers.
A process that sees trouble prints one line and ends, whatever its other threads wait for:

  a process that died            at once, by its closed connection
  a host that died or froze      `lost` seconds after its last sign of life
  a process that hangs           `stall` seconds after any process last got further
  a process that failed          once it has sent the reason

The exit code is LOST, after which a scheduler should start the command again. For a process that
failed it is FAILED, because the same error is likely to happen again.

JAX's own heartbeats (jax.distributed) do not suffice. JAX aborts a process whose peer is gone after
100 seconds, with SIGABRT and a stack trace, so a scheduler cannot tell a lost machine from a bug.
The message names a task, but neither its host nor its step. A process that hangs still sends
heartbeats.

Messages are one JSON object a line: {'token', 'process', 'host', 'at', 'count'} from a process, in
its last one also 'failed' or 'done'; {} from process 0, in the end {'trouble', 'code', 'grace'} or
{'done'}.
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
GRACE = 3.0      # seconds in which a process may still report that it failed of the same
AGAIN = 'Start the same command again on all hosts: it goes on from the last checkpoint.'


def end_process(trouble: str, code: int) -> None:
  """Prints what is wrong and ends this process, from any thread."""
  print(f'\nmoejax: {trouble}', file=sys.stderr, flush=True)
  os._exit(code)


@dataclasses.dataclass
class Peer:
  """Another process, as process 0 knows it.

  Attributes:
    host: its name.
    at: where it is: 'training, step 12'.
    count: how often it got further.
    heard, moved: time.monotonic of its last sign of life, and of when `count` last grew.
  """
  host: str
  at: str
  count: int
  heard: float
  moved: float


class Watchdog:
  """Watches over the processes from one of them.

  Many parameters: they are what two processes must agree on to talk to each other.

  Args:
    process, processes: index of this one, and how many there are.
    listener: the listening socket of process 0; None elsewhere.
    address: (host, port) of that socket.
    token: a number that all share; a connection without it is a stranger's.
    lost: seconds without a sign of life after which a process counts as lost.
    stall: seconds without progress of any process after which they count as hanging.
    end: called once if there is trouble, with its description and an exit code.

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
    """Notes that this process got further, to `at`, such as 'training, step 12'."""
    self._at, self._count, self._moved = at, self._count + 1, time.monotonic()

  def leave(self, failed: str = '') -> None:
    """Sends that this process is done, or why it failed, which ends the others."""
    if self._listener and not failed:
      self._wait_for_all()
    with self._lock:
      trouble = self._over.is_set()
      self._over.set()
    if trouble:   # another thread is about to end this process, and prints why
      time.sleep(GRACE + 2 * LAST)
      return
    if not self._listener:
      with contextlib.suppress(OSError):
        _send(self._to_zero, self._sign() | ({'failed': failed} if failed else {'done': True}))
    elif failed:
      self._send_all({'trouble': f'{self._name(0)} stopped: {failed}', 'code': FAILED,
                      'grace': GRACE})
      time.sleep(GRACE + LAST)
    else:
      self._send_all({'done': True})

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
      self._send_all({'trouble': what, 'code': code, 'grace': grace})
      time.sleep(grace + LAST)
    self.end(what, code)

  # Process 0.

  def _accept(self) -> None:
    while not self._over.is_set():
      with contextlib.suppress(OSError):
        connection, _ = self._listener.accept()
        self._start(self._follow, connection)

  def _follow(self, connection: socket.socket) -> None:
    """Reads the messages of one process until it leaves."""
    process = None
    for message in _messages(connection):
      if message.get('token') != self.token:   # a stranger
        break
      if process is None:
        process = message['process']
        self._connections.append(connection)
      self._heard(message)
      if message.get('done'):
        self._left.add(process)
        return
      if 'failed' in message:
        self._trouble(f'{self._name(process)} stopped: {message["failed"]}', FAILED, GRACE)
        return
      with contextlib.suppress(OSError):
        _send(connection, {})
    if process is None:
      connection.close()
    else:
      self._trouble(f'{self._name(process)} is gone: its connection closed. {AGAIN}')

  def _heard(self, sign: dict) -> None:
    now = time.monotonic()
    with self._lock:
      before = self._peers.get(sign['process'])
      moved = now if before is None or sign['count'] > before.count else before.moved
      self._peers[sign['process']] = Peer(sign['host'], sign['at'], sign['count'], now, moved)

  def _judge(self) -> None:
    """Once a second: is a process silent, or has none got further for too long?"""
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
    """Describes where all are, naming those furthest behind, for whom the others wait."""
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

  def _send_all(self, message: dict) -> None:
    for connection in self._connections:
      with contextlib.suppress(OSError):
        _send(connection, message)

  def _wait_for_all(self) -> None:
    """Waits, in process 0, until the others are done or _judge sees trouble."""
    while not self._over.is_set() and len(self._left) < self.processes - 1:
      time.sleep(0.05)

  # The others.

  def _report(self) -> None:
    while not self._over.is_set():
      with contextlib.suppress(OSError):   # _listen notices a closed connection
        _send(self._to_zero, self._sign())
      self._over.wait(EVERY)

  def _sign(self) -> dict:
    """A sign of life."""
    return {'token': self.token, 'process': self.process, 'host': socket.gethostname(),
            'at': self._at, 'count': self._count}

  def _listen(self) -> None:
    self._to_zero.settimeout(self.lost)
    try:
      for message in _messages(self._to_zero):
        if message.get('done'):
          return
        if 'trouble' in message:
          self._trouble(message['trouble'], message['code'], message['grace'])
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


def _messages(connection: socket.socket):
  """Yields the messages of a connection until it closes or sends something else.

  Raises TimeoutError.
  """
  try:
    with connection.makefile('rb') as lines:
      for line in lines:
        yield dict(json.loads(line))
  except TimeoutError:
    raise
  except (OSError, TypeError, ValueError):
    return
