# shellcheck shell=bash disable=SC2034,SC2153 # set here and read elsewhere, and the other way about
# What tpu.sh is told, now and, for a slice that it made, when it was made.

declare -A OPT=()
CREATE_WITH=() SSH_WITH=() COMMAND=()
REMEMBERED=${VLLAMA2_LAUNCH_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/vllama2/launch}

# Options that have a value.
VALUED="name project zone topology runtime valid-for repo commit extras worker slice every restarts"
VALUED+=" create-with ssh-with"

# parse WORDS...: fills OPT, CREATE_WITH, SSH_WITH, and COMMAND with what stands behind `--`.
parse() {
  while (($#)); do
    case $1 in
      --) shift && COMMAND=("$@") && return ;;
      --print) PRINT=1 ;;
      --spot | --reserved | --direct | --delete-when-done) OPT[${1#--}]=1 ;;
      *)
        read_option "$VALUED" "$@"
        shift $((TAKES - 1))
        case $NAME in
          create-with) CREATE_WITH+=("$VALUE") ;;
          ssh-with) SSH_WITH+=("$VALUE") ;;
          *) OPT[$NAME]=$VALUE ;;
        esac
        ;;
    esac
    shift
  done
}

# settle ACTION WORDS...: what is told now, in front of what was told when the slice was made.
settle() {
  local action=$1 file words
  shift
  parse "$@"
  [[ -n ${OPT[name]:-} ]] || misused "--name is missing: what the slice is called, as in --name pod1"
  [[ ${OPT[name]} =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    misused "--name ${OPT[name]}: small letters, digits and hyphens, beginning with a letter"
  file=$REMEMBERED/${OPT[name]}
  if [[ $action != create && $action != train && -f $file ]]; then
    mapfile -d '' -t words <"$file"
    CREATE_WITH=() SSH_WITH=() COMMAND=()
    parse "${words[@]}"
    # `setup` by itself copies what is committed by now.
    [[ $action != setup || -n ${OPT[repo]:-} ]] || unset 'OPT[commit]'
    parse "$@"
  fi
  if [[ $action != create && $action != train && ! -f $file && -z ${OPT[topology]:-} ]]; then
    misused "nothing is known here of ${OPT[name]}, only of: $(known); give --project, --zone and --topology"
  fi
  : "${OPT[project]:=${CLOUDSDK_CORE_PROJECT:-}}" "${OPT[zone]:=${CLOUDSDK_COMPUTE_ZONE:-}}"
  : "${OPT[extras]:=tpu,gcs}" "${OPT[worker]:=0}" "${OPT[slice]:=0}" "${OPT[every]:=30}"
  : "${OPT[restarts]:=0}"
  [[ -n ${OPT[project]} ]] || misused "--project is missing: the Google Cloud project that pays"
  [[ -n ${OPT[zone]} ]] || misused "--zone is missing, as in --zone us-east5-a"
  [[ -n ${OPT[topology]:-} ]] ||
    misused "--topology is missing, as in --topology v5p-128 (what \`vllama2 plan\` takes)"
  for number in worker slice every restarts; do
    [[ ${OPT[$number]} =~ ^[0-9]+$ ]] || misused "--$number ${OPT[$number]}: must be a whole number"
  done
  read_topology "${OPT[topology]}"
  : "${OPT[runtime]:=$RUNTIME}"
  [[ -z ${OPT[spot]:-} || -z ${OPT[reserved]:-} ]] || misused "--spot and --reserved exclude each other"
  [[ -z ${OPT[direct]:-} || $SLICES == 1 ]] ||
    misused "--direct makes one slice; several are had as a queued resource"
  [[ -z ${OPT[direct]:-} || -z ${OPT[valid-for]:-} ]] ||
    misused "--valid-for is for queued resources; --direct has it at once or not at all"
  [[ -z ${OPT[direct]:-} || " ${SSH_WITH[*]} " != *" --tunnel-through-iap "* ]] ||
    misused "--ssh-with=--tunnel-through-iap needs a queued resource, gcloud's tpu-vm ssh does not know it; leave out --direct"
  [[ -z ${OPT[repo]:-} || -n ${OPT[commit]:-} ]] ||
    misused "--repo needs --commit, so that a run that goes on finds the same code"
}

# Keep what the slice was made with, and what runs on it, for `resume` and all others.
remember() {
  ((PRINT)) && return
  local name words=()
  for name in name project zone topology runtime valid-for repo commit extras every; do
    [[ -z ${OPT[$name]:-} ]] || words+=("--$name=${OPT[$name]}")
  done
  for name in spot reserved direct; do
    [[ -z ${OPT[$name]:-} ]] || words+=("--$name")
  done
  for name in "${CREATE_WITH[@]}"; do words+=("--create-with=$name"); done
  for name in "${SSH_WITH[@]}"; do words+=("--ssh-with=$name"); done
  ((${#COMMAND[@]} == 0)) || words+=(-- "${COMMAND[@]}")
  mkdir -p "$REMEMBERED"
  printf '%s\0' "${words[@]}" >"$REMEMBERED/${OPT[name]}"
}

# Names of what is remembered.
known() {
  local names=("$REMEMBERED"/*)
  names=("${names[@]##*/}")
  [[ ${names[*]} == '*' ]] && echo nothing || echo "${names[*]}"
}

forget() {
  ((PRINT)) || rm -f "$REMEMBERED/${OPT[name]}"
}
