#!/usr/bin/env bash
# Breaks the code on purpose, one line at a time, and expects a named case of the CRI suite (list.txt) or a named
# test of a crate (units.txt) to turn red.
# Usage: run.sh [--units] [NAME...]      (names of the lists; all without one; --units: of units.txt only)
# Resumable: what was shown for this state of the code is not shown again.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../setup/lib.sh"
cd "$ROOT"

lists=$ROOT/tests/mutations
units_only=
[ "${1:-}" != --units ] || { units_only=yes; shift; }
tree=$CACHE/mutations/tree
done=$CACHE/mutations/$(git rev-parse --short HEAD)
suite=${CARGO_TARGET_DIR:-$CACHE/target}/release/podhull-cri-tests
# A target folder of its own: cargo tells a workspace by what is in it, not by where it is, so what is built of the
# broken tree would be taken for the checkout's.
target=$CACHE/mutations/target
# The shim as it is, for what is broken in the guest.
export PODHULL_SHIM=${PODHULL_SHIM:-${CARGO_TARGET_DIR:-$CACHE/target}/release/containerd-shim-podhull-v2}
export CARGO_TARGET_DIR=$target
mkdir -p "$CACHE/mutations"
[ -n "$units_only" ] || [ -x "$suite" ] || die "$suite is missing: run make test-cri first"

# A working tree of its own: the checkout is left alone.
rm -rf "$tree" && git worktree prune
git worktree add --quiet --detach "$tree" HEAD
trap 'git worktree remove --force "$tree"' EXIT

build() { # FILE: builds what FILE belongs to, and says where the suite finds it
  case $1 in
    pkg/guest-agent/*)
      ( cd "$tree" && deploy/guest/build-agent.sh 2>&1 ) >"$tree.log" \
        || { tail -30 "$tree.log" >&2; return 1; }
      deploy/guest/build-initramfs.sh \
        "$target/agent/x86_64-unknown-linux-gnu/release/podhull-agent" "$tree.initramfs"
      export PODHULL_INITRAMFS=$tree.initramfs ;;
    *)
      ( cd "$tree" && cargo build --locked -p containerd-shim-podhull-v2 2>&1 ) >"$tree.log" \
        || { tail -30 "$tree.log" >&2; return 1; }
      export PODHULL_SHIM=$target/debug/containerd-shim-podhull-v2 ;;
  esac
}

trim() { sed 's/^ *//; s/ *$//; s/\\|/|/g' <<<"$1"; }

# change NAME FILE FROM TO: breaks one line of the working tree.
change() {
  git -C "$tree" checkout --quiet .
  FROM=$3 TO=$4 perl -0pi -e 's/\Q$ENV{FROM}\E/$ENV{TO}/' "$tree/$2"
  changed=$(git -C "$tree" diff --numstat | cut -f1,2 | tr '\t' ' ')
  [ "$changed" = "1 1" ] || [ "$changed" = "0 1" ] || die "$1: expected one changed line, found: ${changed:-none}"
}

mutate() ( # NAME FILE FROM TO CONTAINERD HANDLER CASE
  change "$@"
  build "$2" || die "$1 does not build"
  if "$suite" --containerd "$5" --handler "$6" "$7" >"$tree.out" 2>&1; then
    tail -5 "$tree.out" >&2
    die "$1 survived: $7 stays green"
  fi
  grep -qE "^test $7.* FAILED" "$tree.out" || { tail -20 "$tree.out" >&2; die "$1: $7 did not run"; }
)

# The limit: what a mutation breaks may be that something ends.
mutate_unit() ( # NAME FILE FROM TO PACKAGE TARGET TEST
  change "$@"
  cd "$tree"
  cargo test --quiet --locked --package "$5" $6 --no-run >"$tree.log" 2>&1 \
    || { tail -30 "$tree.log" >&2; die "$1 does not build"; }
  if timeout 60 cargo test --locked --package "$5" $6 -- "$7" >"$tree.out" 2>&1; then
    die "$1 survived: $7 stays green"
  fi
  # A test may also take the whole process down with it, or never end.
  grep -qE "^running [1-9]" "$tree.out" || { tail -20 "$tree.out" >&2; die "$1: $7 did not run"; }
)

shown=0 survived=0 known=0
# run_list FILE HOW NAME...: a bar that belongs to the code is written \| in the list.
run_list() {
  local list=$1 how=$2; shift 2
  while IFS= read -r line; do
    IFS=$'\x01' read -r name file from to first second test < <(
      sed 's/\\|/\x02/g; s/|/\x01/g; s/\x02/\\|/g' <<<"$line")
    name=$(trim "$name")
    [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
    if grep -qxF "$name" "$done" 2>/dev/null; then known=$((known + 1)); continue; fi
    if "$how" "$name" "$(trim "$file")" "$(trim "$from")" "$(trim "$to")" "$(trim "$first")" \
        "$(trim "$second")" "$(trim "$test")"; then
      echo "red as expected: $name ($(trim "$test"))"
      echo "$name" >>"$done"; shown=$((shown + 1))
    else
      survived=$((survived + 1))
    fi
  done < <(grep -v '^#' "$list")
}
run_list "$lists/units.txt" mutate_unit "$@"
[ -n "$units_only" ] || run_list "$lists/list.txt" mutate "$@"
echo "mutations: $shown turned red now, $known before, $survived survived"
[ "$survived" = 0 ]
