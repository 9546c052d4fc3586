#!/bin/bash
# Run a federation with plain sbatch, without submitit:
#   slurm/submit.sh CONFIG [--site SITE.yaml] [--set KEY=VALUE ...]
#
# ARRAY_TASKS (4), SERVER_OPTIONS and CLIENT_OPTIONS (further sbatch options) come from the
# environment: ARRAY_TASKS=8 CLIENT_OPTIONS="--partition=gpu --gpus-per-task=1" slurm/submit.sh ...
# It does what `python -m fedhpc.submit` does: the same run folder, the same two modules.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)

ARRAY_TASKS=${ARRAY_TASKS:-4}
RUN_DIR=$(python -m fedhpc.submit "$@" --executor slurm --set cluster.array_tasks="$ARRAY_TASKS" \
    --prepare)

# No array without its server, and no server without its array.
trap 'python -m fedhpc.cancel "$RUN_DIR"' ERR
trap 'exit 130' INT TERM HUP

SERVER=$(sbatch --parsable --output="$RUN_DIR/jobs/%j_0_log.out" \
    --error="$RUN_DIR/jobs/%j_0_log.err" ${SERVER_OPTIONS:-} "$HERE/server.sbatch" "$RUN_DIR")
SERVER=${SERVER%%;*}
printf '{"executor": "slurm", "server": "%s"}\n' "$SERVER" > "$RUN_DIR/jobs/submission.json"
trap 'python -m fedhpc.cancel "$RUN_DIR"; exit 130' INT TERM HUP

CLIENTS=$(sbatch --parsable --output="$RUN_DIR/jobs/%A_%a_0_log.out" \
    --error="$RUN_DIR/jobs/%A_%a_0_log.err" \
    --array="0-$((ARRAY_TASKS - 1))" --dependency="after:$SERVER" ${CLIENT_OPTIONS:-} \
    "$HERE/clients.sbatch" "$RUN_DIR")
CLIENTS=${CLIENTS%%;*}
printf '{"executor": "slurm", "server": "%s", "clients": [%s]}\n' "$SERVER" \
    "$(seq -f "\"${CLIENTS}_%g\"" -s ', ' 0 $((ARRAY_TASKS - 1)))" > "$RUN_DIR/jobs/submission.json"
trap - ERR INT TERM HUP

echo "server job $SERVER, client array $CLIENTS"
echo "run folder: $RUN_DIR"
