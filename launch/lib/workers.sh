# shellcheck shell=bash disable=SC2154 # `here` and WHERE are tpu.sh's
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
    archive=${TMPDIR:-/tmp}/vllama2_jax-${OPT[commit]:0:12}.tar.gz
    do_it git -C "$root" archive --format=tar.gz "--output=$archive" "${OPT[commit]}"
    reach scp all all
    do_it "${REACH[@]}" "$archive" "${OPT[name]}:" "${WHERE[@]}" "${WHICH[@]}" "${SSH_WITH[@]}"
    # The environment stays, so that a second set-up is short; -m, since make compares times.
    get="mkdir -p vllama2_jax"
    get+=" && find vllama2_jax -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} +"
    get+=" && tar -xzmf ${archive##*/} -C vllama2_jax"
  fi
  on all all "$ready && $get && bash $WORKER setup $(quoted "${OPT[extras]}")"
  do_it "${REMOTE[@]}"
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
  on all all "bash $WORKER start $(quoted "${COMMAND[@]}")"
  do_it "${REMOTE[@]}"
}

logs() {
  on "${OPT[slice]}" "${OPT[worker]}" "bash $WORKER follow"
  try "${REMOTE[@]}"
}

stop() {
  on all all "bash $WORKER stop"
  do_it "${REMOTE[@]}"
}

status() {
  look
  note "$REASON"
  if [[ $OUTLOOK == READY ]]; then
    on all all "bash $WORKER report"
    do_it "${REMOTE[@]}"
  fi
}

# probe EXPECTED: sets STATE, what the first machine says of the run: idle, running PID, ended CODE,
# or `silent`.
probe() {
  on 0 0 "bash $WORKER state"
  STATE=$1
  if ((PRINT)); then
    try "${REMOTE[@]}"
  else
    STATE=$("${REMOTE[@]}" 2>/dev/null) || STATE=silent
    STATE=${STATE##*$'\n'}
  fi
}

# Follow a run to its end, through lost connections and, as often as --restarts says, pre-emptions.
# Sets CODE, how it ended.
watch() {
  local left=${OPT[restarts]} silences=0
  while :; do
    logs || :
    probe "ended 0"
    case $STATE in
      "ended 0") CODE=0 && return ;;
      running*)
        note "the connection was lost; the run goes on"
        silences=0
        continue
        ;;
    esac
    # When one machine is taken away the programs of the others fail, a little before it is known.
    [[ -z ${OPT[spot]:-} ]] || sleep "${OPT[every]}"
    look
    if [[ $OUTLOOK != GONE && $STATE == ended* ]]; then
      CODE=${STATE#ended } && return
    elif [[ $OUTLOOK == GONE ]]; then
      ((left-- > 0)) || fail "$REASON; this makes it anew, and the run goes on:
  bash $(quoted "$here/tpu.sh" resume --name "${OPT[name]}")"
      resume
    elif [[ $STATE == idle ]] || ((++silences > 20)); then
      fail "$REASON, but its first machine is $STATE; tpu.sh status may tell more"
    else
      sleep "${OPT[every]}"
    fi
  done
}

# Bring a run back: what is gone is made anew, set up as before, and given the very same command.
resume() {
  ((${#COMMAND[@]})) ||
    misused "it is not known here what ran on ${OPT[name]}: give the command behind --"
  renew
  if [[ $OUTLOOK == READY ]]; then
    probe idle
    if [[ $STATE == running* ]]; then
      note "${OPT[name]} is READY and its run is under way; tpu.sh logs follows it"
      return
    fi
  fi
  await
  setup
  run
}

# All in a row: one command from nothing to a trained model.
train() {
  ((${#COMMAND[@]})) ||
    misused "no command, as in -- vllama2 train --config=config:video_sft --out gs://BUCKET/RUN"
  trap farewell EXIT
  create
  await
  setup
  run
  watch
  if ((CODE)); then
    note "the run ended with exit code $CODE"
    status
  fi
  if [[ -n ${OPT[delete-when-done]:-} ]]; then
    delete
    forget
    trap - EXIT
  fi
  return "$CODE"
}

farewell() {
  note "TPUs of ${OPT[name]}, if there are any, cost money until this:"
  note "  $(deletion)"
}
