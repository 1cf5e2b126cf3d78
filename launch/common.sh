# shellcheck shell=bash
# The job itself, sourced by the scripts of this folder in the repository's root: `source launch/common.sh DEFAULT_RUN_FILE "$@"`.
#
# Before its time limit, or when the job is requeued, the run saves and stops. After each start `job_start` decides from the
# history in the run directory whether the job goes back into the queue, and without which nodes. See launch/README.md.

refuse() {
    echo "error: $*" >&2
    exit 2
}

# Before anything that takes time: a signal that finds no trap ends the script, and the job with it.
asked=() run_dir="" status=0
# shellcheck disable=SC2329  # the trap calls it
ask_to_stop() {
    asked=(--asked)
    echo "asked to stop: saving at the end of the step"
    if [ -d "$run_dir" ]; then touch "$run_dir/stop"; fi
}
if [ -n "${SLURM_JOB_ID:-}" ]; then trap ask_to_stop USR1 TERM; fi

dry_run=no preflight=no run_file=$1
shift
while :; do
    case ${1:-} in
        --dry-run) dry_run=yes ;;
        --preflight) preflight=yes ;;
        *) break ;;
    esac
    shift
done
case ${1:-} in
    --*) refuse "unknown option $1; usage: sbatch SCRIPT [--dry-run] [--preflight] [RUN_FILE] [section.key=value ...]" ;;
    "" | *=*) ;;
    *)
        run_file=$1
        shift
        ;;
esac
# shellcheck source=launch/cluster.env
source launch/cluster.env

# on_node: options of srun, and what comes before a command of each node. here: what comes before one of this script.
on_node=(--export=ALL) inside=() here=()
mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
if [ "$CONTAINER" != none ] && [ -z "$CONTAINER_IMAGE" ]; then
    refuse "CONTAINER is $CONTAINER and CONTAINER_IMAGE is empty; name an image in launch/cluster.env"
fi
case $CONTAINER in
    none) ;;
    pyxis)
        on_node+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
        here=(srun --overlap --nodes=1 --ntasks=1 "${on_node[@]}")
        ;;
    apptainer)
        inside=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$CONTAINER_IMAGE")
        here=("${inside[@]}")
        ;;
    *) refuse "CONTAINER is $CONTAINER; it must be none, pyxis or apptainer (launch/cluster.env)" ;;
esac

nodes=${SLURM_NNODES:-16}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    processes=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
elif [ $dry_run = yes ]; then
    processes=${NPROC_PER_NODE:-8}
    if [ "$CONTAINER" = pyxis ]; then here=(); fi # no srun outside a job: the submitting host's own Python checks the run file
else
    refuse "this is a Slurm job; submit it with sbatch, or add --dry-run to see what it would run"
fi
# Reads the run file as training will, so that a mistake in it ends the job before any node starts a process.
run_dir=$("${here[@]}" python -m megatron_nvlm.commands.show_config --world-size $((nodes * processes)) run_dir "$run_file" "$@")

job=${SLURM_JOB_ID:-0}
start=$job.${SLURM_RESTART_COUNT:-0}
submission=${SLURM_ARRAY_JOB_ID:-$job} # a chain is an array of one job after another
host_names=HEAD_NODE                   # known once the job has nodes
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    host_names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -s -d ,)
fi
port=$((20000 + job % 20000)) # two jobs on one host must not meet
# --export=ALL and --cpus-per-task: srun inherits neither from every sbatch.
everywhere=(srun "${on_node[@]}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-96}" --kill-on-bad-exit=1 "${inside[@]}" python -m)
ranks=(--nnodes="$nodes" --nproc-per-node="$processes" --rdzv-backend=c10d --rdzv-endpoint="${host_names%%,*}:$port")
command=("${everywhere[@]}" megatron_nvlm.commands.launch_node "$run_dir" "$start"
    "${ranks[@]}" --max-restarts="$MAX_RESTARTS" --rdzv-id="$start" -m megatron_nvlm.train --config "$run_file" "$@")
