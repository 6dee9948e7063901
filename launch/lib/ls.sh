# shellcheck shell=bash
help_ls() {
  cat <<'HELP'
launch/tpu ls [--zones=ZONE,…]

Lists by their label all TPUs that launch/tpu has made in the project and that nobody has deleted,
also other people's: name, zone, type, state, owner, since when. Nodes whose request is gone are
marked LEAK:
launch/tpu down deletes them too. Exit status 1 when a zone could not be asked.
HELP
}

subcommand_ls() {
  local failed=0
  read_arguments '' '' 0 "$@"
  require_cloud
  {
    printf 'NAME\tZONE\tTYPE\tSTATE\tOWNER\tSINCE\n'
    for zone in $BAM_ZONES; do
      list_zone || { say "could not list $zone: $(complaint)" && failed=1; }
    done
  } >"$scratch/table"
  column_table <"$scratch/table"
  exit "$failed"
}

list_zone() {
  local spec='tpu.nodeSpec[0].node' same=(-F'\t' -v zone="$zone" -v OFS='\t')
  tpus queued-resources list --zone="$zone" --format="value(name.basename(),$spec.labels.bam_jax,
    $spec.acceleratorType,state.state,$spec.labels.bam_owner,createTime)" >"$scratch/requests" || {
    refuse_hopeless
    return 1
  }
  tpus tpu-vm list --zone="$zone" --filter='labels.bam_jax:*' \
    --format='value(labels.bam_jax,name.basename(),acceleratorType.basename(),state,
    labels.bam_owner,createTime)' >"$scratch/nodes" || return 1
  awk "${same[@]}" '$2 != "" { print $1, zone, $3, $4, $5, $6 }' "$scratch/requests"
  # FILENAME, since the first file may be empty.
  awk "${same[@]}" '
    FILENAME == ARGV[1] { request[$1]; next }
    !($1 in request) { print $2, zone, $3, "LEAK " $4, $5, $6 }
  ' "$scratch/requests" "$scratch/nodes"
}

column_table() {
  awk -F'\t' '{ printf "%-24s  %-16s  %-14s  %-22s  %-12s  %s\n", $1, $2, $3, $4, $5, $6 }'
}
