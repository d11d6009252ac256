# shellcheck shell=bash disable=SC2034 # what is set here is read elsewhere
# Names of TPU slices, as `vllama2 plan --topology` takes them, in Google's words.

# size:shape, as in vllama2_jax/parallel/topology.py (a test compares them). The sizes of v4 and v5p
# count cores, two of a chip; those of v5e and v6e count chips.
THREE_DIMENSIONS="8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 384:4x4x12 512:4x8x8
  768:4x8x12 1024:8x8x8 1536:8x8x12 2048:8x8x16 4096:8x16x16 8192:16x16x16"
LARGEST_V5P=12288:16x16x24
TWO_DIMENSIONS="1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"

# read_topology NAME: sets
#   GENERATION  v4, v5e, v5p or v6e
#   SLICES      how many
#   CHIPS       of all slices
#   MACHINES    of all slices
#   ACCELERATOR the accelerator type of one slice
#   RUNTIME     the software version of its machines (cloud.google.com/tpu/docs/runtimes)
read_topology() {
  local name=${1,,} wanted=$1 table cores=1 entry size=
  if [[ ! $name =~ ^(([0-9]+)x)?([a-z0-9]+)(-([0-9]+)|:([0-9]+(x[0-9]+)*))$ ]]; then
    misused "unknown topology '$wanted'; known: v5p-128, v5p:4x4x4, 2xv5p-128, v5e-256, v4-64, v6e-8 and the like"
  fi
  SLICES=${BASH_REMATCH[2]:-1}
  local family=${BASH_REMATCH[3]} number=${BASH_REMATCH[5]} shape=${BASH_REMATCH[6]}
  case $family in
    v4) GENERATION=v4 RUNTIME=tpu-ubuntu2204-base ;;
    v5p) GENERATION=v5p RUNTIME=v2-alpha-tpuv5 ;;
    v5e | v5litepod | v5lite) GENERATION=v5e RUNTIME=v2-alpha-tpuv5-lite ;;
    v6e | trillium) GENERATION=v6e RUNTIME=v2-alpha-tpuv6e ;;
    *) misused "unknown topology '$wanted'; TPUs that can be had: v4, v5e (v5litepod), v5p, v6e" ;;
  esac
  case $GENERATION in
    v4) table=$THREE_DIMENSIONS cores=2 ;;
    v5p) table="$THREE_DIMENSIONS $LARGEST_V5P" cores=2 ;;
    *) table=$TWO_DIMENSIONS ;;
  esac
  for entry in $table; do
    if [[ ${entry%:*} == "$number" || ${entry#*:} == "$shape" ]]; then
      size=${entry%:*}
    fi
  done
  if [[ -z $size ]]; then
    for entry in $table; do
      size+=", $GENERATION-${entry%:*}"
    done
    misused "no slice ${wanted}; there are ${size#, }"
  fi
  ((SLICES >= 1)) || misused "$wanted: a size of 0"
  CHIPS=$((SLICES * size / cores))
  # Four chips a machine; up to eight of v5e and v6e are in one.
  MACHINES=$((CHIPS / 4))
  ((cores == 2 || size > 8)) || MACHINES=$SLICES
  ACCELERATOR="${GENERATION/v5e/v5litepod}-$size"
}
