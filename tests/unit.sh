#!/usr/bin/env bash
# Unit and crate tests; those that need the guest's kernel find it in PODHULL_KERNEL.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"
export PODHULL_TEST_KERNEL=${PODHULL_KERNEL:-$ROOT/target/guest/vmlinux}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# The CRI suite has a harness of its own and is run by itself.
cargo test --locked --workspace --exclude podhull-cri-tests -- --nocapture 2>&1 | tee "$log" \
  | grep -E '^(test |running|test result|SKIP|error|warning: unused|.*panicked|failures:)' || true
status=${PIPESTATUS[0]}
[ "$status" = 0 ] || { tail -150 "$log"; exit "$status"; }
echo "skipped for want of something on this machine: $(grep -c '^SKIP' "$log" || true)"
