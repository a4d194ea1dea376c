#!/usr/bin/env bash
# Breaks the code on purpose, one line at a time, and expects a named case of the CRI suite to turn red.
# Usage: run.sh [NAME...]      (names of tests/mutations/list.txt; all without one)
# Resumable: what was shown for this state of the code is not shown again.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../setup/lib.sh"
cd "$ROOT"

list=$ROOT/tests/mutations/list.txt
tree=$CACHE/mutations/tree
done=$CACHE/mutations/$(git rev-parse --short HEAD)
suite=$CARGO_TARGET_DIR/release/podhull-cri-tests
export CARGO_TARGET_DIR
mkdir -p "$CACHE/mutations"
[ -x "$suite" ] || die "$suite is missing: run make test-cri first"

# A working tree of its own: the checkout is left alone.
rm -rf "$tree" && git worktree prune
git worktree add --quiet --detach "$tree" HEAD
trap 'git worktree remove --force "$tree"' EXIT

build() { # FILE: builds what FILE belongs to, and says where the suite finds it
  case $1 in
    pkg/guest-agent/*)
      # A target folder of its own: a broken agent must not be taken for the real one.
      ( cd "$tree" && CARGO_TARGET_DIR=$CACHE/mutations/target deploy/guest/build-agent.sh 2>&1 ) >"$tree.log" \
        || { tail -30 "$tree.log" >&2; return 1; }
      deploy/guest/build-initramfs.sh \
        "$CACHE/mutations/target/agent/x86_64-unknown-linux-gnu/release/podhull-agent" "$tree.initramfs"
      export PODHULL_INITRAMFS=$tree.initramfs ;;
    *)
      ( cd "$tree" && cargo build --locked -p containerd-shim-podhull-v2 2>&1 ) >"$tree.log" \
        || { tail -30 "$tree.log" >&2; return 1; }
      export PODHULL_SHIM=$CARGO_TARGET_DIR/debug/containerd-shim-podhull-v2 ;;
  esac
}

trim() { sed 's/^ *//; s/ *$//; s/\\|/|/g' <<<"$1"; }

mutate() ( # NAME FILE FROM TO CONTAINERD HANDLER CASE
  git -C "$tree" checkout --quiet .
  FROM=$3 TO=$4 perl -0pi -e 's/\Q$ENV{FROM}\E/$ENV{TO}/' "$tree/$2"
  changed=$(git -C "$tree" diff --numstat | cut -f1,2 | tr '\t' ' ')
  [ "$changed" = "1 1" ] || [ "$changed" = "0 1" ] || die "$1: expected one changed line, found: ${changed:-none}"
  build "$2" || die "$1 does not build"
  if "$suite" --containerd "$5" --handler "$6" "$7" >"$tree.out" 2>&1; then
    tail -5 "$tree.out" >&2
    die "$1 survived: $7 stays green"
  fi
  grep -qE "^test $7.* FAILED" "$tree.out" || { tail -20 "$tree.out" >&2; die "$1: $7 did not run"; }
)

shown=0 survived=0 known=0
# A bar that belongs to the code is written \| in the list.
while IFS= read -r line; do
  IFS=$'\x01' read -r name file from to containerd handler case < <(
    sed 's/\\|/\x02/g; s/|/\x01/g; s/\x02/\\|/g' <<<"$line")
  name=$(trim "$name")
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  if grep -qxF "$name" "$done" 2>/dev/null; then known=$((known + 1)); continue; fi
  if mutate "$name" "$(trim "$file")" "$(trim "$from")" "$(trim "$to")" "$(trim "$containerd")" \
      "$(trim "$handler")" "$(trim "$case")"; then
    echo "red as expected: $name ($(trim "$case"))"
    echo "$name" >>"$done"; shown=$((shown + 1))
  else
    survived=$((survived + 1))
  fi
done < <(grep -v '^#' "$list")
echo "mutations: $shown turned red now, $known before, $survived survived"
[ "$survived" = 0 ]
