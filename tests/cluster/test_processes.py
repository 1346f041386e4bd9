"""How a process finds the others, from flags and environment; what one alone does."""

import signal
import socket
import sys

import pytest

from moejax.cluster import processes
from moejax.cluster.processes import Hosts, Launch
from moejax.config import ConfigError
from tests import fork_server

FLAGS = {'coordinator': 'host:1234', 'processes': 2, 'process': 0}
SRUN = {'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '4'}
POD = {'TPU_WORKER_HOSTNAMES': 'a,b'}


@pytest.mark.parametrize('launch, environment, way', [
    (Launch(), {}, 'off'),
    (Launch(), SRUN, 'slurm'),
    (Launch(), {'SLURM_NTASKS': '4'}, 'off'),              # in the batch script, not under srun
    (Launch(), SRUN | {'SLURM_STEP_NUM_TASKS': '1'}, 'off'),
    (Launch(), POD, 'tpu'),
    (Launch(), {'TPU_WORKER_HOSTNAMES': 'localhost'}, 'off'),
    (Launch(**FLAGS), SRUN | POD, 'flags'),
    (Launch(distributed='off'), SRUN | POD, 'off'),
    (Launch(distributed='tpu'), SRUN, 'tpu'),
])
def test_auto_follows_flags_then_the_environment(launch, environment, way):
  assert launch.way(environment) == way


@pytest.mark.parametrize('changes, message', [
    ({'distributed': 'mpi'}, '--distributed: got .mpi.'),
    ({'coordinator': 'host:1'}, '--coordinator, --processes, --process: got .*all of HOST:PORT'),
    ({'processes': 2, 'process': 0}, '--coordinator, --processes, --process: got'),
    ({'distributed': 'flags'}, '--coordinator, --processes, --process: got'),
    (FLAGS | {'distributed': 'slurm'}, '--distributed: got .slurm., allowed: auto or flags'),
    (FLAGS | {'process': 2}, '--process: got 2, allowed: 0 to 1'),
    (FLAGS | {'coordinator': 'host'}, '--coordinator: got .host., allowed: HOST:PORT'),
    (FLAGS | {'coordinator': 'host:http'}, '--coordinator: got'),
    ({'lost_seconds': -1}, '--lost_seconds: got -1, allowed: 0, or >= 5'),
    ({'lost_seconds': 0.5}, '--lost_seconds: got 0.5, allowed: 0, or >= 5'),
    ({'stall_seconds': 0}, '--stall_seconds: got 0, allowed: >= 1'),
    ({'join_seconds': 0}, '--join_seconds: got 0'),
])
def test_flags_that_make_no_sense(changes, message):
  with pytest.raises(ConfigError, match=message):
    Launch(**changes)


@pytest.mark.parametrize('launch, known', [
    (Launch(join_seconds=5, **FLAGS), {
        'coordinator_address': 'host:1234', 'num_processes': 2, 'process_id': 0,
        'cluster_detection_method': 'deactivate'}),
    (Launch(distributed='slurm'), {'cluster_detection_method': 'slurm'}),
    (Launch(distributed='tpu'), {}),
])
def test_jax_is_told_what_is_known(launch, known, monkeypatch):
  known = known | {'initialization_timeout': launch.join_seconds + processes.GRACE}
  told = {}
  monkeypatch.setattr(processes.jax.distributed, 'initialize', lambda **given: told.update(given))
  assert processes.join(launch).processes == 1   # as nobody else came, there is nobody to watch
  assert told == known


@pytest.mark.parametrize('environment, method', [
    (SRUN, 'gcetpu'), ({'OMPI_COMM_WORLD_SIZE': '2'}, 'gcetpu'), (SRUN | POD, 'gketpu')])
def test_a_slice_is_a_slice_whatever_else_started_it(environment, method, monkeypatch):
  """JAX would ask SLURM and Open MPI before it looks for a TPU."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  told = {}
  monkeypatch.setattr(processes.jax.distributed, 'initialize', lambda **given: told.update(given))
  processes.join(Launch(distributed='tpu'))
  assert told['cluster_detection_method'] == method


@pytest.mark.parametrize('error, kind', [
    (RuntimeError('DEADLINE_EXCEEDED: Barrier timed out.\nmore'), processes.NotAllCame),
    (ValueError('coordinator_address should be defined.'), ConfigError)])
def test_nobody_came(error, kind, monkeypatch):
  def initialize(**_):
    raise error
  monkeypatch.setattr(processes.jax.distributed, 'initialize', initialize)
  with pytest.raises(ConfigError) as found:
    processes.join(Launch(join_seconds=7, **FLAGS))
  assert type(found.value) is kind   # the first kind is worth another try
  assert "--distributed: got 'flags', allowed: 2 processes that find each other within 7 s" in str(
      found.value)
  assert str(error).splitlines()[0] in str(found.value) and 'more' not in str(found.value)


def test_a_slice_of_several_hosts_is_not_trained_on_by_each_alone(monkeypatch):
  monkeypatch.setattr(processes.jax, 'process_count', lambda: 4)
  with pytest.raises(ConfigError, match='tpu, on a slice of 4 hosts. Add --distributed=tpu'):
    processes.join(Launch())


def test_one_alone_waits_for_nobody():
  alone = Hosts()
  assert (alone.stop(None), alone.stop(15)) == (None, 15)
  alone.same('config', 'anything', 'nothing')
  alone.moved('training, step 1')
  with pytest.raises(KeyError), alone.leaving():
    raise KeyError   # passes through: nobody is to be told


def test_sigterm_before_training_ends_a_process_among_others():
  """JAX's own service would take the signal and tell nobody."""
  with socket.create_server(('localhost', 0)) as free:
    port = free.getsockname()[1]
  code = f"""
import os, signal, time
from moejax.cluster import processes
from moejax.cluster.launch import Launch
processes.join(Launch(coordinator='localhost:{port}', processes=1, process=0))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
print('still there', flush=True)
os._exit(0)
"""
  done = fork_server.run([sys.executable, '-c', code], capture_output=True, timeout=120)
  assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
