#!/usr/bin/env bash
# `make test-all PART=kvm`: the CRI suite on a node with real KVM, vhost-vsock and cgroup v2, on a machine that has
# none of them: the node is a VM whose CPUs QEMU emulates, virtualization included (tests/README.md).
# Usage: lane.sh [FILTER...]         runs cases of the suite: those of $FILTER, a quick choice by default
#        lane.sh --smoke             runs the few that are a stage of `make test`
#        lane.sh -- COMMAND...       runs a command of this machine in the node
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../setup/lib.sh"

# What only this node has. Not vsock_: that is also what the daemon's cases are called.
ITS_OWN="cgroup_below vsock_connect vsock_guest vsock_context vsock_killed vsock_rebooting vsock_stopped vsock_end
  vsock_half vsock_writes vsock_id"
# A killed shim is among its own. A stop and a dead VMM find streams in use: load_stopped has more of them than such a
# node serves in time on a busy machine.
SMOKE="--handler podhull-sandbox lifecycle_stop_and_remove_end exec_exit attach_reaches forward_reaches forward_ends
  cgroup_limits_are dead_vmm_ends confinement_kernel_command_line $ITS_OWN"
# Not network_large: 32 MB take longer here (0.3 MB/s) than an exec may.
FILTER=${FILTER:-$ITS_OWN lifecycle_stop exec_commands exec_exit exec_by exec_end exec_idle exec_first exec_under exec_much
  attach_reaches attach_again attach_across network_addresses network_containers network_pods network_host confinement_
  forward_reaches forward_to forward_of_a_hundred forward_half_closed_goes forward_reset forward_ends stranger_
  cgroup_limits load_stopped load_that load_on_a_frozen fault_killed fault_frozen dead_vmm_ends hung_shim
  node_guest_that node_without_kvm}
# With two, VMs of the node crash or stall now and then (tests/README.md).
CPUS=1
MEMORY=4096
# The node says every 5 s that it lives.
SILENCE=${LANE_SILENCE:-60}
LIMIT=${LANE_LIMIT:-3000}

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$CACHE/target}
suite=$CARGO_TARGET_DIR/release/podhull-cri-tests
# Crates' tests over AF_VSOCK, which the node's kernel loops back: programs, one a line.
vsock_tests=${VSOCK_TESTS:-}
PODHULL_SHIM=${PODHULL_SHIM:-$CARGO_TARGET_DIR/release/containerd-shim-podhull-v2}
PODHULL_KERNEL=${PODHULL_KERNEL:-$ROOT/target/guest/vmlinux}
PODHULL_INITRAMFS=${PODHULL_INITRAMFS:-$ROOT/target/guest/initramfs.cpio}
out=$CACHE/kvm/run
node=

# What runs in the node. It fails rather than emulate, or use a daemon for what the kernel is to do.
write_job() {
  local name from
  {
    printf '#!/bin/bash\n'
    printf 'export PODHULL_CACHE=%q CARGO_TARGET_DIR=%q\n' "$CACHE" "$CARGO_TARGET_DIR"
    [ -z "${PODHULL_CONTAINERDS:-}" ] || printf 'export PODHULL_CONTAINERDS=%q\n' "$PODHULL_CONTAINERDS"
    # Copies: a build beside this run must not change what it tests.
    for name in SHIM KERNEL INITRAMFS; do
      from=PODHULL_$name
      cp "${!from}" "$out/bin/"
      printf 'export %s=%q\n' "$from" "$out/bin/$(basename "${!from}")"
    done
    printf 'export PODHULL_ALLOW_EMULATION=false PODHULL_BOOT_TIMEOUT=40 PODHULL_VSOCK_DAEMON=/bin/false\n'
    printf '/out/watch.sh & watch=$!\n'
    printf 'cd %q\n' "$ROOT"
    printf '%q ' "$@"
    printf '\ncode=$?\nkill $watch\nwait $watch\nexit $code\n'
  } >"$out/job"
  chmod 0755 "$out/job"
}

