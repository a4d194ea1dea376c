#!/usr/bin/env bash
# Installs the vhost-user vsock daemon, which stands in where the host has no /dev/vhost-vsock. Once per version.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

VERSION=0.3.0
BIN=$CACHE/bin/vhost-device-vsock-$VERSION

build() {
  [ -x "$BIN/vhost-device-vsock" ] && return
  say "building vhost-device-vsock $VERSION with cargo install, for hosts without /dev/vhost-vsock (about 2 minutes)"
  staging vsock-daemon
  # A target folder of its own: its dependencies are older than ours and shared with nothing.
  env -u CARGO_BUILD_TARGET CARGO_TARGET_DIR="$staging/target" \
    cargo install --quiet --locked --no-track --root "$staging" --version "$VERSION" vhost-device-vsock \
    || die "cargo install vhost-device-vsock $VERSION failed"
  mkdir -p "$BIN"
  mv "$staging/bin/vhost-device-vsock" "$BIN/"
}
locked vsock-daemon build
