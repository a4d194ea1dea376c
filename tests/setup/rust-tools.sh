#!/usr/bin/env bash
# Installs the pinned cargo-deny that `make lint` runs. Once per version.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

VERSION=0.20.2
BIN=$CACHE/bin/cargo-deny-$VERSION

build() {
  if [ ! -x "$BIN/cargo-deny" ]; then
    say "building cargo-deny $VERSION with cargo install, which make lint runs (several minutes, once)"
    staging rust-tools
    CARGO_TARGET_DIR="$staging/target" \
      cargo install --quiet --locked --no-track --root "$staging" --version "$VERSION" cargo-deny \
      || die "cargo install cargo-deny $VERSION failed"
    mkdir -p "$BIN"
    mv "$staging/bin/cargo-deny" "$BIN/"
  fi
  ln -sfn "cargo-deny-$VERSION/cargo-deny" "$CACHE/bin/cargo-deny"
}
locked rust-tools build
