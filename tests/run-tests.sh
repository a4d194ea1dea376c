#!/usr/bin/env bash
# `make test`: every stage, what takes long side by side, and a table of times.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

table=()
started=$SECONDS
show() {
  printf '\n%-34s %8s  %s\n' stage seconds result
  for row in "${table[@]}"; do printf '%-34s %8s  %s\n' $row; done
  printf '%-34s %8s  %s\n' total $((SECONDS - started)) "$(skipped) skipped"
}
# How many stages could not run here.
skipped() { printf '%s\n' "${table[@]}" | grep -c ' skipped' || true; }
# What an exit code says: 75 is for what this machine cannot get, which has been told.
result_of() {
  case $1 in
    0) echo ok ;;
    75) echo skipped ;;
    *) echo FAILED ;;
  esac
}
# What still runs beside a stage that failed or was interrupted ends with the run: each job leads a process group.
finish() {
  local job
  for job in "${pids[@]}"; do kill -- "-$job" 2>/dev/null || true; done
  for job in "${pids[@]}"; do wait "$job" || true; done
  show
}

# stage NAME COMMAND...: runs it, notes its time, ends the run if it fails.
stage() {
  local name=$1 begin=$SECONDS code=0 result; shift
  say "$name"
  "$@" || code=$?
  result=$(result_of "$code")
  table+=("$name $((SECONDS - begin)) $result")
  [ "$result" != FAILED ] || exit 1
}
# background NAME COMMAND...: the same beside the stages that follow; joined by `join`.
declare -A pids=() begun=()
trap finish EXIT
background() {
  local name=$1; shift
  begun[$name]=$SECONDS
  setsid "$@" >"$CACHE/$name.log" 2>&1 & pids[$name]=$!
}
join() {
  local name=$1 code=0 result
  wait "${pids[$name]}" || code=$?
  result=$(result_of "$code")
  unset "pids[$name]"
  table+=("$name $((SECONDS - begun[$name])) $result(beside)")
  [ "$result" != FAILED ] || { tail -40 "$CACHE/$name.log" >&2; exit 1; }
}

# What `make guest` has made is made once: the next one only looks. It takes about a second.
guest_again() {
  timeout 5 make -s guest || { say "a second make guest fails, or takes longer than 5 s"; return 1; }
}

# Half an hour of builds later would be late to say so.
stage components tests/setup/components.sh
stage packages make -s packages
background kvm-packages tests/kvm/fetch.sh
background kernel make -s kernel
background tools make -s tools streams
background cargo-deny tests/setup/rust-tools.sh
stage build-shim make -s shim
stage build-guest make -s initramfs
join kernel
join tools
join cargo-deny
join kvm-packages
stage guest-again guest_again
stage demo tests/demo.sh
stage lint make -s lint
stage unit make -s test-unit
stage cri make -s test-core
stage kvm tests/run-part.sh kvm-smoke
