# shellcheck shell=bash disable=SC2034
# Every setting of launch/tpu and launch/recipe. The environment wins over this file, and a flag
# over both: BAM_TYPE is --type, BAM_VALID_UNTIL is --valid-until. Times are in seconds.

# Who pays, and where. Zones are tried in this order. An empty project is gcloud's own default.
: "${BAM_PROJECT=}"
: "${BAM_ZONES=}" # us-central2-b,us-east5-a

# What: v4-N and v5p-N count cores, two a chip; v5e-N and v6e-N count chips. Several slices make one
# job over the data-centre network.
: "${BAM_TYPE=}"
: "${BAM_SLICES=1}"
: "${BAM_CAPACITY=on-demand}" # spot, reserved
: "${BAM_RUNTIME=}"           # of the VM; empty: the one for BAM_TYPE
: "${BAM_LABELS=}"            # KEY=VALUE,… beside bam_jax=NAME and bam_owner=USER
: "${BAM_CREATE_FLAGS=}"      # more flags of: gcloud compute tpus queued-resources create

# How long `up` tries: so long in each zone, so many times around the zones, with a pause between
# the rounds that doubles up to the longest. BAM_VALID_UNTIL is the cloud's own limit on a request
# (4h).
: "${BAM_WAIT=900}"
: "${BAM_ROUNDS=6}"
: "${BAM_BACKOFF=60}"
: "${BAM_BACKOFF_MAX=900}"
: "${BAM_VALID_UNTIL=}"

# `run`: what is sent, what it runs in, how often the workers are asked, how many times in a row
# they may not answer, and how long a command may take to save its state when it is told to stop;
# shorter when another worker has failed, without which it cannot.
: "${BAM_COMMIT=HEAD}"
: "${BAM_PYTHON=3.12}"
: "${BAM_REQUIREMENTS=launch/requirements.txt}"
: "${BAM_POLL=10}"
: "${BAM_SILENCE=30}"
: "${BAM_GRACE=300}"
: "${BAM_FAIL_GRACE=20}"

# `supervise`: how many restarts; a run that lasted so long gets all of them back. A command that
# fails may be the first sign of a preemption: so long it waits for the cloud to say so.
: "${BAM_RETRIES=10}"
: "${BAM_RETRIES_RENEW=3600}"
: "${BAM_SETTLE=60}"

# 1: `run` and `supervise` delete the TPU when they end, however they end.
: "${BAM_DELETE_ON_EXIT=0}"

# `launch/recipe`: what each kind of run trains on (empty: BAM_TYPE), and how many TPUs at a time.
: "${BAM_SEED_TYPE=}"
: "${BAM_SPECIALIST_TYPE=}"
: "${BAM_MIXTURE_TYPE=}"
: "${BAM_MIXTURE_SLICES=}"
: "${BAM_AT_ONCE=8}"
