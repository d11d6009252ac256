#!/usr/bin/env bash
# What happens on each machine of a TPU slice; tpu.sh starts it there through ssh. Where it succeeds,
# all but `free` end with an answer, "vllama2 on MACHINE: WORDS", which tpu.sh counts.
#
#   worker.sh free             fails while a run is under way
#   worker.sh setup EXTRAS     make the environment
#   worker.sh start COMMAND... begin a run that outlives this connection
#   worker.sh state            idle, running PID, ended CODE, or stopped CODE where that was asked for
#   worker.sh report           the same, with the log's end where a run failed
#   worker.sh follow           its log, until it ends; its exit code
#   worker.sh stop             ask it to save and stop (SIGTERM)
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not inside the project, which `setup` replaces.
run=$HOME/vllama2_run

fail() {
  echo "$(hostname): $*" >&2
  exit 1
}

answer() {
  printf 'vllama2 on %s: %s\n' "$(hostname)" "$*"
}

# `make env` needs Python 3.11; the machines' Ubuntu 22.04 has 3.10, and in its package archive only
# a release candidate of 3.11, behind a lock that automatic upgrades hold on a new machine. uv brings
# a released build without root. 3.11, since CI proves that set of constraints.
find_python() {
  local python
  for python in python3.11 python3.12 python3.13 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$python"
      return
    fi
  done
  python3 -m pip install --quiet --user uv==0.13.9 >&2
  python3 -m uv python install --quiet 3.11 >&2
  python3 -m uv python find 3.11
}

setup() {
  local python
  if ! command -v make >/dev/null; then
    # Wait for automatic upgrades to let go of the lock. A new machine's list of packages may be old.
    sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
    sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet make
  fi
  # libtpu starts and ends faster with huge pages on v5e and newer, and warns without them.
  echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null ||
    echo "$(hostname): huge pages could not be switched on; TPU programs start slower" >&2
  python=$(find_python) || fail "no Python 3.11 or newer, and none could be fetched; has this machine a way to the internet?"
  make --no-print-directory -C "$project" env "EXTRAS=$1" "PYTHON=$python"
  answer "set up"
}

now() {
  local how=ended
  [[ ! -f $run/stopped ]] || how=stopped
  if [[ -f $run/code ]]; then
    echo "$how $(<"$run/code")"
  elif [[ -f $run/pid ]] && kill -0 "$(<"$run/pid")" 2>/dev/null; then
    echo "running $(<"$run/pid")"
  elif [[ -f $run/pid ]]; then
    # It has just ended, or the machine was started again and nobody was left to write a code.
    for _ in {1..20}; do
      [[ ! -f $run/code ]] || break
      sleep 0.1
    done
    echo "$how $(cat "$run/code" 2>/dev/null || echo 137)"
  else
    echo idle
  fi
}

state() {
  answer "$(now)"
}

free() {
  [[ $(now) != running* ]] || fail "a run is under way ($(now)); tpu.sh stop ends it"
}

start() {
  [[ -d $project/.venv ]] || fail "not set up; tpu.sh setup does it"
  local command
  printf -v command '%q ' "$@"
  # The connection that started it may have been lost before it could say so, and tries it again.
  if [[ $(now) == running* && $(cat "$run/command" 2>/dev/null) == "$command" ]]; then
    state
    return
  fi
  free
  mkdir -p "$run"
  rm -f "$run/pid" "$run/code" "$run/stopped"
  printf '%s\n' "$command" >"$run/command"
  # A session of its own, and no connection to this one: the end of an ssh session is not its end.
  setsid bash "$project/launch/worker.sh" hold "$@" </dev/null >>"$run/log" 2>&1 &
  for _ in {1..100}; do
    [[ ! -f $run/pid ]] || break
    sleep 0.1
  done
  [[ -f $run/pid ]] || fail "the run did not start; $run/log may say why"
  answer "running $(<"$run/pid")"
}

# Begin the command and write down its process and how it ends. A SIGTERM meant for it must not reach
# its data workers, so it is sent to that process and to no group.
hold() {
  trap '' HUP
  cd "$project"
  printf -- '--- %s %s:' "$(date -u '+%F %T')" "$(hostname)"
  printf ' %q' "$@"
  printf '\n'
  # Python writes line by line, so that the log can be followed.
  PYTHONUNBUFFERED=1 bash "$project/launch/with_flags.sh" tpu "$@" &
  local pid=$! code=0
  echo "$pid" >"$run/pid.new" && mv "$run/pid.new" "$run/pid"
  wait "$pid" || code=$?
  echo "--- $(date -u '+%F %T') $(hostname): ended with exit code $code"
  echo "$code" >"$run/code.new" && mv "$run/code.new" "$run/code"
}

report() {
  local was
  was=$(now)
  answer "$was"
  if [[ $was == ended* && $was != "ended 0" ]]; then
    tail -n 20 "$run/log"
  fi
}

follow() {
  local was
  [[ $(now) != idle ]] || fail "nothing was started here; tpu.sh run does it"
  tail -n 200 -s 0.5 -F --pid="$(<"$run/pid")" "$run/log" 2>/dev/null
  was=$(now)
  answer "$was"
  exit "${was#* }"
}

stop() {
  local was
  was=$(now)
  [[ $was == running* ]] || { answer "$was, nothing to stop"; return; }
  touch "$run/stopped"
  kill -TERM "${was#* }"
  answer "told to stop; it ends behind the step that it takes, with a checkpoint"
}

case ${1:-} in
  free | setup | start | state | report | follow | stop | hold) "$@" ;;
  *) fail "worker.sh: unknown action '${1:-}'" ;;
esac
