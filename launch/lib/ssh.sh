# shellcheck shell=bash
help_ssh() {
  cat <<'HELP'
launch/tpu ssh NAME [--worker=0] [--slice=0] [-- COMMAND …]

A shell on a worker, in which `tmux attach` shows the run; or one command. --worker=all runs a
command on every worker of the slice.
HELP
}

subcommand_ssh() {
  local words
  BAM_WORKER=0 BAM_SLICE=0
  read_arguments 'worker slice' '' 1 "$@"
  require_cloud
  require_tpu
  require_worker
  local -a reach=(tpu-vm ssh "${nodes[BAM_SLICE]}" --worker="$BAM_WORKER")
  reach+=(--zone="$zone" --project="$BAM_PROJECT")
  if ((${#task[@]})); then
    printf -v words '%q ' "${task[@]}"
    gcloud compute tpus "${reach[@]}" --command="$words"
  else
    [[ $BAM_WORKER != all ]] || refuse '--worker=all needs a command after --.'
    gcloud compute tpus "${reach[@]}"
  fi
}
