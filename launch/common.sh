# shellcheck shell=bash
# The job itself, sourced by the scripts of this folder in the repository's root: `source launch/common.sh DEFAULT_RUN_FILE "$@"`.
#
# Before its time limit, or when the job is requeued, the run saves and stops; the job then puts itself back into the queue
# and goes on from its last checkpoint, until a start ends well and leaves RUN_DIR/finished. See launch/README.md.

refuse() {
    echo "error: $*" >&2
    exit 2
}

dry_run=no run_file=$1
shift
if [ "${1:-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
case ${1:-} in
    --*) refuse "unknown option $1; usage: sbatch SCRIPT [--dry-run] [RUN_FILE] [section.key=value ...]" ;;
    "" | *=*) ;;
    *)
        run_file=$1
        shift
        ;;
esac
# shellcheck source=launch/env.sh
source launch/env.sh

nodes=${SLURM_NNODES:-16}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
elif [ $dry_run = yes ]; then
    processes=${NPROC_PER_NODE:-8}
else
    refuse "this is a Slurm job; submit it with sbatch, or add --dry-run to see what it would run"
fi
# Reads the run file as training will, so that a mistake in it ends the job before any node starts a process.
run_dir=$(python -m megatron_nvlm.commands.show_config --world-size $((nodes * processes)) run_dir "$run_file" "$@")

job=${SLURM_JOB_ID:-0}
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
else
    head_node=HEAD_NODE # known once the job has nodes
fi
port=$((20000 + job % 20000)) # two jobs on one host must not meet
# --export=ALL and --cpus-per-task: srun inherits neither from every sbatch.
command=(srun --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-96}" --kill-on-bad-exit=1
    torchrun --nnodes="$nodes" --nproc-per-node="$processes" --max-restarts=0
    --rdzv-id="$job.${SLURM_RESTART_COUNT:-0}" --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port"
    -m megatron_nvlm.train --config "$run_file" "$@")

if [ $dry_run = yes ]; then
    echo "$nodes nodes x $processes processes = $((nodes * processes)) ranks, run directory $run_dir"
    for ((node = 0; node < nodes; node++)); do
        echo "node $node: ranks $((node * processes)) to $(((node + 1) * processes - 1))"
    done
    printf 'OMP_NUM_THREADS=%s CUDA_DEVICE_MAX_CONNECTIONS=%s TORCH_NCCL_ASYNC_ERROR_HANDLING=%s\n' \
        "$OMP_NUM_THREADS" "$CUDA_DEVICE_MAX_CONNECTIONS" "$TORCH_NCCL_ASYNC_ERROR_HANDLING"
    echo "${command[*]@Q}"
    exit 0
fi

mkdir -p "$run_dir"
rm -f "$run_dir/stop"
echo "job $job, start ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $processes processes, $run_dir"

asked=no
ask_to_stop() {
    asked=yes
    echo "asked to stop: saving at the end of the step"
    touch "$run_dir/stop"
}
trap ask_to_stop USR1 TERM

"${command[@]}" &
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
