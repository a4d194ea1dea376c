#!/usr/bin/env bash
# Packs the agent into an initramfs. The same agent gives the same bytes.
# Usage: build-initramfs.sh AGENT OUTPUT [MODULES]     (a folder of modules to be loaded first)
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../../tests/setup/lib.sh"

agent=${1:?usage: build-initramfs.sh AGENT OUTPUT}
out=${2:?usage: build-initramfs.sh AGENT OUTPUT}
modules=${3:-}
[ -x "$agent" ] || die "agent $agent is missing: build podhull-agent first"
if readelf -l "$agent" | grep -q INTERP; then
  die "agent $agent needs a dynamic linker, and the guest has none"
fi

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
install -m 0755 "$agent" "$tree/init"
mkdir -m 0755 "$tree"/{dev,proc,sys,run,newroot}
# The guest's console may appear only after PID 1 has started. Without standard
# streams Rust's runtime opens /dev/null before main, and aborts if it cannot.
mknod -m 0666 "$tree/dev/null" c 1 3
mknod -m 0600 "$tree/dev/console" c 5 1
if [ -n "$modules" ] && [ -d "$modules" ]; then
  mkdir -m 0755 "$tree/modules"
  install -m 0644 -t "$tree/modules" "$modules"/*
fi
find "$tree" -exec touch -h -d @0 {} +
mkdir -p "$(dirname "$out")"
# Uncompressed: unpacking costs more than reading.
( cd "$tree" && find . -mindepth 1 -printf '%P\n' | LC_ALL=C sort \
    | cpio --quiet --create --format=newc --owner=0:0 --reproducible ) >"$out.new"
mv "$out.new" "$out"
