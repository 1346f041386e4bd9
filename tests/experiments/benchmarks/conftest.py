"""Time that only works move."""

import types

import pytest

from experiments.benchmarks import common


@pytest.fixture
def clock(monkeypatch):
  """The benchmarks' clock: works move `now` on and may add their names to `calls`."""
  clock = types.SimpleNamespace(now=0.0, calls=[])
  monkeypatch.setattr(common.time, 'perf_counter', lambda: clock.now)
  monkeypatch.setattr(common.time, 'sleep', lambda seconds: None)
  return clock
