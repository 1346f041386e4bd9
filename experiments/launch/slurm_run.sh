#!/bin/bash
# One run on several GPU nodes, a process per GPU, put back into the queue until it is finished.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 experiments/launch/slurm_run.sh \
#     --config=configs/paper/t5_base_upcycled.py --workdir=/shared/runs/t5_base_upcycled
#
# is submitted from the root of the repository, with the same .venv and the workdir seen by all
# nodes. What else can be set: MOEJAX_PYTHON, MOEJAX_RESTARTS (default 20).
#
#SBATCH --job-name=moejax
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# 180 s before the time is up all processes (no B:) are sent TERM: they save at the same step and end
# with 143. So they do when preempted, if the partition's GraceTime lets them.
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moejax-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
trap : TERM   # it is for the processes; the shell waits for them

srun "${MOEJAX_PYTHON:-.venv/bin/python}" -m moejax.main --distributed=slurm "$@"
code=$?
# 0: finished. 1, 2: an error that the same command would meet again. 130: Ctrl-C. Anything else, as
# 75 (another process was lost), 143 (told to stop) and 137 (killed), is worth another try.
case $code in
  0 | 1 | 2 | 130) exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MOEJAX_RESTARTS:-20}" ]; then
  echo "exit code $code: back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
