#!/usr/bin/env bash
# Builds containerd 2.4, ctr and the runc shim from the Go module proxy, once per version.
# Debian's containerd 1.6, the other release under test, comes with packages.sh.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

VERSION=2.4.2
MODULE=github.com/containerd/containerd/v2
BIN=$CACHE/bin/containerd-$VERSION
PROGRAMS=(containerd ctr containerd-shim-runc-v2)

build() {
  local program wanted=()
  for program in "${PROGRAMS[@]}"; do
    [ -x "$BIN/$program" ] || wanted+=("$MODULE/cmd/$program@v$VERSION")
  done
  [ ${#wanted[@]} -eq 0 ] && return
  command -v go >/dev/null || die "building containerd $VERSION needs Go (https://go.dev/dl)"
  say "building containerd $VERSION, ctr and its runc shim with go install, as Debian has only 1.6 (about 2 minutes)"
  staging containerd
  # Only whole programs reach $BIN: a run that was interrupted leaves nothing half-made there. The modules can be
  # removed as other files can.
  GOBIN=$staging go install -trimpath -modcacherw -ldflags "-s -w -X $MODULE/version.Version=v$VERSION" "${wanted[@]}" \
    || die "go install ${wanted[*]} failed"
  mkdir -p "$BIN"
  mv "$staging"/* "$BIN/"
}
locked containerd build
