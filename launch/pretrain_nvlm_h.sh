#!/usr/bin/env bash
# Train a run file on a Slurm cluster, one torchrun a node:
#
#   sbatch --nodes=16 launch/pretrain_nvlm_h.sh configs/pretrain_nvlm_h_72b.yaml [section.key=value ...]
#
# Before its time limit, or when the job is requeued, the run saves and stops; the job then puts itself back into the queue
# and goes on from its last checkpoint, until a start ends well and leaves RUN_DIR/finished. See launch/README.md.
#SBATCH --job-name=pretrain_nvlm_h
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

if [ $# -lt 1 ]; then
    echo "usage: sbatch --nodes=N launch/pretrain_nvlm_h.sh CONFIG.yaml [section.key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
# shellcheck source=launch/env.sh
source launch/env.sh

# Reads the run file as training will, so that a mistake in it ends the job before any node starts a process.
run_dir=$(python -m megatron_nvlm.commands.show_config run_dir "$@")
mkdir -p "$run_dir"
rm -f "$run_dir/stop"

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one host must not meet
processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
echo "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes x $processes processes, $run_dir"

asked=no
ask_to_stop() {
    asked=yes
    echo "asked to stop: saving at the end of the step"
    touch "$run_dir/stop"
}
trap ask_to_stop USR1 TERM

# --export=ALL and --cpus-per-task: srun inherits neither from every sbatch.
srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$processes" --max-restarts=0 \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" \
    -m megatron_nvlm.train --config "$@" &
srun_pid=$!
status=0
while kill -0 $srun_pid 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait $srun_pid || status=$?
done

# A start that succeeds removes the markers of earlier ends, so they count only if this one ended well.
if [ $status -eq 0 ] && [ -e "$run_dir/finished" ]; then
    echo "the run is finished after step $(cat "$run_dir/finished")"
elif [ $asked = yes ] || { [ $status -eq 0 ] && [ -e "$run_dir/stopped" ]; }; then
    echo "stopped before the end; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "the run failed (status $status); it is not queued again, see the messages above" >&2
    exit $((status == 0 ? 1 : status))
fi
