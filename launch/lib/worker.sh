#!/usr/bin/env bash
# What launch/tpu does on a worker; it is sent there with every run, and lives in ~/.bam.
#   worker.sh status SLICE | stop GRACE | install JOB PYTHON REQUIREMENTS |
#             start JOB SLICE SLICES WORKERS | execute JOB | log BYTES | follow LINES
# shellcheck disable=SC2329
set -euo pipefail
home=$HOME/.bam
cd "$home"
job=$(cat current 2>/dev/null || true)
run=run/$job

# This worker's number within its slice.
worker_number() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number
}

running() { tmux has-session -t bam 2>/dev/null; }

worker_state() {
  if [[ -z $job ]]; then echo idle; return; fi
  if [[ ! -e $run/exit ]] && running; then echo running; return; fi
  if [[ -e $run/exit ]]; then echo exited; else echo lost; fi
}

# One line: slice, worker, job, state, exit status, time of the end, last line of the log.
status() {
  local state code=- ended=0
  state=$(worker_state)
  if [[ $state == exited ]]; then
    code=$(<"$run/exit")
    ended=$(stat --format=%Y "$run/exit")
  fi
  printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$(worker_number)" "${job:--}" "$state" "$code" \
    "$ended" "$(tail -c 400 "$run/log" 2>/dev/null | tr '\r\t' '\n ' | grep . | tail -n 1 || true)"
}

# SIGTERM to the command, time to save, then SIGKILL.
stop() {
  local pid deadline=$((SECONDS + ${1%.*}))
  running || return 0
  pid=$(cat "$run/pid" 2>/dev/null) || true
  [[ -z $pid ]] || kill -TERM -- "-$pid" 2>/dev/null || true
  while running && ((SECONDS < deadline)); do sleep 0.2; done
  running || return 0
  [[ -z $pid ]] || kill -KILL -- "-$pid" 2>/dev/null || true
  deadline=$((SECONDS + 5))
  while running && ((SECONDS < deadline)); do sleep 0.2; done
  tmux kill-session -t bam 2>/dev/null || true
}

# The commit in source/COMMIT; an environment for its requirements in venv/HASH.
install() {
  local source=source/${1%-*} python=$2 requirements=$3 venv
  mkdir -p source venv
  exec 9>lock
  flock 9
  if [[ ! -d $source ]]; then
    rm -rf "$source.partial"
    mkdir "$source.partial"
    tar --extract --gzip --file=source.tar.gz --directory="$source.partial"
    mv "$source.partial" "$source"
  fi
  rm source.tar.gz
  venv=$home/venv/$(
    cd "$source"
    { echo "$python"; cat requirements.txt "$requirements"; } | sha256sum | cut -c1-16
  )
  export PATH=$HOME/.local/bin:$PATH
  if [[ ! -e $venv/installed ]]; then
    command -v tmux >/dev/null || sudo apt-get install --yes --quiet tmux
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    rm -rf "$venv"
    uv venv --quiet --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" --requirement "$source/$requirements"
    touch "$venv/installed"
  fi
  mkdir -p "run/$1"
  mv job.sh "run/$1/job.sh"
  ln -sfn "$venv" "run/$1/venv"
  ln -sfn "$home/$source" "run/$1/source"
}

start() {
  local slice=$2 slices=$3 workers=$4
  run=run/$1
  rm -f "$run/exit" "$run/pid"
  [[ ! -e $run/log ]] || mv "$run/log" "$run/log.$(date +%s)"
  {
    echo "export PYTHONUNBUFFERED=1 BAM_SLICE=$slice BAM_WORKERS=$workers"
    echo "export BAM_WORKER=$((slice * (workers / slices) + $(worker_number)))"
  } >"$run/environment"
  echo "$1" >current
  tmux new-session -d -s bam bash "$home/worker.sh" execute "$1"
}

# In tmux: runs the command in a process group of its own, which `stop` signals.
execute() {
  local code=0
  run=$home/run/$1
  # shellcheck source=/dev/null
  . "$run/environment"
  export VIRTUAL_ENV=$run/venv PATH=$run/venv/bin:$PATH
  cd "$run/source"
  set -m
  # What stops the command must not stop its log, which is of the same group.
  bash "$run/job.sh" > >(trap '' HUP INT TERM && exec tee -a "$run/log") 2>&1 &
  echo $! >"$run/pid"
  wait $! || code=$?
  sleep 0.1 # the last lines pass through tee
  echo "$code" >"$run/exit.partial"
  mv "$run/exit.partial" "$run/exit"
}

log() { tail --bytes=+$(($1 + 1)) "$run/log" 2>/dev/null || true; }

# The log as it grows, until the command ends.
follow() {
  if [[ $(worker_state) == running ]]; then
    exec tail --lines="$1" --follow --pid="$(cat "$run/pid")" "$run/log"
  fi
  tail --lines="$1" "$run/log" 2>/dev/null || echo 'Nothing has run here yet.' >&2
}

# On one line: a new copy of this file may replace it while `execute` waits.
"$@"; exit
