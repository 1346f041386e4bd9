#!/bin/bash
# Trains one run on several GPU nodes, one process per GPU; requeues the job until it is finished.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 experiments/launch/slurm_run.sh \
#     --config=configs/paper/t5_base_upcycled.py --workdir=/shared/runs/t5_base_upcycled \
#     --config.init.parent=/shared/runs/t5_base --config.data.data_dir=/shared/tfds \
#     --config.data.text.vocabulary=/shared/sentencepiece.model
#
# Submit it from the root of the repository. All nodes must see the same .venv and the workdir.
# Other variables: MOEJAX_PYTHON, MOEJAX_RESTARTS (default 20).
#
#SBATCH --job-name=moejax
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# SLURM sends USR1 to the shell below (B:) 180 s before the time limit. The shell sends TERM to the
# processes; they save at the same step and end with 143, and the job returns to the queue. They
# also get TERM after preemption or cancellation. SLURM itself requeues a preempted job
# (PreemptMode=REQUEUE), but not a cancelled one.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moejax-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source experiments/launch/until_saved.sh

# --wait: after the first process ends, the others have 120 s; without it, srun would wait for a
# frozen process for ever. Since SLURM 22.05, srun does not read the job's own --cpus-per-task.
until_saved srun --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  "${MOEJAX_PYTHON:-.venv/bin/python}" -m moejax.main --distributed=slurm "$@"
# 0: finished. 1, 2: an error that the same command would meet again. 130, 143: stopped by a signal;
# only USR1 requeues the job. All other codes, such as 75 (another process was lost) and 137
# (killed), requeue it.
case $code in
  0 | 1 | 2 | 130) exit "$code" ;;
  143) [[ $requeue ]] || exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MOEJAX_RESTARTS:-20}" ]; then
  echo "exit code $code: back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
