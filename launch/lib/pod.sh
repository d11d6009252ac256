# shellcheck shell=bash disable=SC2034,SC2154 # `here` and WHERE are tpu.sh's, MADE is read elsewhere
# A TPU slice, or several as one queued resource: make, wait for, look at, delete.

# 1: `create` has made it, so that it is ours to delete.
MADE=

create() {
  local tier=() node=("--node-id=${OPT[name]}")
  [[ -z ${OPT[spot]:-} ]] || tier+=(--spot)
  [[ -z ${OPT[reserved]:-} ]] || tier+=(--reserved)
  note "$SLICES x $ACCELERATOR: $CHIPS chips, which cost money until they are deleted:"
  note "  $(deletion)"
  if [[ -n ${OPT[direct]:-} ]]; then
    make_it tpu-vm create "${OPT[name]}" "${WHERE[@]}" "--accelerator-type=$ACCELERATOR" \
      "--version=${OPT[runtime]}" "${tier[@]}" "${CREATE_WITH[@]}"
    return
  fi
  ((SLICES == 1)) || node=("--node-count=$SLICES" "--node-prefix=${OPT[name]}")
  [[ -z ${OPT[valid-for]:-} ]] || tier+=("--valid-until-duration=${OPT[valid-for]}")
  make_it queued-resources create "${OPT[name]}" "${WHERE[@]}" "--accelerator-type=$ACCELERATOR" \
    "--runtime-version=${OPT[runtime]}" "${node[@]}" "${tier[@]}" "${CREATE_WITH[@]}"
}

make_it() {
  local code=0
  overhear gcloud compute tpus "$@" || code=$?
  if [[ $ERRORS == *ALREADY_EXISTS* || $ERRORS == *"already exists"* ]]; then
    fail "there is a ${OPT[name]} already; tpu.sh resume goes on with it, tpu.sh delete clears it away"
  fi
  ((code == 0)) || fail "this failed with exit code $code: $(quoted gcloud compute tpus "$@")"
  MADE=1
  remember
}

# The command that ends the costs.
deletion() {
  printf 'bash %s delete %s' "$(quoted "$here/tpu.sh")" \
    "$(quoted --name "${OPT[name]}" --project "${OPT[project]}" --zone "${OPT[zone]}" \
      --topology "${OPT[topology]}" ${OPT[direct]:+--direct})"
}

# What is gone already counts as deleted.
delete() {
  # With --force a queued resource goes together with its TPUs; without, it is refused while it has any.
  local words=(queued-resources delete "${OPT[name]}" "${WHERE[@]}" --force)
  [[ -z ${OPT[direct]:-} ]] || words=(tpu-vm delete "${OPT[name]}" "${WHERE[@]}")
  overhear gcloud compute tpus "${words[@]}" || is_missing
}

# Where nobody is there to try it again.
delete_patiently() {
  local tries
  for ((tries = 1; ; tries++)); do
    delete && return
    ((tries < PATIENCE)) || return 1
    sleep "${OPT[every]}"
  done
}

# Sets REQUEST, the state of the queued resource, and REASON where that is told.
look_at_request() {
  REQUEST=ACTIVE REASON=
  [[ -z ${OPT[direct]:-} ]] || return 0
  ask ACTIVE gcloud compute tpus queued-resources describe "${OPT[name]}" "${WHERE[@]}" \
    '--format=value(state.state,state.failedData.error.message)'
  REQUEST=${ANSWER%%$'\t'*}
  [[ $ANSWER != *$'\t'* ]] || REASON=${ANSWER#*$'\t'}
}

# Sets NODES, "READY" or the state of the first slice that is not.
look_at_nodes() {
  local slice node
  for ((slice = 0; slice < SLICES; slice++)); do
    node=${OPT[name]}
    ((SLICES == 1)) || node+=-$slice
    ask READY gcloud compute tpus tpu-vm describe "$node" "${WHERE[@]}" '--format=value(state)'
    NODES=$ANSWER
    [[ $NODES == READY ]] || return 0
  done
}

# What is left of it, as one word: READY, COMING (it will be), or GONE (it has to be made anew).
# Sets OUTLOOK, and REASON for people.
look() {
  NODES=
  look_at_request
  case $REQUEST in
    ACTIVE)
      look_at_nodes
      case $NODES in
        READY) OUTLOOK=READY ;;
        CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING | UNHIDING) OUTLOOK=COMING ;;
        *) OUTLOOK=GONE ;;
      esac
      ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING | MISSING) OUTLOOK=GONE ;;
    *) OUTLOOK=COMING ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING
  esac
  REASON="${OPT[name]} is $REQUEST${NODES:+, its TPU $NODES}${REASON:+: $REASON}"
}

await() {
  local before=
  while :; do
    look
    if ((PRINT)); then
      note "# every ${OPT[every]} s, until it is ACTIVE and its TPUs are READY"
    elif [[ $REASON != "$before" ]]; then
      note "$(date -u +%T) $REASON"
      before=$REASON
    fi
    case $OUTLOOK in
      READY) return ;;
      GONE) fail "$REASON; tpu.sh resume makes it anew, tpu.sh delete clears it away" ;;
    esac
    sleep "${OPT[every]}"
  done
}

# Make anew what was pre-empted or has failed. Sets OUTLOOK to what it was before.
renew() {
  local rest
  look
  while [[ $REQUEST == SUSPENDING || $REQUEST == DELETING ]]; do # it cannot be deleted meanwhile
    sleep "${OPT[every]}"
    look
  done
  if ((PRINT)); then
    OUTLOOK=GONE REASON="# if it is not, only set-up and run follow; if it is gone"
  fi
  [[ $OUTLOOK == GONE ]] || return 0
  note "$REASON; making it anew"
  rest=$REQUEST
  [[ -z ${OPT[direct]:-} ]] || rest=$NODES
  [[ $rest == MISSING ]] || delete_patiently ||
    fail "${OPT[name]} could not be deleted, so it is not made anew; the reason stands above"
  create
}
