"""What the runner runs: a process that leaves its result in a folder of its own."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol


class Job(Protocol):
  """A piece of work that one process does, as suite.Run or surgeries.Measure.

  Doing it again where it was stopped goes on, and where it is finished changes nothing.

  Attributes:
    label: what people call it.
    key: two jobs of one key are the same.
    name: of its folder. Jobs that share one are done one after the other.
    parent: the job whose result it starts from, or None.
    work: units of the progress bar, such as steps.
    cost: FLOPs, for the order and for sharing out.
  """
  @property
  def label(self) -> str: ...

  @property
  def key(self) -> str: ...

  @property
  def name(self) -> str: ...

  @property
  def parent(self) -> 'Job | None': ...

  @property
  def work(self) -> int: ...

  @property
  def cost(self) -> float: ...

  def command(self, folder: pathlib.Path) -> list[str]:
    """Words after `python` of the command that does it, with the jobs' folders in `folder`."""

  def finished(self, folder: pathlib.Path) -> bool:
    """Whether `folder` holds its result, whole."""

  def done(self, folder: pathlib.Path) -> int:
    """How much of `work` is done, as its files say."""


def merge(groups: Mapping[str, Sequence[Job]]) -> tuple[dict[str, Job], dict[str, set[str]]]:
  """Jobs of several suites, shared ones once.

  Args:
    groups: {suite: its jobs}.

  Returns:
    {key: job}, parents before children, suite after suite; {suite: keys of its jobs and of all they
    descend from}.
  """
  found: dict[str, Job] = {}
  keys = {}
  for name, jobs in groups.items():
    lineage = list(_lineage(jobs))
    keys[name] = {job.key for job in lineage}
    for job in lineage:
      found.setdefault(job.key, job)
  return found, keys


def _lineage(jobs: Iterable[Job]) -> Iterable[Job]:
  for job in jobs:
    if job.parent:
      yield from _lineage([job.parent])
    yield job
