#!/usr/bin/env bash
# Formatting, lints, documentation, licences, tidiness.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

tests/setup/components.sh
cargo fmt --all --check
cargo clippy --workspace --all-targets --locked --quiet -- -D warnings
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet
tests/tidy.sh

"$ROOT/tests/setup/rust-tools.sh"
# The advisory database comes from a git server: checked only where one is at hand.
checks=(licenses bans sources)
if [ -d "${CARGO_HOME:-$HOME/.cargo}/advisory-dbs" ]; then
  checks+=(advisories)
else
  echo "SKIP: cargo-deny advisories: no advisory database on this machine (1 check skipped)"
fi
"$CACHE/bin/cargo-deny" --log-level error check "${checks[@]}"
