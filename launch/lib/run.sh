# shellcheck shell=bash
# One command on every worker, from one commit; followed until all have ended or one has failed.

run_flags='commit python requirements poll silence grace fail-grace'
started=0 # whether there is a command on the workers that Ctrl-C should stop

help_run() {
  cat <<'HELP'
launch/tpu run NAME [--flag=value …] -- COMMAND …
launch/tpu run my-tpu -- python -m bam_jax.main --config=configs/quickstart.py --workdir=gs://…

Sends `git archive` of a commit to every worker, makes a virtual environment there (uv, Python 3.12,
jax[tpu], kept for as long as the requirements stay the same), runs the command in tmux on every
worker at once, and shows the log of worker 0. When a worker fails, the others are stopped.

  --commit=HEAD          what is sent; uncommitted changes are not
  --detach               start it and leave; `logs` and `status` look after it
  --replace              stop what is running there first
  --delete-on-exit       delete the TPU however this ends
  --poll --silence --grace --requirements --python   see launch/settings.sh

The command finds BAM_WORKER, BAM_WORKERS and BAM_SLICE in its environment. On each worker
.bam/run/ID/ holds `log` and `exit`. Given the same command again while it runs, this follows it.

Exit status: that of the first worker that failed, or 0; 143 also when the TPU was preempted: the
same command goes on. Ctrl-C stops the command, which may save its state, and ends with 130.
HELP
}

