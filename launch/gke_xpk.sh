#!/usr/bin/env bash
# TPU slices of Google Kubernetes Engine, through xpk. docs/launch.md tells the way.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=lib/topology.sh
source "$here/lib/topology.sh"

declare -A OPT=([extras]="tpu,gcs" [restarts]=0)
COMMAND=()

usage() {
  cat <<'TEXT'
usage: bash launch/gke_xpk.sh ACTION [OPTIONS] [-- COMMAND...]

  cluster         make a cluster with TPU slices         --cluster --topology
  image           build and push the container           --image
  run             run COMMAND on every machine           --cluster --topology --name --image
  logs            follow its first machine               --name
  list            runs of a cluster                      --cluster
  delete          a run                                  --cluster --name
  delete-cluster  the cluster, and with it the costs     --cluster

  --project PROJECT   who pays (CLOUDSDK_CORE_PROJECT)
  --zone ZONE         where, as in us-east5-a (CLOUDSDK_COMPUTE_ZONE)
  --cluster CLUSTER   what the cluster is called
  --name NAME         what the run is called
  --topology SIZE     v5p-128, v5e-256, 2xv5p-128: as `vllama2 plan` takes it
  --image IMAGE       as in us-docker.pkg.dev/PROJECT/REPOSITORY/vllama2:1
  --extras EXTRAS     of setup.cfg, for `image` (tpu,gcs)
  --spot              cheaper, and may be taken away
  --reservation NAME  from a reservation; neither: on demand
  --restarts N        start a run again so often, whatever ended it but success or `delete` (0)
  --print             show the commands and run none
TEXT
}

parse() {
  while (($#)); do
    case $1 in
      --) shift && COMMAND=("$@") && return ;;
      -h | --help) usage && exit ;;
      --print) PRINT=1 ;;
      --spot) OPT[spot]=1 ;;
      *)
        read_option "project zone cluster name topology image extras reservation restarts" "$@"
        shift $((TAKES - 1))
        OPT[$NAME]=$VALUE
        ;;
    esac
    shift
  done
}

require() {
  local name
  for name in "$@"; do
    [[ -n ${OPT[$name]:-} ]] || misused "--$name is missing"
  done
}

# What xpk calls the slices, and how they are paid for.
slices() {
  read_topology "${OPT[topology]}"
  SLICE_WORDS=("--tpu-type=$ACCELERATOR" "--num-slices=$SLICES")
  if [[ -n ${OPT[spot]:-} && -n ${OPT[reservation]:-} ]]; then
    misused "--spot and --reservation exclude each other"
  elif [[ -n ${OPT[spot]:-} ]]; then
    TIER=--spot
  elif [[ -n ${OPT[reservation]:-} ]]; then
    TIER=--reservation=${OPT[reservation]}
  else
    TIER=--on-demand
  fi
}

cluster() {
  require cluster topology
  slices
  note "$SLICES x $ACCELERATOR: $CHIPS chips, which cost money until they are deleted:"
  note "  bash $(quoted "$here/gke_xpk.sh" delete-cluster --cluster "${OPT[cluster]}" \
    --project "${OPT[project]}" --zone "${OPT[zone]}")"
  do_it xpk cluster create "--cluster=${OPT[cluster]}" "${SLICE_WORDS[@]}" "$TIER" "${WHERE[@]}"
}

image() {
  local root
  require image
  needs docker "https://docs.docker.com/engine/install tells how"
  root=$(cd "$here/.." && pwd)
  # As root, since the devices of TPUs are root's in the containers that xpk makes.
  do_it docker build "--file=$here/Dockerfile" "--tag=${OPT[image]}" \
    "--build-arg=EXTRAS=${OPT[extras]}" --build-arg=RUN_AS=root "$root"
  do_it docker push "${OPT[image]}"
}

run() {
  require cluster topology name image
  ((${#COMMAND[@]})) ||
    misused "no command, as in -- vllama2 train --config=config:video_sft --out gs://BUCKET/RUN"
  [[ ${OPT[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    misused "--name ${OPT[name]}: at most 40 small letters, digits and hyphens, beginning with a letter"
  slices
  local command again=()
  # xpk gives a run up where it ends with 1-41 or 43-126, and with 2 end all errors of `vllama2`, that
  # of a machine that is gone among them.
  ((OPT[restarts] == 0)) || again=(--restart-on-exit-codes=1-126)
  # exec: xpk passes SIGTERM on to what it started, which must be the run and no shell around it.
  command="exec $(quoted bash /opt/vllama2/launch/with_flags.sh tpu "${COMMAND[@]}")"
  # xpk writes it into a block of YAML, which ends with the line.
  [[ $command != *$'\n'* ]] || misused "a command for xpk cannot hold line breaks"
  # 600 seconds for the step that is taken and its checkpoint, of Kubernetes' usual 30.
  do_it xpk workload create "--workload=${OPT[name]}" "--cluster=${OPT[cluster]}" \
    "${SLICE_WORDS[@]}" "--docker-image=${OPT[image]}" "--max-restarts=${OPT[restarts]}" "${again[@]}" \
    --termination-grace-period-seconds=600 "${WHERE[@]}" "--command=$command"
}

logs() {
  require name
  do_it kubectl logs --follow --tail=200 --container=jax-tpu "--selector=$(
    printf '%s=%s,' jobset.sigs.k8s.io/jobset-name "${OPT[name]}" jobset.sigs.k8s.io/job-index 0
  )batch.kubernetes.io/job-completion-index=0"
}

list() {
  require cluster
  do_it xpk workload list "--cluster=${OPT[cluster]}" "${WHERE[@]}"
}

delete() {
  require cluster name
  do_it xpk workload delete "--workload=${OPT[name]}" "--cluster=${OPT[cluster]}" --force "${WHERE[@]}"
}

delete_cluster() {
  require cluster
  do_it xpk cluster delete "--cluster=${OPT[cluster]}" --force "${WHERE[@]}"
}

main() {
  local action=${1:-}
  case $action in
    -h | --help) usage && return ;;
    cluster | image | run | logs | list | delete | delete-cluster) shift ;;
    '') misused "no action" ;;
    *) misused "unknown action '$action'" ;;
  esac
  parse "$@"
  : "${OPT[project]:=${CLOUDSDK_CORE_PROJECT:-}}" "${OPT[zone]:=${CLOUDSDK_COMPUTE_ZONE:-}}"
  [[ ${OPT[restarts]} =~ ^[0-9]+$ ]] ||
    misused "--restarts ${OPT[restarts]}: must be a whole number"
  case $action in
    image) ;;
    logs) needs kubectl "gcloud components install kubectl" ;;
    *)
      require project zone
      needs xpk "pip install xpk (github.com/AI-Hypercomputer/xpk)"
      ;;
  esac
  WHERE=("--project=${OPT[project]}" "--zone=${OPT[zone]}")
  "${action//-/_}"
}

main "$@"
