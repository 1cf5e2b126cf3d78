#!/usr/bin/env bash
# Pretrain NVLM-H on a Slurm cluster, one torchrun a node; --dry-run prints what would run, --preflight asks
# the doctor first:
#
#   sbatch launch/pretrain_nvlm_h.sh [--dry-run] [--preflight] [RUN_FILE] [section.key=value ...]
#SBATCH --job-name=pretrain_nvlm_h
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=launch/common.sh
source launch/common.sh configs/pretrain_nvlm_h_72b.yaml "$@"
