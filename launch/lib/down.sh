# shellcheck shell=bash
help_down() {
  cat <<'HELP'
launch/tpu down NAME

Deletes the TPU, its request and its nodes, in every zone of BAM_ZONES, and nodes that a vanished
request has left. Run twice, it says that there is nothing.

Exit status: 0 when nothing is left, 1 when something may be, which it names.
HELP
}

subcommand_down() {
  local found=0 left=0 code
  doing=0
  read_arguments poll '' 1 "$@"
  require_cloud
  at_exit=(warn_of_rest)
  for zone in $BAM_ZONES; do
    code=0
    look "$zone" || code=$?
    # Nodes may outlive their request.
    ((code != 1)) || list_nodes || code=2
    if ((code == 2)); then
      refuse_hopeless
      say "could not look for $name in $zone: $(complaint)"
      left=1
    elif ((code == 0 || ${#nodes[@]})); then
      found=1
      doing=1
      say "deleting $name in $zone"
      if delete_tpu; then say "deleted $name in $zone"; else report_left && left=1; fi
      doing=0
    fi
  done
  ((found || left)) || say "there is no $name in ${BAM_ZONES// /, }"
  exit "$left"
}

# at_exit: when it is stopped half-way.
warn_of_rest() {
  [[ $doing == 0 ]] ||
    say "stopped: $name may still exist in $zone and cost money: launch/tpu down $name"
}
