# shellcheck shell=bash
help_logs() {
  cat <<'HELP'
launch/tpu logs NAME [--worker=0] [--slice=0] [--lines=+1]

Shows the log of a worker and follows it until its command ends. --lines=100: only the last ones.
HELP
}

subcommand_logs() {
  BAM_WORKER=0 BAM_SLICE=0 BAM_LINES=+1
  read_arguments 'worker slice lines' '' 1 "$@"
  ((${#task[@]} == 0)) || refuse 'logs takes no command: launch/tpu ssh does.'
  [[ $BAM_LINES =~ ^\+?[0-9]+$ ]] || refuse "--lines=$BAM_LINES is not a number."
  require_cloud
  require_tpu
  require_worker
  on_node "$BAM_SLICE" "$BAM_WORKER" "bash .bam/worker.sh follow $BAM_LINES"
}
