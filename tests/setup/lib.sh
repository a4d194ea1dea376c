# Shared by the set-up and build scripts; sourced, never run.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that is built once and reused lives here, outside the checkout.
CACHE=${PODHULL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/podhull}
mkdir -p "$CACHE/bin" "$CACHE/locks"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# What Go fetches and builds is kept there, too, unless the environment says otherwise.
export GOMODCACHE=${GOMODCACHE:-$CACHE/go/mod} GOCACHE=${GOCACHE:-$CACHE/go/build}

# key FILE-OR-WORD... : a short hash of the files' contents and the words.
key() {
  for part in "$@"; do
    if [ -f "$part" ]; then cat "$part"; else printf '%s\n' "$part"; fi
  done | sha256sum | cut -c1-16
}

# locked NAME COMMAND... : runs COMMAND while no other set-up holds NAME.
locked() {
  local name=$1; shift
  ( flock 9; "$@" ) 9>"$CACHE/locks/$name"
}

# staging NAME : makes the folder $staging for a build under the lock NAME. It goes with the shell that `locked` runs
# the build in, also when that is interrupted; what a killed one left goes now.
staging() {
  rm -rf "$CACHE/bin/.$1".*
  staging=$(mktemp -d "$CACHE/bin/.$1.XXXXXX")
  trap 'rm -rf "$staging"' EXIT
}
