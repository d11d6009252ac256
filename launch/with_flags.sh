#!/usr/bin/env bash
# with_flags.sh tpu|gpu COMMAND...: becomes COMMAND, in the environment that flags/PLATFORM.env says,
# and finds the project's own `vllama2` first.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

flags=$here/flags/${1:-}.env
if (($# < 2)) || [[ ! -f $flags ]]; then
  echo "usage: with_flags.sh tpu|gpu COMMAND..." >&2
  exit 2
fi
shift
set -a # what the file sets is exported
# shellcheck source=/dev/null
source "$flags"
set +a
if [[ -d $here/../.venv/bin ]]; then
  PATH=$(cd "$here/../.venv/bin" && pwd):$PATH
fi
exec "$@"
