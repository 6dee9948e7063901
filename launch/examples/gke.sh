#!/usr/bin/env bash
# A recipe on TPUs of a GKE cluster, TPU7x among them, as an xpk workload (pip install xpk; tested
# with the flags of 1.16). From the checkout, after `xpk cluster create`:
#   PROJECT=… ZONE=… CLUSTER=… TYPE=v6e-16 launch/examples/gke.sh my-exp \
#     --config=configs/small_590m.py --workdir=gs://bucket/small --runs=seed
# A preempted or evicted workload starts again and goes on from its newest checkpoint.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${TYPE:?}"

workload=$1
shift
printf -v arguments ' %q' "$@"
xpk workload create \
  --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --workload="$workload" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
  --base-docker-image=python:3.12 --script-dir=. \
  --max-restarts=10 --termination-grace-period-seconds=300 \
  --command="pip install --quiet --requirement launch/requirements.txt && \
exec python -m bam_jax.main$arguments"
