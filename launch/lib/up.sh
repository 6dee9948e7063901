# shellcheck shell=bash
# Making a TPU: zones in turn, bounded patience, and nothing left behind when it does not come.

create_flags='type slices capacity runtime labels create-flags valid-until'
create_flags+=' wait rounds backoff backoff-max poll'
asked='' # the zone of a request that was made here and is not up yet

help_up() {
  cat <<'HELP'
launch/tpu up NAME --type=v5e-16 [--capacity=spot] [--zones=ZONE,…] [--flag=value …]

Requests a TPU and waits until it is there. Zones are tried in turn, each for --wait seconds, around
--rounds times with growing pauses. What does not come up is deleted, also on Ctrl-C. Run twice, it
finds the TPU that is there, or waits for the request that is under way.

  --type=v4-N, v5p-N     N cores, two a chip     --type=v5e-N, v6e-N     N chips
  --slices=N             several slices in one request
  --capacity=on-demand | spot | reserved
  --valid-until=4h       the cloud drops the request when it is not met by then
  --labels=KEY=VALUE,…   --runtime=VERSION   --create-flags='FLAG …'
  --wait --rounds --backoff --backoff-max --poll     see launch/settings.sh

Exit status 1: no zone had it. TPU7x and later are not served by this API: see docs/launch.md.
HELP
}

