#!/usr/bin/env bash
# Builds the suite's streaming client (tests/streams) with Kubernetes' own library, and the server that forwarded
# ports lead to (tests/streams/peer), once per version of them.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

SOURCE=$ROOT/tests/streams
BIN=$CACHE/bin/streams
KEY=$(key "$SOURCE"/main.go "$SOURCE"/go.mod "$SOURCE"/go.sum "$SOURCE"/peer/main.go)

build() {
  [ -x "$BIN/streams" ] && [ -x "$BIN/peer" ] && [ "$(cat "$BIN/key" 2>/dev/null)" = "$KEY" ] && return
  command -v go >/dev/null || die "building the streaming client needs Go (https://go.dev/dl)"
  say "building the streaming client with Kubernetes' client-go (about half a minute)"
  mkdir -p "$BIN"
  (cd "$SOURCE" && go build -trimpath -ldflags "-s -w" -o "$BIN/streams.new" .) || die "go build in $SOURCE failed"
  # It runs in containers of the test image, where there is no C library.
  (cd "$SOURCE" && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$BIN/peer.new" ./peer) ||
    die "go build in $SOURCE/peer failed"
  mv "$BIN/streams.new" "$BIN/streams"
  mv "$BIN/peer.new" "$BIN/peer"
  echo "$KEY" >"$BIN/key"
}
locked streams build
