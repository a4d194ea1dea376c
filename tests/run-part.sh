#!/usr/bin/env bash
# `make test-all PART=…`: what takes too long for `make test`.
#   mutations      breaks the code on purpose, line by line; each time a named case must turn red
#   reproducible   builds kernel and initramfs a second time; the hashes must be equal
#   kvm            the CRI suite on a node with real KVM, vhost-vsock and cgroup v2, inside an emulated machine
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/setup/lib.sh"
cd "$ROOT"

part() {
  case $1 in
    mutations) make -s tools guest shim && cargo build --quiet --release -p podhull-cri-tests && tests/mutations/run.sh ;;
    reproducible) make -s guest && tests/reproducible.sh ;;
    kvm) make -s tools guest shim && cargo build --quiet --release -p podhull-cri-tests && tests/kvm/lane.sh ;;
    all) part mutations && part reproducible && part kvm ;;
    *) die "PART=$1: expected mutations, reproducible, kvm or all" ;;
  esac
}
part "$1"