subcommand_up() {
  read_arguments "$create_flags" '' 1 "$@"
  ((${#task[@]} == 0)) || refuse 'up takes no command: launch/tpu run does.'
  require_cloud
  BAM_DELETE_ON_EXIT=0
  at_exit=(abandon_request say_cost)
  bring_up || exit
}

# Makes the TPU unless it is there; sets `zone` and what `list_nodes` sets. Status 1: no zone has
# it.
bring_up() {
  local round left try_zone zones=$BAM_ZONES wait_between=$BAM_BACKOFF
  choose_accelerator
  if find_tpu; then
    if [[ -n $type && $type != "$accelerator" ]]; then
      BAM_DELETE_ON_EXIT=0 # it is not what was asked for
      refuse "$name is a $type in $zone, not a $accelerator: choose another name, or take it down."
    fi
    case $state in
      ACTIVE | CREATING | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES)
        say "$name is $state in $zone"
        if wait_until_up; then return 0; fi
        ;;
    esac
    say "$name in $zone is lost (${reason:-${illness:-$state}}): deleting it to ask again"
    delete_tpu || { report_left; return 1; }
  fi
  for ((round = 1; round <= BAM_ROUNDS; round++)); do
    left=''
    for try_zone in $zones; do
      zone=$try_zone
      if request; then return 0; fi
      [[ $trouble != stock-out ]] || left+="$try_zone "
    done
    zones=$left
    [[ -n $zones ]] || break
    ((round < BAM_ROUNDS)) || break
    say "no capacity in ${zones% }; again in $wait_between s (round $round of $BAM_ROUNDS)"
    pause "$wait_between"
    wait_between=$((2 * wait_between < BAM_BACKOFF_MAX ? 2 * wait_between : BAM_BACKOFF_MAX))
  done
  zone=''
  say "no zone gave $name a $accelerator; nothing is left behind"
  return 1
}

# Asks `zone` for the TPU and waits for it. Status 1: it did not come, and is deleted; `trouble` is
# stock-out when it is worth to ask again.
request() {
  local -a flags=(--accelerator-type="$accelerator" --runtime-version="$runtime")
  flags+=(--labels="bam_jax=$name,bam_owner=$(owner)${BAM_LABELS:+,$BAM_LABELS}")
  if ((BAM_SLICES > 1)); then
    flags+=(--node-count="$BAM_SLICES" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  [[ $BAM_CAPACITY == on-demand ]] || flags+=("--$BAM_CAPACITY")
  [[ -z $BAM_VALID_UNTIL ]] || flags+=(--valid-until-duration="$BAM_VALID_UNTIL")
  # shellcheck disable=SC2206
  flags+=($BAM_CREATE_FLAGS)
  say "asking $zone for $name: $BAM_SLICES x $accelerator, $BAM_CAPACITY"
  asked=$zone
  if ! tpus queued-resources create "$name" --zone="$zone" "${flags[@]}" >/dev/null &&
    [[ $trouble != exists ]]; then
    local why=$trouble
    say "$zone: $(complaint)"
    # What was not refused outright may have left a request.
    [[ $why == @(credentials|disabled|permission) ]] || delete_tpu || { report_left; exit 1; }
    asked='' zone='' trouble=$why
    refuse_hopeless
    return 1
  fi
  if wait_until_up; then
    asked=''
    return 0
  fi
  say "$zone: ${reason:-$name is still $state after $BAM_WAIT s}"
  local why=stock-out
  [[ $(trouble_of "$reason") != @(quota|permission) ]] || why=quota
  delete_tpu || { report_left; exit 1; }
  asked='' zone='' trouble=$why
  return 1
}

# Waits until the TPU in `zone` is up. Status 1: it will not be, or not within BAM_WAIT.
wait_until_up() {
  local until=$((SECONDS + BAM_WAIT)) code
  while :; do
    code=0
    healthy || code=$?
    if ((code == 0)); then
      say "$name is up in $zone: ${#nodes[@]} x $type, $(count_workers) workers"
      return 0
    fi
    ((code == 1)) || refuse_hopeless
    case $code,$state,$illness in
      1,FAILED,* | 1,SUSPEND*,* | 1,DELETING,* | 1,,*) return 1 ;;
      *PREEMPTED | *TERMINATED | *STOPPED | *DELETING) return 1 ;;
    esac
    ((SECONDS < until)) || return 1
    pause "$BAM_POLL"
  done
}

# Sets `accelerator` and `runtime`, as this API names them.
choose_accelerator() {
  local kind=${BAM_TYPE%-*} size=${BAM_TYPE##*-}
  accelerator=$BAM_TYPE
  case $kind in
    v4) runtime=tpu-ubuntu2204-base ;;
    v5e | v5litepod) accelerator=v5litepod-$size runtime=v2-alpha-tpuv5-lite ;;
    v5p) runtime=v2-alpha-tpuv5 ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
    '') refuse 'The type of the TPU is required: set BAM_TYPE, or give --type=v5e-16.' ;;
    *7* | *8*)
      refuse "--type=$BAM_TYPE: TPU7x and later are not served by the Cloud TPU API; use GKE, as" \
        'launch/examples/gke.sh does.'
      ;;
    *) refuse "--type=$BAM_TYPE is not a TPU of this API: give v4-N, v5e-N, v5p-N or v6e-N." ;;
  esac
  case $kind in
    v4 | v5p)
      [[ $size =~ ^[1-9][0-9]{0,4}$ && $((size % 8)) == 0 ]] ||
        refuse "--type=$BAM_TYPE: $kind comes in multiples of 8 cores."
      ;;
    *)
      [[ $size =~ ^(1|4|8|16|32|64|128|256)$ ]] ||
        refuse "--type=$BAM_TYPE: $kind comes in 1, 4, 8, 16, 32, 64, 128 or 256 chips."
      ;;
  esac
  runtime=${BAM_RUNTIME:-$runtime}
  [[ $BAM_CAPACITY == @(on-demand|spot|reserved) ]] ||
    refuse "--capacity=$BAM_CAPACITY: give on-demand, spot or reserved."
}

owner() {
  local user=${USER:-$(id -un)}
  user=${user,,}
  user=${user//[^a-z0-9_-]/-}
  echo "${user:0:63}"
}

# at_exit: a request that is not up may become a machine that nobody watches.
abandon_request() {
  [[ -n $asked ]] || return 0
  zone=$asked
  if delete_tpu; then
    say "deleted the request for $name in $zone"
    zone=''
  else
    report_left
  fi
}
