# shellcheck shell=bash disable=SC2034,SC2154 # what is set here is read elsewhere; OPT is tpu.sh's
# What the cloud and its machines answer, where an exit code alone does not tell.

# How often the cloud is asked, --every seconds apart (with its 30, for five minutes), before an error
# or a state that may pass is believed.
PATIENCE=10
# What `ask` heard.
ANSWER=
# What a command told `overhear` on stderr.
ERRORS=
# What machines answered to `hear`, by their names.
declare -A HEARD=()
shopt -s lastpipe # so that `hear` can set it

# ask EXPECTED COMMAND...: what a command writes into ANSWER, or MISSING where it says that there is
# no such thing. Any other error is told once and may pass: a wait of hours does not end by it. Under
# --print the command is shown, and EXPECTED taken for its answer.
ask() {
  local expected=$1 file code tries before=
  shift
  if ((PRINT)); then
    try "$@"
    ANSWER=$expected
    return
  fi
  file=$(mktemp)
  for ((tries = 1; ; tries++)); do
    code=0
    ANSWER=$("$@" 2>"$file") || code=$?
    ERRORS=$(<"$file")
    ((code)) || break
    if is_missing; then
      ANSWER=MISSING
      break
    fi
    if [[ $ERRORS != "$before" ]]; then
      note "$ERRORS"
      before=$ERRORS
    fi
    if ((tries == PATIENCE)); then
      rm -f "$file"
      fail "this failed $PATIENCE times, at last with exit code $code: $(quoted "$@")"
    fi
    sleep "${OPT[every]}"
  done
  rm -f "$file"
}

# Whether ERRORS say that there is no such thing.
is_missing() {
  grep -qiE 'NOT_FOUND|was not found' <<<"$ERRORS"
}

# As `try`; what the command says on stderr is shown, and kept in ERRORS.
overhear() {
  local file code=0
  ERRORS=
  if ((PRINT)); then
    try "$@"
    return
  fi
  file=$(mktemp)
  { "$@" 2>&1 >&3 | tee "$file" >&2; } 3>&1 || code=$?
  ERRORS=$(<"$file")
  rm -f "$file"
  return "$code"
}

# Run a command for machines; what they say is shown, and the answers of worker.sh are kept in HEARD.
hear() {
  local line
  HEARD=()
  "$@" | while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line"
    if [[ $line =~ 'vllama2 on '([^ ]+)': '(.*) ]]; then
      HEARD[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    fi
  done
}
