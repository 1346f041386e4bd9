"""The launch scripts start what they say: run under a shell, with stand-ins for what they call."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import yaml

from experiments import main
from experiments.scheduler import Shard

LAUNCH = pathlib.Path(main.__file__).parent / 'launch'
RUN, SLICE = LAUNCH / 'slurm_run.sh', LAUNCH / 'tpu_slice.sh'
SLURM, KUBERNETES = LAUNCH / 'slurm_array.sh', LAUNCH / 'kubernetes_job.yaml'
# Notes its arguments, and on SIGTERM ends a little later, as one that saves does.
PYTHON = '''#!/bin/bash
trap 'sleep 0.2; echo saved >> "$NOTES/saved"; exit 130' TERM
printf '%s\\n' "$@" > "$NOTES/arguments.part"
mv "$NOTES/arguments.part" "$NOTES/arguments"
for _ in $(seq "${WAIT:-0}"); do sleep 0.05; done
exit "${CODE:-0}"
'''
SCONTROL = '#!/bin/sh\necho "$@" > "$NOTES/requeued"\n'


@pytest.fixture
def shell(tmp_path):
  """Starts a command with the stand-ins first in the path; they leave their notes in tmp_path."""
  for name, text in (('python', PYTHON), ('scontrol', SCONTROL)):
    (tmp_path / name).write_text(text)
    (tmp_path / name).chmod(0o755)

  def start(*command, **variables):
    environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'NOTES': str(tmp_path), **variables}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
  return start


def slurm(shell, tmp_path, **variables):
  return shell('bash', str(SLURM), MOEJAX_PYTHON='python', MOEJAX_RUNS=str(tmp_path / 'my runs'),
               SLURM_ARRAY_JOB_ID='77', SLURM_ARRAY_TASK_ID='3', SLURM_ARRAY_TASK_COUNT='8',
               **variables)


def parsed(tmp_path):
  """The noted arguments, as the real command line takes them."""
  dash_m, module, *flags = (tmp_path / 'arguments').read_text().splitlines()
  assert (dash_m, module) == ('-m', 'experiments.main')
  return main.parse(flags)


def test_a_slurm_task_is_a_shard(shell, tmp_path):
  assert subprocess.run(['bash', '-n', SLURM]).returncode == 0
  assert slurm(shell, tmp_path, SLURM_CPUS_PER_TASK='2', MOEJAX_SUITE='quickstart').wait() == 0
  args = parsed(tmp_path)
  assert args.suites == ['quickstart'] and args.scale == 'mini'
  assert args.runs == tmp_path / 'my runs'
  assert args.shard == Shard(3, 8) and args.jobs == 2 and args.keep_going
  assert not (tmp_path / 'requeued').exists()


def test_a_slurm_task_fails_with_what_it_runs_and_needs_a_folder(shell, tmp_path):
  assert slurm(shell, tmp_path, CODE='1').wait() == 1
  assert parsed(tmp_path).suite == 'all' and parsed(tmp_path).jobs == 1   # unless told otherwise
  process = shell('bash', str(SLURM))
  assert process.wait() != 0 and 'MOEJAX_RUNS: set it' in process.stderr.read()


@pytest.mark.parametrize('number, requeued', [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_task_waits_until_all_is_saved(shell, tmp_path, number, requeued):
  process = slurm(shell, tmp_path, WAIT='1000')
  while not (tmp_path / 'arguments').exists():
    time.sleep(0.02)
  time.sleep(0.2)   # the shell sets its traps after it has started the other
  process.send_signal(number)
  assert process.wait() == 130
  assert (tmp_path / 'saved').exists()
  assert (tmp_path / 'requeued').exists() == requeued
  if requeued:
    assert (tmp_path / 'requeued').read_text() == 'requeue 77_3\n'


def test_a_pod_is_a_shard(shell, tmp_path):
  claim, job = yaml.safe_load_all(KUBERNETES.read_text())
  spec = job['spec']
  assert spec['completionMode'] == 'Indexed' and spec['completions'] == spec['parallelism']
  pod = spec['template']['spec']
  assert pod['restartPolicy'] == 'Never'   # or backoffLimitPerIndex is refused
  assert pod['volumes'][0]['persistentVolumeClaim']['claimName'] == claim['metadata']['name']
  container, = pod['containers']
  mount, = container['volumeMounts']
  assert mount['name'] == pod['volumes'][0]['name']
  for index in range(spec['completions']):
    command = [*container['command'], *container['args']]
    assert shell(*command, JOB_COMPLETION_INDEX=str(index)).wait() == 0
    args = parsed(tmp_path)
    assert args.shard == Shard(index + 1, spec['completions'])
    assert args.suite == 'all' and args.jobs == 1 and args.keep_going
    assert str(args.runs) == mount['mountPath']


def test_a_pod_passes_sigterm_on(shell, tmp_path):
  *_, job = yaml.safe_load_all(KUBERNETES.read_text())
  container, = job['spec']['template']['spec']['containers']
  process = shell(*container['command'], *container['args'], JOB_COMPLETION_INDEX='0', WAIT='1000')
  while not (tmp_path / 'arguments').exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait() == 130 and (tmp_path / 'saved').exists()


SRUN = '''#!/bin/bash
echo "$1" "$2" > "$NOTES/srun_flags"
exec "${@:3}"
'''
# Answers from a list of states, one line a question, and notes what else it is asked.
GCLOUD = '''#!/bin/bash
case "$*" in
  *describe*)
    state=$(head -n 1 "$NOTES/states"); sed -i 1d "$NOTES/states"
    [ "$state" = NONE ] && { echo 'ERROR: NOT_FOUND: no such resource' >&2; exit 1; }
    [ "$state" = BROKEN ] && { echo 'ERROR: 503: try later' >&2; exit 1; }
    echo "$state" ;;
  *status.json*) echo '"phase": "'"$(cat "$NOTES/phase")"'"' ;;
  "storage cp"*) cat > "$NOTES/source.tar.gz"; echo "$*" >> "$NOTES/calls" ;;
  *"tpu-vm ssh"*)
    echo ssh >> "$NOTES/calls"; printf '%s\n' "${@: -1}" > "$NOTES/remote"
    code=$(head -n 1 "$NOTES/codes"); sed -i 1d "$NOTES/codes"
    [ "$code" = setup ] && { echo 'E: could not get lock'; exit 1; }
    [ "$code" = 0 ] && echo finished > "$NOTES/phase"
    echo "moejax ended with $code"; exit 1 ;;
  *create*) echo "$*" >> "$NOTES/calls"; [ ! -e "$NOTES/no_quota" ] ;;
  *) echo "$*" >> "$NOTES/calls" ;;
esac
'''


@pytest.mark.parametrize('code, restarts, requeued', [
    (0, 0, False), (1, 0, False), (130, 0, False), (75, 3, True), (143, 0, False),
    (137, 0, True), (75, 20, False)])
def test_a_slurm_run_is_started_again_when_that_may_help(shell, tmp_path, code, restarts, requeued):
  (tmp_path / 'srun').write_text(SRUN)
  (tmp_path / 'srun').chmod(0o755)
  process = shell('bash', str(RUN), '--config=configs/pretrain/vit_glyphs.py',
                  '--workdir=/shared/my run',
                  MOEJAX_PYTHON='python', SLURM_JOB_ID='77', SLURM_RESTART_COUNT=str(restarts),
                  CODE=str(code))
  assert process.wait() == code
  assert (tmp_path / 'arguments').read_text().splitlines() == [
      '-m', 'moejax.main', '--distributed=slurm', '--config=configs/pretrain/vit_glyphs.py',
      '--workdir=/shared/my run']
  assert (tmp_path / 'requeued').exists() == requeued
  assert (tmp_path / 'srun_flags').read_text() == '--wait=120 --cpus-per-task=8\n'


@pytest.mark.parametrize('number, requeued', [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_run_saves_and_comes_again_only_when_its_time_is_up(
    shell, tmp_path, number, requeued):
  (tmp_path / 'srun').write_text(SRUN)
  (tmp_path / 'srun').chmod(0o755)
  (tmp_path / 'python').write_text(PYTHON.replace('exit 130', 'exit 143'))
  process = shell('bash', str(RUN), MOEJAX_PYTHON='python', SLURM_JOB_ID='77', WAIT='1000')
  while not (tmp_path / 'arguments').exists():
    time.sleep(0.02)
  time.sleep(0.2)   # the shell sets its traps after it has started the other
  process.send_signal(number)
  assert process.wait() == 143 and (tmp_path / 'saved').exists()
  assert (tmp_path / 'requeued').exists() == requeued


def tpu_slice(shell, tmp_path, states, codes):
  for name, lines in (('states', states), ('codes', codes), ('phase', ['training'])):
    (tmp_path / name).write_text(''.join(f'{line}\n' for line in lines))
  (tmp_path / 'gcloud').write_text(GCLOUD)
  (tmp_path / 'gcloud').chmod(0o755)
  process = shell('bash', str(SLICE), 'a-run', '--config=configs/pretrain/vit_glyphs.py',
                  '--config.data.source=two words', MOEJAX_BUCKET='bucket', MOEJAX_ZONE='zone',
                  MOEJAX_TYPE='v5e-16', MOEJAX_POLL='0', HOME=str(tmp_path))
  code = process.wait(timeout=60)
  calls = (tmp_path / 'calls').read_text().splitlines()
  return code, [next(word for word in ('cp', 'create', 'delete', 'ssh') if word in call.split())
                for call in calls], calls


def test_a_preempted_slice_is_asked_for_again_until_the_run_is_finished(shell, tmp_path):
  states = ['NONE', 'WAITING_FOR_RESOURCES', 'ACTIVE', 'SUSPENDED', 'NONE', 'ACTIVE', 'ACTIVE']
  code, did, calls = tpu_slice(shell, tmp_path, states, [137, 75, 0])
  assert code == 0
  assert did == ['cp', 'create', 'ssh', 'delete', 'create', 'ssh', 'ssh', 'delete']
  assert '--spot' in calls[1] and '--accelerator-type=v5e-16' in calls[1]
  assert (tmp_path / 'source.tar.gz').stat().st_size > 10_000
  remote = (tmp_path / 'remote').read_text()
  assert subprocess.run(['bash', '-n'], input=remote, text=True, check=False).returncode == 0
  command = next(line for line in remote.splitlines() if 'moejax.main' in line)
  assert command == ('~/venv/bin/python -m moejax.main --distributed=tpu '
                     '--workdir=$bucket/runs/a-run --config=configs/pretrain/vit_glyphs.py '
                     r'--config.data.source=two\ words || code=$?')


@pytest.mark.parametrize('states, codes, code, did', [
    (['ACTIVE'], [1], 1, ['ssh']),   # an error of the run: the slice stays
    (['BROKEN', 'ACTIVE', 'BROKEN', 'ACTIVE'], [75, 0], 0, ['ssh', 'ssh', 'delete']),
    # Five in a row that cannot be set up, after the one that trained; five without quota.
    (['ACTIVE'] * 9, ['setup', 75, *['setup'] * 6], 1, ['ssh'] * 7),
    (['NONE'] * 9, [], 1, ['create'] * 5)])
def test_what_is_asked_again_and_what_is_given_up(shell, tmp_path, states, codes, code, did):
  if 'ACTIVE' not in states:
    (tmp_path / 'no_quota').touch()
  assert tpu_slice(shell, tmp_path, states, codes)[:2] == (code, ['cp', *did])


def test_a_slice_needs_a_bucket(shell):
  process = shell('bash', str(SLICE), 'a-run')
  assert process.wait() != 0 and 'MOEJAX_BUCKET: set it' in process.stderr.read()
