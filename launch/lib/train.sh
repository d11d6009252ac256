# shellcheck shell=bash disable=SC2154 # `here` and what the other files set
# A run from nothing to its end: followed, brought back where it was taken away, and cleared away.

# 1: the run of `train` has come to its end.
ENDED=

# Follow a run to its end, through lost connections and, as often as --restarts says, pre-emptions.
# Sets CODE, how it ended.
watch() {
  local left=${OPT[restarts]} silences=0
  while :; do
    logs || :
    probe "ended 0"
    case $STATE in
      "ended 0" | "stopped "*) CODE=${STATE#* } && return ;;
      running*)
        note "the connection was lost; the run goes on"
        silences=0
        continue
        ;;
    esac
    look_well
    if [[ $OUTLOOK != GONE && $STATE == ended* ]]; then
      CODE=${STATE#ended } && return
    elif [[ $OUTLOOK == GONE ]]; then
      ((left-- > 0)) || fail "$REASON; this makes it anew, and the run goes on:
  bash $(quoted "$here/tpu.sh" resume --name "${OPT[name]}")"
      resume
    elif [[ $STATE == idle ]] || ((++silences > PATIENCE)); then
      fail "$REASON, but its first machine is $STATE; tpu.sh status may tell more"
    else
      sleep "${OPT[every]}"
    fi
  done
}

# Where a spot slice is taken away its programs fail, or are stopped, some minutes before the cloud
# says why: that a run has ended by itself is not believed at the first look.
look_well() {
  local looks
  look
  [[ -n ${OPT[spot]:-} && $STATE == ended* ]] || return 0
  for ((looks = 1; looks < PATIENCE; looks++)); do
    [[ $OUTLOOK != GONE ]] || return 0
    ((looks > 1)) || note "the run has $STATE; was its slice taken away? ($PATIENCE looks)"
    sleep "${OPT[every]}"
    look
  done
}

# Bring a run back: what is gone is made anew, set up as before, and given the very same command.
resume() {
  ((${#COMMAND[@]})) ||
    misused "it is not known here what ran on ${OPT[name]}: give the command behind --"
  renew
  if [[ $OUTLOOK == READY ]]; then
    count_running
    if ((RUNNING == MACHINES)); then
      note "${OPT[name]} is READY and its run is under way; tpu.sh logs follows it"
      return
    fi
    # Those would wait for the others, and keep `setup` from them.
    ((RUNNING == 0)) || fail "$RUNNING of $MACHINES machines of ${OPT[name]} say that they run it; if that stays so, tpu.sh stop, and this again"
  fi
  await
  setup
  run
}

# Sets RUNNING, how many machines say that a run is under way.
count_running() {
  local answer
  RUNNING=0
  on all all "bash $WORKER state"
  hear "${REMOTE[@]}" >/dev/null || :
  for answer in "${HEARD[@]}"; do
    [[ $answer != running* ]] || RUNNING=$((RUNNING + 1))
  done
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
  ENDED=1
  if ((CODE)); then
    note "the run ended with exit code $CODE"
    (status) || :
  fi
  return "$CODE"
}

# However `train` ends: the TPUs are deleted where that was asked for, or it is said what ends their
# costs. Interrupted, the run goes on, and so do they.
farewell() {
  local code=$?
  if [[ -n ${OPT[delete-when-done]:-} && -n $MADE && -z $INTERRUPTED ]]; then
    trap 'costs; exit 130' INT
    if delete_patiently; then
      [[ -z $ENDED ]] || forget
      exit "$code"
    fi
    note "${0##*/}: ${OPT[name]} could not be deleted, though it was tried $PATIENCE times"
    ((code)) || code=1
  elif ((code)) && [[ -n $MADE ]]; then
    note "what is there goes on with: bash $(quoted "$here/tpu.sh" resume --name "${OPT[name]}")"
  fi
  costs
  exit "$code"
}

costs() {
  note "TPUs of ${OPT[name]}, if there are any, cost money until this:"
  note "  $(deletion)"
}