doctor=("${everywhere[@]}" megatron_nvlm.commands.launch_node "$run_dir" "$start"
    "${ranks[@]}" --rdzv-id="preflight-$start" -m megatron_nvlm.commands.doctor
    --config "$run_file" --job-start "$start" --own-check "$HEALTH_CHECK" --least-megabytes "$LEAST_MEGABYTES" "$@")

if [ $dry_run = yes ]; then
    echo "$nodes nodes x $processes processes = $((nodes * processes)) ranks, run directory $run_dir"
    for ((node = 0; node < nodes; node++)); do
        echo "node $node: ranks $((node * processes)) to $(((node + 1) * processes - 1))"
    done
    for name in OMP_NUM_THREADS CUDA_DEVICE_MAX_CONNECTIONS NCCL_SOCKET_IFNAME TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG; do
        if [ -n "${!name:-}" ]; then echo "$name=${!name}"; fi
    done
    if [ $preflight = yes ]; then echo "${doctor[*]@Q}"; fi
    echo "${command[*]@Q}"
    exit 0
fi

# Asks whether this start may run (before) or the job is queued again (after): sets action, code and excluded.
ask_job_start() {
    local answer
    answer=$("${here[@]}" python -m megatron_nvlm.commands.job_start "$1" "$run_dir" --start "$start" --job "$submission" \
        --max-failures "$MAX_FAILURES" "${@:2}") || {
        echo "error: the history of starts in $run_dir could not be kept; the job is not queued again" >&2
        exit $((status > 0 ? status : 1))
    }
    read -r action code excluded <<<"$answer"
}

# Puts the job back into the queue without the nodes in $excluded; of a chain, the next job goes on.
back_into_the_queue() {
    local pending=$job
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
        pending=$SLURM_ARRAY_JOB_ID
        echo "the next job of the chain goes on"
    else
        echo "back into the queue"
        trap '' TERM # Slurm ends this script soon after the requeue, and only a pending job takes other nodes
        scontrol requeue "$job" || {
            echo "error: this cluster forbids requeue; submit a chain: sbatch --array=1-9%1 (launch/README.md)" >&2
            exit 1
        }
    fi
    if [ "$excluded" != - ]; then
        local before
        before=$(scontrol show job -o "$job" | sed -n 's/.* ExcNodeList=\([^ (]*\).*/\1/p')
        scontrol update JobId="$pending" ExcNodeList="${before:+$before,}$excluded" ||
            echo "the nodes $excluded could not be left out of the next start" >&2
    fi
    exit 0
}

mkdir -p "$run_dir"
ask_job_start before --nodes "$host_names"
case $action in
    requeue) back_into_the_queue ;;
    end) exit "$code" ;;
esac
echo "job $job, start ${SLURM_RESTART_COUNT:-0}: $nodes nodes x $processes processes ($host_names), $run_dir"

if [ $preflight = yes ]; then
    status=0
    "${here[@]}" python -m megatron_nvlm.commands.doctor --config "$run_file" --world-size $((nodes * processes)) \
        --least-megabytes "$LEAST_MEGABYTES" "$@" || status=$?
    if [ $status = 0 ]; then "${doctor[@]}" || status=$?; fi
    if [ $status != 0 ]; then
        ask_job_start preflight --status $status
        if [ "$action" = requeue ]; then back_into_the_queue; fi
        exit "$code"
    fi
fi

if [ ${#asked[@]} -gt 0 ]; then touch "$run_dir/stop"; fi # `before` removes the requests that earlier starts left
"${command[@]}" &
srun_pid=$!
status=0
while kill -0 $srun_pid 2>/dev/null; do # a trapped signal ends `wait` early
    status=0
    wait $srun_pid || status=$?
done

ask_job_start after --status $status "${asked[@]}"
if [ "$action" = requeue ]; then back_into_the_queue; fi
exit "$code"
