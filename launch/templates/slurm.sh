#!/usr/bin/env bash
# {{ command }}
# wrote this from launch/templates/slurm.sh. Submit it in the repository's root: sbatch THIS_FILE [--dry-run]
#SBATCH --job-name={{ name }}
#SBATCH --nodes={{ nodes }}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{ gpus_per_node }}
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
{% if sweep %}
#SBATCH --output=%x_%A_%a.log
#SBATCH --array=0-{{ sweep | length - 1 }}
{% else %}
#SBATCH --output=%x_%j.log
{% endif %}
{% if account %}
#SBATCH --account={{ account }}
{% endif %}
{% if partition %}
#SBATCH --partition={{ partition }}
{% endif %}
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export SLURM_NNODES="${SLURM_NNODES:-{{ nodes }}}" NPROC_PER_NODE="${NPROC_PER_NODE:-{{ gpus_per_node }}}"
export CONTAINER={{ container }}
{% if container != "none" %}
export CONTAINER_IMAGE={{ image | shell }} CONTAINER_MOUNTS={{ mounts | shell }}
{% endif %}
{% if sweep %}
unset SLURM_ARRAY_JOB_ID # common.sh takes an array for a chain of one run; here each task is a job with a run of its own
case ${SLURM_ARRAY_TASK_ID:-0} in
{% for overrides in sweep %}
    {{ loop.index0 }}) run=({{ overrides | map("shell") | join(" ") }}) ;;
{% endfor %}
esac
{% endif %}
# shellcheck source=launch/common.sh
source launch/common.sh {{ run_file | shell }} "$@"{% for override in overrides %} {{ override | shell }}{% endfor %}{% if sweep %} "${run[@]}"{% endif %}

