#!/usr/bin/env bash
# Cloud TPU slices, from nothing to a trained model and back to nothing. docs/launch.md tells the way.
set -euo pipefail
# gcloud ends with an ordinary exit code when it is interrupted, and bash would go on behind it.
INTERRUPTED=
trap 'INTERRUPTED=1; exit 130' INT
trap 'INTERRUPTED=1; exit 129' HUP
trap 'INTERRUPTED=1; exit 143' TERM
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=lib/common.sh
source "$here/lib/common.sh"
# shellcheck source=lib/answers.sh
source "$here/lib/answers.sh"
# shellcheck source=lib/topology.sh
source "$here/lib/topology.sh"
# shellcheck source=lib/options.sh
source "$here/lib/options.sh"
# shellcheck source=lib/pod.sh
source "$here/lib/pod.sh"
# shellcheck source=lib/workers.sh
source "$here/lib/workers.sh"
# shellcheck source=lib/train.sh
source "$here/lib/train.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/tpu.sh ACTION --name NAME [OPTIONS] [-- COMMAND...]

  train    create, wait, setup, run and logs in a row: one command for all
  create   ask for the TPUs, as a queued resource
  wait     until they are there
  setup    copy this project to all of their machines and make its environment
  run      start COMMAND on all machines; it outlives the connection
  logs     follow what a machine says, until the run ends; its exit code
  status   of the TPUs and of the run on every machine
  resume   after pre-emption: create again what is gone, set up, start the same command again
  stop     ask the run to save and stop
  delete   the TPUs, and with them the costs

  --name NAME         what they are called
  --project PROJECT   who pays (CLOUDSDK_CORE_PROJECT)
  --zone ZONE         where, as in us-east5-a (CLOUDSDK_COMPUTE_ZONE)
  --topology SIZE     v5p-128, v5p:4x4x4, v5e-256, 2xv5p-128: as `vllama2 plan` takes it
  --spot              cheaper, and may be taken away
  --reserved          from your reservation
  --direct            at once or not at all: `tpu-vm create` instead of a queued resource
  --valid-for TIME    give up where they are not there in time, as in 6h
  --runtime VERSION   of the machines' software (by generation)
  --commit COMMIT     of this project (HEAD); uncommitted changes stay here
  --repo URL          clone this instead of copying; needs --commit
  --extras EXTRAS     of setup.cfg (tpu,gcs)
  --worker N          whose log (0); --slice N of which slice (0)
  --every SECONDS     between looks while waiting (30)
  --restarts N        train: resume so often by itself after pre-emption (0)
  --delete-when-done  train: delete the TPUs when the run ends, well or not, or anything fails
  --create-with FLAG  hand a flag on to gcloud's create, as in --create-with=--network=mine
  --ssh-with FLAG     and to its ssh and scp, as in --ssh-with=--tunnel-through-iap
  --print             show the commands and run none

What `create` and `train` are told is remembered on this machine by NAME; the others need only --name.
TEXT
}

main() {
  local action=${1:-}
  case $action in
    -h | --help) usage && return ;;
    train | create | wait | setup | run | logs | status | resume | stop | delete) shift ;;
    '') misused "no action" ;;
    *) misused "unknown action '$action'" ;;
  esac
  local word
  for word in "$@"; do
    case $word in
      --) break ;;
      -h | --help) usage && return ;;
    esac
  done
  settle "$action" "$@"
  WHERE=("--project=${OPT[project]}" "--zone=${OPT[zone]}" --quiet)
  needs gcloud "https://cloud.google.com/sdk/docs/install tells how, then: gcloud auth login"
  case $action in
    wait) await ;;
    delete)
      delete || fail "${OPT[name]} was not deleted and costs money, the reason stands above; try it again"
      forget
      ;;
    *) "$action" ;;
  esac
}

main "$@"
