#!/bin/bash
# Trains suites on a SLURM array. Each task is one shard; any task can finish all shards.
#
#   MOEJAX_RUNS=/shared/runs sbatch --array=1-8 experiments/launch/slurm_array.sh
#
# Submit it from the root of the repository. All nodes must see the same .venv. Other variables:
# MOEJAX_SUITE (default all), MOEJAX_SCALE (default mini), MOEJAX_PYTHON, MOEJAX_JOBS.
#
#SBATCH --job-name=moejax
#SBATCH --array=1-8
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00
# The array's indices must be 1-N: task I of N is shard I/N.
# On CPUs a run takes one core, so a task with --cpus-per-task=C trains C runs at a time.
# On GPUs give each task one GPU, and MOEJAX_JOBS=1, because two runs cannot share its memory:
#   sbatch --gpus-per-task=1 --cpus-per-task=4 --export=ALL,MOEJAX_JOBS=1 ...
#
# SLURM sends USR1 to the shell below (B:) 180 s before the time limit. The runs then save, and the
# task returns to the queue. They also save on SIGTERM, after preemption or cancellation. SLURM
# itself requeues a preempted task (PreemptMode=REQUEUE); it sends SIGKILL when GraceTime is over.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moejax-%A_%a.log

set -euo pipefail
: "${MOEJAX_RUNS:?set it to a folder that all nodes see}"
cd "${SLURM_SUBMIT_DIR:-.}"
source experiments/launch/until_saved.sh

until_saved "${MOEJAX_PYTHON:-.venv/bin/python}" -m experiments.main \
  --suite="${MOEJAX_SUITE:-all}" --scale="${MOEJAX_SCALE:-mini}" --runs="$MOEJAX_RUNS" \
  --jobs="${MOEJAX_JOBS:-${SLURM_CPUS_PER_TASK:-1}}" --keep_going \
  --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
if [[ $requeue ]]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
