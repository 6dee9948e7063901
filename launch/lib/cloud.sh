# shellcheck shell=bash
# All that is asked of gcloud, except to reach a worker; what its errors mean, in a word.

require_cloud() {
  command -v gcloud >/dev/null ||
    refuse 'gcloud is not installed: see https://cloud.google.com/sdk/docs/install.'
  if [[ -z $BAM_PROJECT ]]; then
    BAM_PROJECT=$(gcloud config get-value project 2>/dev/null) || true
  fi
  [[ -n $BAM_PROJECT ]] ||
    refuse 'A project is required: set BAM_PROJECT, or give --project=PROJECT.'
  [[ -n ${BAM_ZONES// /} ]] || refuse 'A zone is required: set BAM_ZONES, or give --zones=ZONE,….'
}

# gcloud compute tpus …; what it complains of goes to $scratch/errors, and `trouble` says what it
# is.
tpus() {
  local try
  for try in 1 2 3; do
    trouble=''
    gcloud compute tpus "$@" --project="$BAM_PROJECT" --quiet </dev/null 2>"$scratch/errors" &&
      return 0
    trouble=$(trouble_of "$(<"$scratch/errors")")
    [[ $trouble == transient && $try != 3 ]] || return 1
    pause "$BAM_POLL"
  done
}

trouble_of() {
  case $1 in
    *'no more capacity'* | *'ot enough '*'capacity'* | *tockout* | *'stocked out'*)
      echo stock-out
      ;;
    *uota*) echo quota ;;
    *NOT_FOUND:* | *'was not found'*) echo missing ;;
    *ALREADY_EXISTS:*) echo exists ;;
    *'active account'* | *'auth login'* | *UNAUTHENTICATED* | *eauthentication*) echo credentials ;;
    *SERVICE_DISABLED* | *'it is disabled'*) echo disabled ;;
    *PERMISSION_DENIED* | *'does not have permission'*) echo permission ;;
    *UNAVAILABLE* | *INTERNAL:* | *DEADLINE_EXCEEDED* | *'timed out'* | *onnection* | *'server at'*)
      echo transient
      ;;
    *) echo other ;;
  esac
}

# What gcloud said last, on one line.
complaint() {
  tr '\n' ' ' <"$scratch/errors" | sed -e 's/.*ERROR: ([^)]*) //' -e 's/  */ /g' -e 's/ $//'
}

# Ends the script when neither another zone nor waiting would fix what gcloud complained of.
refuse_hopeless() {
  case $trouble in
    credentials) refuse 'No credentials for Google Cloud were found: run gcloud auth login.' ;;
    disabled)
      refuse "Project '$BAM_PROJECT' does not use the Cloud TPU API yet: run" \
        "gcloud services enable tpu.googleapis.com --project=$BAM_PROJECT."
      ;;
    permission)
      refuse "Your account may not use Cloud TPUs in project '$BAM_PROJECT', or there is no such" \
        'project: ask for the role roles/tpu.admin.'
      ;;
  esac
}

# Looks for the TPU in a zone: sets `state`, `type` and `reason`. Status 1: not there; 2: `trouble`.
look() {
  local fields='state.state,tpu.nodeSpec[0].node.acceleratorType,state.failedData.error.message'
  state='' type='' reason=''
  if tpus queued-resources describe "$name" --zone="$1" --format="value($fields)" \
    >"$scratch/answer"; then
    IFS=$'\t' read -r state type reason <"$scratch/answer" || true
    return 0
  fi
  [[ $trouble == missing ]] && return 1
  return 2
}

# Sets `zone` to where the TPU is, and what `look` sets. Status 1: nowhere.
find_tpu() {
  local code each
  zone=''
  for each in $BAM_ZONES; do
    code=0
    look "$each" || code=$?
    if ((code == 0)); then
      zone=$each
      return 0
    fi
    ((code == 1)) || fail_to "look for $name in $each"
  done
  return 1
}

require_tpu() {
  find_tpu || refuse "There is no TPU '$name' in ${BAM_ZONES// /, }: launch/tpu up $name makes it."
}

# Ends the script with what gcloud complained of.
fail_to() {
  refuse_hopeless
  say "could not $1: $(complaint)"
  exit 1
}

# The nodes of the TPU in `zone`, one a slice: arrays `nodes`, `node_states`, and `node_workers` of
# how many workers each has. Status 2: `trouble`.
list_nodes() {
  local node node_state count
  nodes=() node_states=() node_workers=()
  tpus tpu-vm list --zone="$zone" --filter="labels.bam_jax=$name" \
    --format='value(name.basename(),state,networkEndpoints.len())' >"$scratch/answer" || return 2
  while IFS=$'\t' read -r node node_state count; do
    local number=0
    [[ $node == "$name" ]] || number=$((10#${node##*-}))
    nodes[number]=$node node_states[number]=$node_state node_workers[number]=$count
  done <"$scratch/answer"
}

# Whether all of the TPU is there; `illness` says what is not. Status 1: it is gone; 2: `trouble`.
healthy() {
  local code=0 number
  illness=''
  look "$zone" || code=$?
  ((code != 1)) || illness="its request is gone"
  ((code != 2)) || return 2
  [[ -n $illness || $state == ACTIVE ]] || illness="its request is $state"
  [[ -z $illness ]] || return 1
  list_nodes || return 2
  ((${#nodes[@]})) || illness='it has no nodes'
  for number in "${!nodes[@]}"; do
    [[ ${node_states[number]} == READY ]] || illness="${nodes[number]} is ${node_states[number]}"
  done
  [[ -z $illness ]]
}

# Deletes the TPU in `zone`, request and nodes, and nodes that a vanished request has left. Status
# 1: something may be left.
delete_tpu() {
  local try node left=1
  for try in 1 2 3 4 5; do
    if tpus queued-resources delete "$name" --zone="$zone" --force ||
      [[ $trouble == missing ]]; then
      left=0
      break
    fi
    # A request cannot be deleted in some moments of its life.
    ((try == 5)) || pause "$BAM_POLL"
  done
  list_nodes || return 1
  for node in ${nodes[@]+"${nodes[@]}"}; do
    tpus tpu-vm delete "$node" --zone="$zone" || [[ $trouble == missing ]] || left=1
  done
  return "$left"
}

report_left() {
  say "$name in $zone COULD NOT BE DELETED and may cost money: $(complaint)"
  say "try again: launch/tpu down $name --project=$BAM_PROJECT --zones=$zone"
}
