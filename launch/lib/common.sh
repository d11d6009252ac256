# shellcheck shell=bash disable=SC2034 # what is set here is read elsewhere
# What the launch scripts share: words for people, and commands that are shown or run.

# 1: show commands and run none.
PRINT=0
# What `read_option` read.
NAME='' VALUE='' TAKES=1

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "${0##*/}: bash 4.4 or newer is needed, this is $BASH_VERSION; on macOS: brew install bash" >&2
  exit 2
fi

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# Wrong arguments.
misused() {
  printf '%s: %s; --help lists what there is\n' "${0##*/}" "$*" >&2
  exit 2
}

# Comments go to stderr, so that stdout holds commands and nothing else.
note() {
  printf '%s\n' "$*" >&2
}

# Words as one line that a shell reads back as the same words. (Bash's own %q writes newlines in a
# form that only bash reads; a remote login shell may be another.)
quoted() {
  local word line=
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Show a command, or run it; the script ends where it fails.
do_it() {
  try "$@" || fail "this failed with exit code $?: $(quoted "$@")"
}

# The same, but its exit code is returned.
try() {
  if ((PRINT)); then
    printf '%s\n' "$(quoted "$@")"
    return
  fi
  "$@"
}

# read_option "NAME NAME ..." WORDS...: the option in front of the words, which must be one of these
# and have a value, behind "=" or in the next word. Sets NAME, VALUE, and TAKES, how many words it is.
read_option() {
  local known=$1
  shift
  NAME=${1%%=*} TAKES=1
  NAME=${NAME#--}
  [[ $1 == --* && " $known " == *" $NAME "* ]] ||
    misused "unknown option '$1' (the command to run stands behind --)"
  if [[ $1 == *=* ]]; then
    VALUE=${1#*=}
  else
    (($# > 1)) || misused "$1 has no value"
    VALUE=$2 TAKES=2
  fi
  [[ -n $VALUE ]] || misused "--$NAME has no value"
}

# needs PROGRAM REMEDY
needs() {
  ((PRINT)) || command -v "$1" >/dev/null || fail "$1 is not installed; $2"
}