subcommand_run() {
  read_arguments "$run_flags" 'detach replace delete-on-exit' 1 "$@"
  ((${#task[@]})) || refuse 'A command is required: launch/tpu run NAME -- COMMAND …'
  [[ ${BAM_DETACH:-0} == 0 || $BAM_DELETE_ON_EXIT == 0 ]] ||
    refuse '--detach leaves the TPU running, --delete-on-exit does not: choose one.'
  require_cloud
  pack
  require_tpu
  at_exit=(stop_run delete_on_exit say_cost)
  [[ $state == ACTIVE ]] || refuse "$name is $state in $zone: launch/tpu up $name waits for it."
  list_nodes || fail_to "list the nodes of $name"
  local code=0
  run_task || code=$?
  exit "$code"
}

# Makes what is sent to the workers: the commit, and the command. Sets `job`, the name of the two.
pack() {
  local root commit words
  root=$(cd "$launch/.." && pwd)
  commit=$(git -C "$root" rev-parse --short=12 --verify --quiet "$BAM_COMMIT^{commit}") ||
    refuse "--commit=$BAM_COMMIT is not a commit of $root."
  git -C "$root" cat-file -e "$commit:$BAM_REQUIREMENTS" 2>/dev/null ||
    refuse "--requirements=$BAM_REQUIREMENTS is not in commit $commit."
  [[ $BAM_COMMIT != HEAD || -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
    say 'uncommitted changes are not sent'
  git -C "$root" archive --format=tar.gz --output="$scratch/source.tar.gz" "$commit"
  printf -v words '%q ' "${task[@]}"
  printf 'exec %s\n' "$words" >"$scratch/job.sh"
  job=$commit-$(git hash-object --stdin <"$scratch/job.sh" | cut -c1-8)
}

# Runs `task` on `nodes`. Status: the command's, or 143 when the TPU is gone.
run_task() {
  local code=0
  started=0 workers=$(count_workers)
  say "sending $job to $workers workers"
  send .bam "$launch/lib/worker.sh" "$scratch/source.tar.gz" "$scratch/job.sh" || code=$?
  ((code)) || ask || code=$?
  if ((code)); then
    gone || return
    show_errors
    say "could not reach the workers of $name"
    return 1
  fi
  if [[ ${BAM_REPLACE:-0} != 1 ]] && grep -q $'\trunning\t' "$scratch/workers"; then
    local same
    same=$(awk -F'\t' -v job="$job" '$4 == "running" && $3 == job' "$scratch/workers" | wc -l)
    if ((same != workers)); then
      BAM_DELETE_ON_EXIT=0 # somebody uses it
      refuse "$name is running something else: launch/tpu logs $name shows it, --replace stops it."
    fi
    say "$job is running on $name already: following it"
    started=1
  else
    started=1
    start_task || return
  fi
  if [[ ${BAM_DETACH:-0} == 1 ]]; then
    started=0
    say "$job runs on $workers workers: launch/tpu logs $name, launch/tpu status $name"
    return 0
  fi
  follow || code=$?
  started=0
  return "$code"
}

# Installs and starts; status as `run_task`.
start_task() {
  local code=0
  on_workers stop "$BAM_GRACE" || code=$?
  ((code)) || on_workers install "$job" "$BAM_PYTHON" "$BAM_REQUIREMENTS" || code=$?
  ((code)) || on_workers start "$job" %NODE% "${#nodes[@]}" "$workers" || code=$?
  ((code)) || return 0
  gone || return
  show_errors
  say "the workers could not start $job"
  return 1
}

# Asks all workers how they are; their lines go to $scratch/workers.
ask() {
  local code=0
  on_workers status %NODE% || code=$?
  cat "$scratch"/out.* >"$scratch/workers"
  ((code == 0)) || return "$code"
  [[ $(wc -l <"$scratch/workers") -eq $workers ]]
}

# Waits for the workers, showing the log of the first. Status: the command's.
follow() {
  local silent=0 seen=0 grace=$BAM_FAIL_GRACE
  while :; do
    if ask; then
      silent=0
      show_log
      if failed_worker; then
        # Without a worker the others cannot save; one that was told to stop is saving with them.
        [[ $failure != 143 ]] || grace=$BAM_GRACE
        on_workers stop "$grace" || true
        show_log
        gone || return
        say "worker $failed failed with exit status $failure: launch/tpu logs $name" \
          "--slice=${failed%/*} --worker=${failed#*/}"
        return "$failure"
      fi
      if ! grep -qv $'\texited\t' "$scratch/workers"; then
        say "$job has ended on all $workers workers"
        return 0
      fi
    else
      gone || return
      silent=$((silent + 1))
      if ((silent > BAM_SILENCE)); then
        say "$name has not answered $silent times; $job may go on: the same command follows it"
        return 1
      fi
    fi
    pause "$BAM_POLL"
  done
}

# Whether a worker has failed: the first one is `failed`, SLICE/WORKER, its status `failure`.
failed_worker() {
  local line slice worker worker_state
  line=$(
    awk -F'\t' '($4 == "exited" && $5 != 0) || $4 == "lost" || $4 == "idle"' "$scratch/workers" |
      sort -t$'\t' -k6,6n | head -n 1
  )
  [[ -n $line ]] || return 1
  IFS=$'\t' read -r slice worker _ worker_state failure _ <<<"$line"
  failed=$slice/$worker
  # It went down with its machine, and nobody was left to write a status.
  [[ $worker_state == exited ]] || failure=143
}

# Shows what worker 0 has logged since the last time; counts bytes in `seen`.
show_log() {
  on_node 0 0 "bash .bam/worker.sh log $seen" >"$scratch/log" || return 0
  cat "$scratch/log"
  seen=$((seen + $(wc -c <"$scratch/log")))
}

# Status 143, in words, when the TPU is not all there any more.
gone() {
  local code=0
  healthy || code=$?
  ((code == 1)) || return 0
  say "$name is not there any more: $illness"
  return 143
}

# at_exit: Ctrl-C reaches what runs on the workers, so that it saves its state.
stop_run() {
  [[ $started == 1 ]] || return 0
  say "stopping $job on $name, which may take up to $BAM_GRACE s"
  on_workers stop "$BAM_GRACE" || say "$job may still run on $name"
}

# at_exit: for --delete-on-exit.
delete_on_exit() {
  [[ $BAM_DELETE_ON_EXIT == 1 && -n ${zone:-} && -z $asked ]] || return 0
  if delete_tpu; then say "deleted $name in $zone"; else report_left; fi
}

# at_exit: a TPU that stays is never left without a word.
say_cost() {
  [[ $BAM_DELETE_ON_EXIT == 1 || -z $zone ]] || say "$name costs money until: launch/tpu down $name"
}
