# shellcheck shell=bash
# What every subcommand shares: sentences, arguments, pauses, and leaving tidily.

# What the functions tell each other.
scratch=''      # a folder for temporary files
name=''         # of the TPU
task=()         # the command for its workers
zone=''         # where the TPU is
state=''        # of its request
type=''         # its accelerator
reason=''       # why the request failed
illness=''      # what is not whole
nodes=()        # the names of its nodes, one a slice
node_states=()  # and of each, its state
node_workers=() # and its number of workers
workers=0       # all of them
at_exit=()      # functions that are called, with the exit status, however the script ends

say() { printf '%s: %s\n' "${program:-tpu}" "$*" >&2; }

# The user's mistake: one sentence, exit status 2.
refuse() {
  say "$*"
  exit 2
}

# A folder for temporary files, and the promise that `leave` runs.
begin() {
  scratch=$(mktemp -d "${TMPDIR:-/tmp}/bam.XXXXXX")
  trap leave EXIT
  trap 'leave 129' HUP
  trap 'leave 130' INT
  trap 'leave 141' PIPE
  trap 'leave 143' TERM
}

# Called by the traps themselves: an `exit` in one would cut short a `leave` that has just begun.
leave() {
  local code=${1:-$?} hook
  # A signal may find a subshell in its first moment, when it still has the traps of its parent.
  [[ $BASHPID == "$$" ]] || exit "$code"
  # What follows may not be interrupted: it is what deletes machines.
  trap '' HUP INT PIPE TERM
  trap - EXIT
  set +e
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
  for hook in ${at_exit[@]+"${at_exit[@]}"}; do
    "$hook" "$code"
  done
  rm -rf "$scratch"
  exit "$code"
}

# A sleep that a signal ends at once.
pause() {
  sleep "$1" &
  wait $!
}

# Reads the arguments of a subcommand: `name`, the array `task` of what follows --, and the settings
# that
# flags name. FLAGS take a value, SWITCHES none; NAMED is 1 when it needs the name of a TPU.
#   read_arguments FLAGS SWITCHES NAMED "$@"
read_arguments() {
  local flags=" $1 project zones " switches=" $2 " named=$3 flag
  shift 3
  name='' task=()
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      -h | --help)
        "help_$subcommand"
        exit 0
        ;;
      --)
        shift
        task=("$@")
        break
        ;;
      --*=*)
        [[ $flags == *" $flag "* ]] || refuse "$subcommand has no flag --$flag=…. (Try --help.)"
        set_setting "$flag" "${1#*=}"
        ;;
      --*)
        [[ $flags != *" $flag "* ]] || refuse "--$flag needs a value: --$flag=…"
        [[ $switches == *" $flag "* ]] || refuse "$subcommand has no flag --$flag. (Try --help.)"
        set_setting "$flag" 1
        ;;
      *)
        [[ -z $name && $named == 1 ]] ||
          refuse "Unexpected argument '$1': a command comes after --."
        name=$1
        ;;
    esac
    shift
  done
  BAM_ZONES=${BAM_ZONES//,/ }
  if [[ $named == 1 ]]; then
    [[ -n $name ]] || refuse "The name of a TPU is required: launch/tpu $subcommand NAME. (Try --help.)"
    check_name "$name"
  fi
  check_settings
}

set_setting() {
  local variable=BAM_${1//-/_}
  printf -v "${variable^^}" %s "$2"
}

check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,36}[a-z0-9])?$ ]] || refuse "'$1' cannot name a TPU: use at most 38" \
    'lower-case letters, digits and dashes, a letter first and no dash last.'
}

check_settings() {
  local key
  for key in SLICES ROUNDS RETRIES SILENCE WAIT RETRIES_RENEW BACKOFF BACKOFF_MAX; do
    local variable=BAM_$key
    [[ ${!variable} =~ ^[0-9]{1,9}$ ]] || refuse "$variable='${!variable}' is not a whole number."
  done
  for key in POLL GRACE FAIL_GRACE SETTLE; do
    local variable=BAM_$key
    [[ ${!variable} =~ ^[0-9]{1,9}(\.[0-9]+)?$ ]] ||
      refuse "$variable='${!variable}' is not a number."
  done
  ((BAM_SLICES >= 1)) || refuse "BAM_SLICES=$BAM_SLICES must be at least 1."
}
