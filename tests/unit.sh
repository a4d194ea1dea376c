#!/usr/bin/env bash
# Unit and crate tests.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
cargo test --locked --workspace -- --nocapture >"$log" 2>&1 || status=$?
grep -E '^(test |running|test result|SKIP|error|.*panicked|failures:)' "$log" || true
[ "$status" = 0 ] || { tail -150 "$log"; exit "$status"; }
echo "skipped for want of something on this machine: $(grep -c '^SKIP' "$log" || true)"
