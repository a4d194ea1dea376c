#!/usr/bin/env bash
# Builds podhull-agent as one static program, or another package that becomes PID 1 of a guest.
# Usage: build-agent.sh [PACKAGE]
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../../tests/setup/lib.sh"

triple=x86_64-unknown-linux-gnu
libs=/usr/lib/x86_64-linux-gnu
for lib in libseccomp.a libelf.a libz.a; do
  [ -f "$libs/$lib" ] || die "$libs/$lib is missing: run tests/setup/packages.sh"
done

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}/agent
export LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$libs
# Paths of this machine must not end up in the program: two builds are compared.
# Of several that match the last one counts, and the target folder may be below
# the checkout.
paths="--remap-path-prefix=$ROOT=podhull"
paths+=" --remap-path-prefix=$(realpath -ms "$CARGO_TARGET_DIR")=target"
paths+=" --remap-path-prefix=$(realpath -ms "${CARGO_HOME:-$HOME/.cargo}")=cargo"
export RUSTFLAGS="-C target-feature=+crt-static $paths"
cd "$ROOT" && exec cargo build --release --locked --target "$triple" -p "${1:-podhull-agent}"