start_node() {
  local parts qemu kernel initramfs khz
  parts=$("$ROOT/tests/kvm/fetch.sh")
  { read -r qemu; read -r kernel; read -r initramfs; } <<<"$parts"
  truncate -s 8G "$out/disk"
  mkfs.ext4 -q -E lazy_itable_init=1,nodiscard -O ^has_journal "$out/disk"
  khz=$(awk '/^cpu MHz/ { printf "%d", $4 * 1000; exit }' /proc/cpuinfo)
  : >"$out/console"
  # Whatever becomes of this script, its node ends with it. It has no network.
  setpriv --pdeathsig KILL "$qemu/usr/bin/qemu-system-x86_64" -L "$qemu/usr/share/qemu" -L "$qemu/usr/share/seabios" \
    -nodefaults -no-user-config -display none -no-reboot -M q35,vmport=off,hpet=off,memory-backend=ram \
    -accel tcg,thread=multi -cpu max -smp $CPUS -m $MEMORY -object memory-backend-memfd,id=ram,size=${MEMORY}M,share=on \
    -kernel "$kernel/vmlinux" -initrd "$initramfs" -serial "file:$out/console" \
    -append "console=ttyS0 quiet panic=-1 reboot=t mitigations=off tsc_early_khz=$khz tsc=reliable clocksource=tsc no_timer_check rcupdate.rcu_expedited=1 cgroup_no_v1=all psi=1" \
    -virtfs local,path=/,readonly=on,security_model=none,multidevs=remap,mount_tag=root \
    -virtfs "local,path=$kernel/lib/modules,readonly=on,security_model=none,mount_tag=modules" \
    -virtfs "local,path=$out,security_model=none,mount_tag=out" \
    -drive "file=$out/disk,if=none,id=disk,format=raw,cache=unsafe" -device virtio-blk-pci,drive=disk \
    </dev/null >"$out/qemu.log" 2>&1 &
  node=$!
}

end_node() {
  rm -f "$out/disk"
  [ -n "$node" ] || return 0
  kill -KILL "$node" 2>/dev/null || true
  wait "$node" 2>/dev/null || true
  node=
}
trap end_node EXIT
trap 'exit 130' INT TERM HUP

# Shows what the job writes until the node is off; ends a node that has fallen silent.
follow() {
  local shown=0 size heard=0 heard_at=$SECONDS alive=yes
  while [ "$alive" = yes ]; do
    sleep 1
    kill -0 "$node" 2>/dev/null || alive=no
    size=$(stat -c %s "$out/job.log" 2>/dev/null || echo 0)
    if [ "$size" -gt "$shown" ]; then
      tail -c "+$((shown + 1))" "$out/job.log" | head -c "$((size - shown))"
      shown=$size
    fi
    size=$(stat -c %s "$out/console")
    if [ "$size" -gt "$heard" ]; then heard=$size heard_at=$SECONDS; fi
    if [ "$alive" = yes ] && [ $((SECONDS - heard_at)) -ge "$SILENCE" ]; then
      tail -n 20 "$out/console" >&2; die "the node has been silent for $SILENCE s; its console: $out/console"
    fi
    [ "$SECONDS" -lt "$LIMIT" ] || die "the node still runs after $LIMIT s"
  done
  size=0
  wait "$node" || size=$?
  node=
  [ "$size" = 0 ] || { cat "$out/qemu.log" >&2; die "the node's QEMU ended with $size"; }
  [ -f "$out/code" ] || { tail -n 20 "$out/console" "$out/qemu.log" >&2; die "the node ended before its job"; }
}

