"""The watchdog, with threads in place of processes and a fraction of its times."""

import json
import socket
import threading
import time

import pytest

from moejax.cluster import watchdog
from moejax.cluster.watchdog import AGAIN, Watchdog
from moejax.config import ConfigError

TOKEN = 7
HOST = socket.gethostname()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(watchdog, 'EVERY', 0.02)
  monkeypatch.setattr(watchdog, 'LAST', 0.3)    # more than a busy machine keeps a thread waiting
  monkeypatch.setattr(watchdog, 'GRACE', 0.6)


class Group:
  """Watchdogs of n processes, and what each of them found wrong."""

  def __init__(self, n, lost=30.0, stall=30.0, processes=None):
    self.found, self.ended = {}, {}
    listener = socket.create_server(('', 0))
    self.address = ('localhost', listener.getsockname()[1])
    self.dogs = [Watchdog(i, processes or n, listener if i == 0 else None, self.address, TOKEN,
                          lost, stall, lambda *what, i=i: self.end(i, what))
                 for i in range(n)]
    self.wait(lambda: len(self.dogs[0]._peers) == n - 1)

  def end(self, process, what):
    self.ended.setdefault(process, time.monotonic())
    self.found.setdefault(process, what)

  @staticmethod
  def wait(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
      assert time.monotonic() < end
      time.sleep(0.005)

  def all_find(self, *who, code=watchdog.LOST):
    """The one trouble that these processes found, without its advice, with this exit code."""
    self.wait(lambda: len(self.found) == len(who))
    time.sleep(0.1)
    assert set(self.found) == set(who)
    (what, found), = set(self.found.values())
    assert found == code
    # JAX aborts the others when process 0 is gone, so they must be.
    assert 0 not in who or all(self.ended[0] > self.ended[n] for n in who if n)
    return what.removesuffix(f'. {AGAIN}')


def test_nothing_is_found_while_all_live_and_move():
  group = Group(3, lost=1.0, stall=1.0)
  end = time.monotonic() + 2
  while time.monotonic() < end:
    group.dogs[1].moved('training, step 1')   # the others wait for this one: no standstill
    time.sleep(0.05)
  leaving = [threading.Thread(target=dog.leave) for dog in group.dogs]
  for thread in leaving:
    thread.start()
  for thread in leaving:
    thread.join(10)
    assert not thread.is_alive()
  time.sleep(0.2)
  assert not group.found


def test_process_0_leaves_last():
  group = Group(2)
  zero = threading.Thread(target=group.dogs[0].leave)
  zero.start()
  time.sleep(0.2)
  assert zero.is_alive()
  group.dogs[1].leave()
  zero.join(10)
  assert not zero.is_alive() and not group.found


def test_a_process_that_dies_is_named_at_once():
  group = Group(3)
  began = time.monotonic()
  dead = group.dogs[1]
  dead._over.set()                     # says nothing any more, and its socket closes
  dead._to_zero.shutdown(socket.SHUT_RDWR)
  assert group.all_find(0, 2) == f'process 1 ({HOST}) is gone: its connection closed'
  assert time.monotonic() - began < 5   # long before `lost`


def test_process_0_dies():
  group = Group(3)
  zero = group.dogs[0]
  zero._over.set()
  for connection in zero._connections:
    connection.shutdown(socket.SHUT_RDWR)
  assert group.all_find(1, 2) == 'process 0 is gone: its connection closed'


def test_a_frozen_host_is_noticed_after_lost_seconds():
  group = Group(3, lost=0.5)
  began = time.monotonic()
  group.dogs[2]._over.set()             # silent, with its socket open
  assert group.all_find(0, 1) == f'process 2 ({HOST}) was not heard of for 0.5 s'
  assert time.monotonic() - began > 0.4


def test_process_0_freezes():
  with socket.create_server(('', 0)) as silent:   # accepts, and never answers
    found = []
    Watchdog(1, 2, None, silent.getsockname(), TOKEN, 0.3, 30.0, lambda *what: found.extend(what))
    Group.wait(lambda: found)
  assert found[0].startswith('process 0 was not heard of for 0.3 s')


def test_a_hanging_process_is_named_by_where_the_others_wait():
  group = Group(3, stall=0.5)
  for dog in group.dogs:
    dog.moved('training, step 6')
  for dog in (group.dogs[0], group.dogs[2]):
    dog.moved('training, step 7')
  assert group.all_find(0, 1, 2) == (
      f'no process got further for 0.5 s: others at training, step 7 wait for process 1 ({HOST}) '
      'at training, step 6')


def test_all_hang_at_the_same_place():
  group = Group(2, stall=0.3)
  assert group.all_find(0, 1) == 'no process got further for 0.3 s; all are at starting'


def test_a_process_that_never_reports():
  group = Group(2, lost=0.4, processes=3)
  assert group.all_find(0, 1) == 'process 2 did not report within 0.4 s'


@pytest.mark.parametrize('who', [0, 1])
def test_why_a_process_failed_reaches_the_others(who):
  group = Group(3)
  group.dogs[who].leave('ConfigError: no such file')
  others = {0, 1, 2} - {who}
  assert group.all_find(*others, code=watchdog.FAILED) == (
      f'process {who} ({HOST}) stopped: ConfigError: no such file')


def test_process_0_that_is_done_does_not_leave_amid_trouble():
  group = Group(3)
  zero = threading.Thread(target=group.dogs[0].leave)
  zero.start()                              # it waits for the others
  group.dogs[1].leave('ValueError: nan')
  group.wait(lambda: 0 in group.found)
  assert zero.is_alive()                    # else it would be gone, with 0, before it is ended
  assert group.found[0][1] == watchdog.FAILED
  zero.join(10)


def test_who_fails_of_the_same_says_so_itself():
  group = Group(2)
  group.dogs[1].leave('ConfigError: the same')
  time.sleep(0.02)
  group.dogs[0].leave('ConfigError: the same')   # within the time of grace
  time.sleep(0.3)
  assert not group.found


def test_a_stranger_at_the_port_is_ignored():
  group = Group(2)
  for text in (b'GET / HTTP/1.1\r\n\r\n', json.dumps({'token': 8, 'process': 1}).encode() + b'\n'):
    with socket.create_connection(group.address) as stranger:
      stranger.sendall(text)
      stranger.settimeout(5)
      assert stranger.recv(100) == b''   # it is shown the door
  time.sleep(0.1)
  assert not group.found and len(group.dogs[0]._connections) == 1


def test_no_way_to_process_0():
  with socket.create_server(('', 0)) as closed:
    address = closed.getsockname()
  with pytest.raises(ConfigError, match='--lost_seconds.*a way from this host.*Connection refused'):
    Watchdog(1, 2, None, ('localhost', address[1]), TOKEN, 1.0, 1.0)
