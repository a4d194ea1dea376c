#!/usr/bin/env bash
# `make demo`'s program: to its end, then interrupted, then killed while a pod starts. Nothing may be left of any.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

cargo build --quiet --release --locked -p podhull-demo
demo=${CARGO_TARGET_DIR:-$CACHE/target}/release/podhull-demo
parent=$(mktemp -d /var/tmp/podhull-demo-test.XXXXXX)
export PODHULL_TEST_DIR=$parent
running=
end() {
  [ -z "$running" ] || kill -KILL "$running" 2>/dev/null || true
  rmdir "$parent" 2>/dev/null || say "left: $(ls "$parent")"
}
trap end EXIT

# left NAME : what is left of the node NAME.
left() {
  ls -d "$parent/$1" 2>/dev/null || true
  find /sys/fs/cgroup -maxdepth 3 -type d -name "$1" 2>/dev/null || true
  # Every process of a node has its folder in its environment, or is a child of one that has.
  grep -lz "^PODHULL_NODE_FOLDER=$parent/$1\$" /proc/[0-9]*/environ 2>/dev/null || true
  grep -l "$parent/$1" /proc/[0-9]*/mountinfo 2>/dev/null || true
}

# ended SIGNAL CODE : sends SIGNAL while a pod starts; the program must end with CODE and leave nothing.
ended() {
  local line node janitor code=0
  exec 3< <(exec "$demo" 2>&1)
  running=$!
  while read -r -t 60 line <&3; do [[ $line != *"A pod"* ]] || break; done
  [[ $line == *"A pod"* ]] || die "the demo did not come as far as its pod: $line"
  node=$(basename "$(ls -d "$parent"/podhull-node-*)")
  janitor=${node##*-}
  [ -n "$(left "$node")" ] || die "nothing is seen of a node that runs: this test is blind"
  kill "-$1" "$running"
  wait "$running" || code=$?
  running=
  [ "$code" = "$2" ] || die "after SIG$1 the demo ended with $code, expected $2"
  timeout 30 tail --pid="$janitor" -f /dev/null || die "30 s after SIG$1 something of the demo still runs"
  exec 3<&-
  [ -z "$(left "$node")" ] || die "after SIG$1 there is left: $(left "$node")"
  say "SIG$1 while a pod starts: nothing is left"
}

"$demo"
[ -z "$(ls "$parent")" ] || die "the demo left $(ls "$parent")"
ended INT 130
ended KILL 137
