#!/usr/bin/env bash
# Run a training command on several machines under Slurm. Ten minutes before the time limit, or on preemption,
# every process saves a checkpoint; the job is queued again and continues from it.
#
#   sbatch --nodes 4 --cpus-per-gpu 8 scripts/slurm.sh distill --recipe bidirectional14b --runs /shared/runs
#
#   PORT=29500          port on the first machine, where the processes find each other
#
# All machines must see /shared. Set account, partition, time and CPUs with sbatch's own options.
#SBATCH --job-name=anyflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540  # seconds for the current step and its checkpoint
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

stopping=no
# scancel signals the tasks, not srun: on SIGTERM srun would kill the tasks before they save.
trap 'stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m anyflow_cli "$@" &
run=$!
wait "$run"
code=$?
if [ "$stopping" = yes ]; then
  wait "$run" && exit 0  # the signal ended the first wait; code 0: the training had just finished
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
