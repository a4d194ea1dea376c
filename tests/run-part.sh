#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `make test-all PART=…`: what takes too long for `make test`.
#   cri            the whole CRI suite on containerd 1.6 and 2.4
#   cri-others     the same on 1.7 and 2.1
#   mutations      breaks the code on purpose, line by line; each time a named case must turn red
#   reproducible   builds kernel and initramfs a second time; the hashes must be equal
#   debian-kernel  core cases of the CRI suite in guests with Debian's kernel instead of our own
#   heavy          cases of the CRI suite that move or do more than usual: 1 GiB, 1,000 execs, a guest frozen for 30 s
#   kvm-smoke      a few cases of the next part: a stage of `make test`
#   kvm            the CRI suite on a node with real KVM, vhost-vsock and cgroup v2, inside an emulated machine
#   miri           what holds bytes without a socket, under Miri: codec, buffers, a session's state and streams; needs
#                  its nightly
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

# The guest has a folder of its own: target/guest stays what it is.
debian_kernel() {
  local guest=target/guest-debian
  make -s guest GUEST=$guest GUEST_KERNEL=debian
  PODHULL_KERNEL=$ROOT/$guest/vmlinux PODHULL_INITRAMFS=$ROOT/$guest/initramfs.cpio \
    cargo run --quiet --release --locked -p podhull-cri-tests -- --containerd 2.4 --handler podhull \
    lifecycle_stop_and_remove_end lifecycle_exit_codes lifecycle_stop_signal network_host_and_pod_reach \
    exec_exit_codes exec_standard_input exec_timeout exec_terminal attach_reaches fault_killed_vmm
}

# kvm [--smoke]: what cannot be fetched fails the part; the smoke says so and ends with 75, which `make test` counts
# as skipped.
kvm() {
  local tests status=0
  tests/kvm/fetch.sh >/dev/null || status=$?
  if [ "$status" = 75 ] && [ "${1:-}" = --smoke ]; then
    echo "SKIP: the node with KVM: the mirror does not give its packages, see above"
    return 75
  fi
  [ "$status" = 0 ] || return "$status"
  make -s tools streams guest shim
  cargo build --quiet --release --locked -p podhull-cri-tests
  tests=$(cargo test --quiet --locked --no-run --message-format=json -p podhull-transport -p podhull-agent-client \
    --test vsock | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')
  VSOCK_TESTS=$tests tests/kvm/lane.sh "$@"
}

# A proptest has few cases here: each takes a second or more. Without the nightly it says so and ends with 75.
miri() {
  if ! cargo +nightly miri --version >/dev/null 2>&1; then
    echo "SKIP: Miri is not here: rustup component add miri rust-src --toolchain nightly"
    return 75
  fi
  PROPTEST_CASES=8 MIRIFLAGS=-Zmiri-disable-isolation \
    cargo +nightly miri test --quiet --locked -p podhull-transport --lib -- \
    session::frame_tests session::buffer session::state_tests session::stream_tests session::peer_tests
}

# Each in a shell of its own, which ends at what fails first.
all() {
  local each status skipped=0
  for each in cri cri-others mutations reproducible debian-kernel heavy kvm miri; do
    status=0
    tests/run-part.sh "$each" || status=$?
    case $status in
      0) ;;
      75) skipped=$((skipped + 1)) ;;
      *) return "$status" ;;
    esac
  done
  say "every part has run, but $skipped skipped"
}

part() {
  case $1 in
    cri) make -s test-cri ;;
    cri-others) make -s test-cri CONTAINERD=1.7,2.1 ;;
    mutations) make -s tools streams guest shim && cargo build --quiet --release --locked -p podhull-cri-tests && tests/mutations/run.sh ;;
    reproducible) make -s guest && tests/reproducible.sh ;;
    debian-kernel) make -s tools shim && debian_kernel ;;
    heavy)
      make -s tools streams guest shim && cargo build --quiet --release --locked -p podhull-cri-tests
      PODHULL_HEAVY=1 "${CARGO_TARGET_DIR:-$CACHE/target}/release/podhull-cri-tests" --containerd 2.4 \
        --handler podhull-sandbox exec_much_both_ways load_of_hundreds load_on_a_frozen ;;
    kvm) kvm ;;
    kvm-smoke) kvm --smoke ;;
    miri) miri ;;
    all) all ;;
    *) die "PART=$1: expected cri, cri-others, mutations, reproducible, debian-kernel, heavy, kvm, kvm-smoke, miri or all" ;;
  esac
}
part "$1"
