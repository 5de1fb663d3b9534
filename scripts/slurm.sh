#!/usr/bin/env bash
# A training command on several machines under Slurm. Ten minutes before its time is up, or when it is preempted,
# every process saves its state; the job is queued again and continues.
#
#   sbatch --nodes 4 --cpus-per-gpu 8 scripts/slurm.sh distill --recipe bidirectional14b --runs /shared/runs
#
#   PORT=29500          where the machines meet, on the first of them
#
# /shared must be seen by all machines. Account, partition, time and CPUs are sbatch's own options.
#SBATCH --job-name=anyflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@600
set -uo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540  # seconds for the step at hand and its checkpoint
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

asked=no
# All processes but this script. srun itself is left alone: it would answer SIGTERM by killing them unsaved.
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "$first:${PORT:-29500}" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  -m anyflow_cli "$@" &
run=$!
wait "$run"
code=$?
if [ "$asked" = yes ]; then
  wait "$run" && exit 0  # the first wait ended with the signal; by now they have saved, or had just finished
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
