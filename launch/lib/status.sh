# shellcheck shell=bash
help_status() {
  cat <<'HELP'
launch/tpu status NAME

One line for the TPU, and one a worker: slice/worker, what runs there, how it is, its last line of
log. Exit status 1 when it is not all there.
HELP
}

subcommand_status() {
  local code=0
  read_arguments '' '' 1 "$@"
  require_cloud
  require_tpu
  healthy || code=$?
  ((code != 2)) || fail_to "look at $name in $zone"
  printf '%s  %s  %s  %s\n' "$name" "$zone" "$type" "$state${illness:+: $illness}"
  ((code == 0)) || exit 1
  workers=$(count_workers)
  on_workers status %NODE% || { show_errors; say "not every worker answers"; code=1; }
  sort -t$'\t' -k1,1n -k2,2n "$scratch"/out.* |
    awk -F'\t' '{ print $1 "/" $2 "  " $3 "  " $4 ($4 == "exited" ? " " $5 : "") "  " $7 }'
  exit "$code"
}
