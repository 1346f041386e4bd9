#!/bin/bash
# One run on several GPU nodes, a process per GPU, put back into the queue until it is finished.
#
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 experiments/launch/slurm_run.sh \
#     --config=configs/paper/t5_base_upcycled.py --workdir=/shared/runs/t5_base_upcycled \
#     --config.init.parent=/shared/runs/t5_base --config.data.data_dir=/shared/tfds \
#     --config.data.text.vocabulary=/shared/sentencepiece.model
#
# is submitted from the root of the repository, with the same .venv and the workdir seen by all
# nodes. What else can be set: MOEJAX_PYTHON, MOEJAX_RESTARTS (default 20).
#
#SBATCH --job-name=moejax
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# 180 s before the time is up the shell below (B:) is sent USR1 and passes TERM on: the processes
# save at the same step and end with 143, and the job goes back into the queue. When preempted or
# cancelled they are sent TERM too; a preempted job is put back by SLURM itself
# (PreemptMode=REQUEUE), a cancelled one is not.
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moejax-%j.log

set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
source experiments/launch/until_saved.sh

# --wait: when one process has ended, a frozen one has 120 s; srun would wait for it for ever.
# Since SLURM 22.05 srun no longer reads the job's own --cpus-per-task.
until_saved srun --wait=120 --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" \
  "${MOEJAX_PYTHON:-.venv/bin/python}" -m moejax.main --distributed=slurm "$@"
# 0: finished. 1, 2: an error that the same command would meet again. 130, 143: told to stop, and by
# USR1 alone to come again. Anything else, as 75 (another process was lost) and 137 (killed), is
# worth another try.
case $code in
  0 | 1 | 2 | 130) exit "$code" ;;
  143) [[ $requeue ]] || exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MOEJAX_RESTARTS:-20}" ]; then
  echo "exit code $code: back into the queue (restart $((${SLURM_RESTART_COUNT:-0} + 1)))"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
