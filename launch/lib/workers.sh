# shellcheck shell=bash disable=SC2034,SC2154 # `here` and WHERE are tpu.sh's, STATE is read elsewhere
# The machines of a slice: copy the code to them, make its environment, run, follow.

WORKER=vllama2_jax/launch/worker.sh

# on SLICE WORKER COMMAND: sets REMOTE, which has a machine run a command; `all` is every one. A
# machine's shell reads COMMAND, so what is not ours in it stands there quoted.
on() {
  reach ssh "$1" "$2"
  REMOTE=("${REACH[@]}" "${OPT[name]}" "${WHERE[@]}" "${WHICH[@]}" "${SSH_WITH[@]}" "--command=$3")
}

# reach ssh|scp SLICE WORKER: sets REACH and WHICH, the words in front of and behind the name.
reach() {
  if [[ -n ${OPT[direct]:-} ]]; then
    REACH=(gcloud compute tpus tpu-vm "$1") WHICH=("--worker=$3")
  else
    REACH=(gcloud compute tpus queued-resources "$1") WHICH=("--node=$2" "--worker=$3")
  fi
}

# everywhere COMMAND: all machines run it, and have answered. gcloud's exit code is 0, too, where it
# could not reach a slice, or any: it warns, and goes on with the rest.
everywhere() {
  local tries code
  on all all "$1"
  if ((PRINT)); then
    try "${REMOTE[@]}"
    return
  fi
  for ((tries = 1; ; tries++)); do
    code=0
    hear "${REMOTE[@]}" || code=$?
    if ((code == 0 && ${#HEARD[@]} >= MACHINES)); then
      return
    fi
    # What fails on a machine fails again; 255 is a lost connection. gcloud has tried ten times by then.
    if ((tries == 3 || (code != 0 && code != 255))); then
      break
    fi
    note "${#HEARD[@]} of $MACHINES machines of ${OPT[name]} have answered; once more"
    sleep "${OPT[every]}"
  done
  ((code == 0)) || fail "this failed with exit code $code: $(quoted "${REMOTE[@]}")"
  fail "only ${#HEARD[@]} of $MACHINES machines of ${OPT[name]} have answered; tpu.sh status tells which, tpu.sh resume starts all: $(quoted "${REMOTE[@]}")"
}

setup() {
  local root wanted archive get ready="{ ! test -e $WORKER || bash $WORKER free; }"
  if [[ -n ${OPT[repo]:-} ]]; then
    get="{ test -d vllama2_jax/.git || git clone --quiet $(quoted "${OPT[repo]}") vllama2_jax; }"
    get+=" && git -C vllama2_jax fetch --quiet --tags origin"
    get+=" && git -C vllama2_jax checkout --quiet --detach $(quoted "${OPT[commit]}")"
  else
    root=$(cd "$here/.." && pwd)
    wanted=${OPT[commit]:-HEAD}
    OPT[commit]=$(git -C "$root" rev-parse --verify --quiet "$wanted^{commit}") ||
      fail "there is no commit '$wanted' in $root, which is copied; --repo URL clones another"
    [[ -z $(git -C "$root" status --porcelain) ]] ||
      note "changes in $root that are not committed stay here; what is copied is ${OPT[commit]}"
    # By its commit, so that no machine takes another's; in a folder where nobody else can put one.
    archive=$REMEMBERED/.code/vllama2_jax-${OPT[commit]:0:12}.tar.gz
    do_it mkdir -p "${archive%/*}"
    do_it git -C "$root" archive --format=tar.gz "--output=$archive" "${OPT[commit]}"
    reach scp all all
    do_it "${REACH[@]}" "$archive" "${OPT[name]}:" "${WHERE[@]}" "${WHICH[@]}" "${SSH_WITH[@]}"
    do_it rm "$archive"
    # Whole before the old one goes. The environment stays, so that a second set-up is short; -m,
    # since make compares times.
    get="rm -rf vllama2_new && mkdir vllama2_new && tar -xzmf ${archive##*/} -C vllama2_new"
    get+=" && { ! test -e vllama2_jax/.venv || mv vllama2_jax/.venv vllama2_new; }"
    get+=" && rm -rf vllama2_jax && mv vllama2_new vllama2_jax"
  fi
  everywhere "$ready && $get && bash $WORKER setup $(quoted "${OPT[extras]}")"
  remember
}

run() {
  local word before=
  ((${#COMMAND[@]})) ||
    misused "no command, as in -- vllama2 train --config=config:video_sft --out gs://BUCKET/RUN"
  for word in "${COMMAND[@]}"; do
    [[ $before != --out ]] || word="--out=$word"
    [[ $word != --out=* || $word == --out=gs://* ]] ||
      note "$word lies on the machines and goes with them; gs://BUCKET/RUN stays"
    before=$word
  done
  remember
  everywhere "bash $WORKER start $(quoted "${COMMAND[@]}")"
}

logs() {
  on "${OPT[slice]}" "${OPT[worker]}" "bash $WORKER follow"
  if ((PRINT)); then
    try "${REMOTE[@]}"
    return
  fi
  hear "${REMOTE[@]}" || return
  # A run that has ended says so.
  if ((${#HEARD[@]} == 0)); then
    note "its machine did not answer; tpu.sh status may tell why"
    return 1
  fi
}

stop() {
  everywhere "bash $WORKER stop"
}

status() {
  look
  note "$REASON"
  if [[ $OUTLOOK == READY ]]; then
    everywhere "bash $WORKER report"
  fi
}

# probe EXPECTED: sets STATE, what the first machine says of the run: idle, running PID, ended CODE,
# stopped CODE, or `silent`.
probe() {
  on 0 0 "bash $WORKER state"
  STATE=$1
  if ((PRINT)); then
    try "${REMOTE[@]}"
  else
    hear "${REMOTE[@]}" >/dev/null 2>&1 || :
    STATE=${HEARD[*]:-silent}
  fi
}
