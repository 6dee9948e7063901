# shellcheck shell=bash
# Commands on the workers of all nodes at once. Needs `zone` and what `list_nodes` sets.

# Runs lib/worker.sh's SUBCOMMAND on every worker; %NODE% in its arguments is the slice's number.
# What the workers of node N print is in $scratch/out.N. Status: that of the first one that failed.
on_workers() {
  local number code=0 words
  local -a pids=()
  printf -v words ' %q' "$@"
  for number in "${!nodes[@]}"; do
    on_node "$number" all "bash .bam/worker.sh${words//%NODE%/$number}" >"$scratch/out.$number" &
    pids[number]=$!
  done
  for number in "${!pids[@]}"; do
    wait "${pids[number]}" || code=$?
  done
  return "$code"
}

# Runs a shell command on one worker of a node, or on `all` of them at once.
on_node() {
  gcloud compute tpus tpu-vm ssh "${nodes[$1]}" --zone="$zone" --project="$BAM_PROJECT" --quiet \
    --worker="$2" --command="$3" </dev/null 2>"$scratch/errors.$1"
}

# Copies files to a folder in the home of every worker of every node.
send() {
  local folder=$1 number code=0
  local -a pids=()
  shift
  # gcloud makes a missing SSH key at its first use, and does not expect that there are several.
  on_node 0 0 true >/dev/null || return
  for number in "${!nodes[@]}"; do
    {
      on_node "$number" all "mkdir -p $folder" &&
        gcloud compute tpus tpu-vm scp "$@" "${nodes[number]}:$folder/" --worker=all \
          --zone="$zone" --project="$BAM_PROJECT" --quiet </dev/null 2>"$scratch/errors.$number"
    } >/dev/null &
    pids[number]=$!
  done
  for number in "${!pids[@]}"; do
    wait "${pids[number]}" || code=$?
  done
  return "$code"
}

# What the workers and gcloud said, for the person who has to fix it.
show_errors() {
  local file
  for file in "$scratch"/out.* "$scratch"/errors.*; do
    [[ ! -s $file ]] || tail -n 20 "$file" >&2
  done
}

# Needs BAM_SLICE and BAM_WORKER; sets what `list_nodes` sets.
require_worker() {
  list_nodes || fail_to "list the nodes of $name"
  [[ $BAM_SLICE =~ ^[0-9]{1,4}$ && -n ${nodes[BAM_SLICE]:-} ]] ||
    refuse "--slice=$BAM_SLICE: $name has ${#nodes[@]} slices, counted from 0."
  local count=${node_workers[BAM_SLICE]}
  [[ $BAM_WORKER == all || ($BAM_WORKER =~ ^[0-9]{1,5}$ && $BAM_WORKER -lt $count) ]] ||
    refuse "--worker=$BAM_WORKER: a slice of $name has $count workers, counted from 0."
}

count_workers() {
  local count total=0
  for count in "${node_workers[@]}"; do
    ((total += count)) || true
  done
  echo "$total"
}
