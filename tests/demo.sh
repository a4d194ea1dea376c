#!/usr/bin/env bash
# `make demo`: to its end, again within seconds, then interrupted, as a terminal does it, and its program killed while a
# pod starts. Nothing may be left of any, and the host is as it was.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

# As the Makefile has it, also where this is run by itself.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}
cargo build --quiet --release --locked -p podhull-demo
demo=$CARGO_TARGET_DIR/release/podhull-demo
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

# host : what the demo could change outside of its namespaces and folders. What other runs make of their own is theirs.
host() {
  ip -o link | sed 's/^[0-9]*: //; s/ state .*//'
  nft -s list ruleset
  find /run /etc/cni /etc/podhull /etc/containerd /opt/cni -maxdepth 1 2>/dev/null \
    | grep -E 'podhull|containerd|cni|nri|netns' | sort || true
}

# ended SIGNAL TO CODE COMMAND... : sends SIGNAL while a pod starts, to the process (TO is empty) or to its group (-);
# COMMAND must end with CODE and leave nothing.
ended() {
  local signal=$1 to=$2 expected=$3 line node janitor code=0
  shift 3
  # What runs in the background ignores SIGINT, and its children do.
  exec 3< <(exec env --default-signal=INT setsid "$@" 2>&1)
  running=$!
  while read -r -t 60 line <&3; do [[ $line != *"A pod"* ]] || break; done
  [[ $line == *"A pod"* ]] || die "the demo did not come as far as its pod: $line"
  node=$(basename "$(ls -d "$parent"/podhull-node-*)")
  janitor=${node##*-}
  [ -n "$(left "$node")" ] || die "nothing is seen of a node that runs: this test is blind"
  kill "-$signal" -- "$to$running"
  wait "$running" || code=$?
  running=
  [ "$code" = "$expected" ] || die "after SIG$signal $1 ended with $code, expected $expected"
  timeout 30 tail --pid="$janitor" -f /dev/null || die "30 s after SIG$signal something of the demo still runs"
  exec 3<&-
  [ -z "$(left "$node")" ] || die "after SIG$signal there is left: $(left "$node")"
  say "SIG$signal to $1 while a pod starts: nothing is left"
}

before=$(host)
make -s demo
# All is built: it takes seconds.
timeout 60 make -s demo >/dev/null || die "a second make demo fails, or takes longer than 60 s"
[ -z "$(ls "$parent")" ] || die "the demo left $(ls "$parent")"
ended INT - 130 make -s demo
ended INT "" 130 "$demo"
ended KILL "" 137 "$demo"
after=$(host)
[ "$before" = "$after" ] || die "the host has changed: $(diff <(echo "$before") <(echo "$after"))"
