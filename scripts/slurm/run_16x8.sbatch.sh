#!/usr/bin/env bash
#SBATCH --job-name=disagmoe-16x8
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# Train at paper scale under Slurm: one task a node, which starts the node's processes.
#   sbatch scripts/slurm/run_16x8.sbatch.sh [options of scripts/paper/run_16x8.sh] [-- MEGATRON FLAGS]
#   bash scripts/slurm/run_16x8.sbatch.sh --dry-run      every rank's role and command, without Slurm
set -euo pipefail

# sbatch runs a copy of this file elsewhere; the folder it was submitted from has the original
folder=$(dirname "${BASH_SOURCE[0]}")
[ -f "$folder/../paper/run_16x8.sh" ] || folder=${SLURM_SUBMIT_DIR:?submit from the checkout}/scripts/slurm
run=$folder/../paper/run_16x8.sh

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  for word in "$@"; do
    [ "$word" != --dry-run ] || exec bash "$run" "$@"
  done
  echo "${0##*/}: not under Slurm: use sbatch, or --dry-run" >&2
  exit 2
fi
master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# shellcheck disable=SC2016  # SLURM_NODEID is each task's own
srun --ntasks-per-node=1 bash -c 'exec bash "$0" --node "$SLURM_NODEID" --master "$1" "${@:2}"' "$run" "$master" "$@"
