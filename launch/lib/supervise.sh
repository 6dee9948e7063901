# shellcheck shell=bash
# A command that outlives its machines.

supervise_flags='retries retries-renew settle'

help_supervise() {
  cat <<'HELP'
launch/tpu supervise NAME --type=v5e-16 --capacity=spot [--flag=value …] -- COMMAND …

`up`, then `run`; when the TPU is preempted or the command is stopped by SIGTERM (143), it deletes
what is left, makes the TPU anew, wherever there is capacity, and runs the command again, which must
go on from its own checkpoints. Start it again at any time: it finds the TPU and the run that are
there.

  --retries=10           restarts; a run of an hour (--retries-renew=3600) gets all of them back
  --settle=60            when the command fails, how long the cloud may take to say why
  --delete-on-exit       delete the TPU however this ends, Ctrl-C too
  and all flags of `up` and `run` but --detach

Exit status: the command's; 143 when the retries are used up, 1 when no zone has the TPU.
HELP
}

subcommand_supervise() {
  local used=0 code begun
  # shellcheck disable=SC2154
  read_arguments "$create_flags $run_flags $supervise_flags" 'delete-on-exit replace' 1 "$@"
  ((${#task[@]})) || refuse 'A command is required: launch/tpu supervise NAME -- COMMAND …'
  require_cloud
  pack
  at_exit=(stop_run abandon_request delete_on_exit say_cost)
  while :; do
    bring_up || exit
    begun=$SECONDS code=0
    run_task || code=$?
    if ((code != 0 && code != 143)); then
      settle || code=143
    fi
    ((code == 143)) || exit "$code"
    ((SECONDS - begun < BAM_RETRIES_RENEW)) || used=0
    used=$((used + 1))
    if ((used > BAM_RETRIES)); then
      say "$BAM_RETRIES restarts are used up; the same command goes on from here"
      exit 143
    fi
    say "restart $used of $BAM_RETRIES"
    # Not what is whole: a command that was stopped by hand leaves its machines.
    if ! gone; then
      delete_tpu || { report_left; exit 1; }
      zone=''
    fi
    pause "$BAM_POLL"
  done
}

# Whether the TPU stays whole for a while after a command has failed on it.
settle() {
  local until=$((SECONDS + ${BAM_SETTLE%.*}))
  while :; do
    gone || return
    ((SECONDS < until)) || return 0
    pause "$BAM_POLL"
  done
}