# with_vsock_tests FOLDER WHICH COMMAND... : runs in the node: the transports first; none of their tests may find
# nothing to test. WHICH is --include-ignored for those that take long, too.
with_vsock_tests() {
  local tests said
  for tests in "$1"/vsock-tests-*; do
    said=$(timeout 120 "$tests" --nocapture $2 2>&1) || { echo "$said"; return 1; }
    echo "$said"
    grep -q '^test result: ok\. [1-9]' <<<"$said" || return 1
    # With one CPU it follows the test's name on its line.
    ! grep -q SKIP <<<"$said" || return 1
  done
  shift 2
  "$@"
}

# check_its_own FILTER... : a case that is made for this node, and asked for, must have run. A skip is what it does
# on others.
check_its_own() {
  local own asked
  for own in $ITS_OWN; do
    ! grep "^SKIP [a-z0-9_]*$own" "$out/job.log" >&2 || die "this node has what they need, and they were skipped"
    for asked in "$@"; do
      [ "$asked" != "$own" ] || grep -q "^test [a-z0-9_]*$own" "$out/job.log" || die "no case has $own in its name"
    done
  done
}

count() { grep -c -- "$1" "$2" 2>/dev/null || true; }

# The pods must have been VMs of KVM that talked through the kernel's vsock, all of them.
check_vmms() {
  local vmms connected
  vmms=$(count '^pid=' "$out/vmms")
  connected=$(count connected "$out/connections")
  [ "${vmms:-0}" -gt 0 ] || die "no VMM was seen: $out"
  [ "$(count 'kvm=yes vhost-vsock=yes' "$out/vmms")" = "$vmms" ] \
    || { grep -v 'kvm=yes vhost-vsock=yes' "$out/vmms" >&2; die "VMMs without KVM or the kernel's vsock"; }
  [ ! -e "$out/daemons" ] || die "a vsock daemon ran"
  [ "${connected:-0}" -gt 0 ] || die "no AF_VSOCK connection to a guest was seen"
  say "$vmms VMMs seen, all with KVM and /dev/vhost-vsock; AF_VSOCK connections to $connected of them seen; no vsock daemon"
}

# run COMMAND... : sets `code` to what it ended with in the node.
run() {
  local begin=$SECONDS tests
  rm -rf "$out" && mkdir -p "$out/bin"
  install -m 0755 "$ROOT/tests/kvm/node.sh" "$ROOT/tests/kvm/watch.sh" "$out"
  [ ! -x "$suite" ] || cp "$suite" "$out/bin/"
  while read -r tests; do
    [ -z "$tests" ] || cp "$tests" "$out/bin/vsock-tests-$(basename "$tests")"
  done <<<"$vsock_tests"
  write_job "$@"
  start_node
  follow
  end_node
  code=$(cat "$out/code")
  say "the node ran for $((SECONDS - begin)) s; its files: $out"
}

[ "$(id -u)" = 0 ] || die "the node shows this machine's files to root: run it as root"
mkdir -p "$CACHE/kvm"
exec 8>"$CACHE/locks/kvm-lane"
if ! flock -n 8; then
  say "waiting for another run of this lane, which holds $CACHE/locks/kvm-lane"
  flock -w "$LIMIT" 8 || die "another run of this lane still holds $CACHE/locks/kvm-lane after $LIMIT s"
  SECONDS=0
fi
if [ "${1:-}" = -- ]; then
  shift
  [ $# -gt 0 ] || die "-- COMMAND..."
  run "$@"
  exit "$code"
else
  [ -x "$suite" ] || die "$suite is missing: make test-all PART=kvm builds it"
  which=--include-ignored
  [ "${1:-}" != --smoke ] || { set -- $SMOKE; which=; }
  [ $# -gt 0 ] || set -- $FILTER
  [ -n "$vsock_tests" ] || die "VSOCK_TESTS: the built tests over AF_VSOCK (make test-kvm sets it)"
  run bash -c "$(declare -f with_vsock_tests); with_vsock_tests \"\$@\"" - \
    "$out/bin" "$which" "$out/bin/podhull-cri-tests" --alone --containerd 2.4 "$@"
  check_vmms
  check_its_own "$@"
  exit "$code"
fi
