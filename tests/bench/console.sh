#!/usr/bin/env bash
# What the guest's console costs: bare boots with and without one, in turn.
# Usage: console.sh [BOOTS] [KERNEL] [DEBIAN_KERNEL]
# Emulated guests. PID 1 does nothing but reset the machine, so the time is QEMU's
# from its start to its end, and what differs is the boot. Medians as a Markdown table.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../setup/lib.sh"

boots=${1:-15}
kernel=${2:-$ROOT/target/guest/vmlinux}
debian=${3:-$ROOT/target/guest-debian/vmlinux}
[ -f "$kernel" ] || die "$kernel is missing: make guest"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree"
printf '#include <sys/reboot.h>\nint main(void) { return reboot(RB_AUTOBOOT); }\n' \
  | gcc -O2 -static -x c -o "$work/tree/init" -
( cd "$work/tree" && echo init | cpio --quiet --create --format=newc >"$work/initramfs" )

khz=$(awk '/^cpu MHz/ { printf "%.0f", $4 * 1000; exit }' /proc/cpuinfo)
common="quiet reboot=t panic=-1 rcupdate.rcu_expedited=1 dummy.numdummies=0 mitigations=off no_timer_check tsc_early_khz=$khz tsc=reliable"

# boot NAME: milliseconds from the start of QEMU to its end.
boot() {
  local image=$kernel machine="isa-serial=off,acpi=off" words="$common nolapic_timer" device=() from to
  case $1 in
    none) ;;
    virtio) words+=" console=hvc0" device=(-device virtio-serial-device -device virtconsole,chardev=console) ;;
    serial) words+=" console=ttyS0" machine="isa-serial=on,acpi=off" device=(-serial chardev:console) ;;
    debugcon) device=(-device isa-debugcon,iobase=0xe9,chardev=console) ;;
    debian) image=$debian words="$common console=ttyS0" machine="isa-serial=on,acpi=on" device=(-serial chardev:console) ;;
  esac
  from=${EPOCHREALTIME/./}
  timeout 60 qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none \
    -M "microvm,accel=tcg,pit=on,pic=on,rtc=on,$machine,memory-backend=mem" -cpu max -smp 1 -m 256M \
    -object memory-backend-memfd,id=mem,size=256M,share=on -kernel "$image" -initrd "$work/initramfs" \
    -append "$words" -chardev "file,id=console,path=$work/console" "${device[@]}" </dev/null \
    || die "the guest ($1) did not end: $(tail -3 "$work/console")"
  to=${EPOCHREALTIME/./}
  # The kernel is quiet: whatever it says is an error.
  ! grep -aiE 'panic|oops' "$work/console" || die "the guest ($1) crashed"
  echo $(( (to - from) / 1000 ))
}

variants=(none virtio serial debugcon)
[ -f "$debian" ] && variants+=(debian)
for variant in "${variants[@]}"; do boot "$variant" >/dev/null; done
for ((n = 0; n < boots; n++)); do
  for ((i = 0; i < ${#variants[@]}; i++)); do
    # Another one begins each round: machines change their pace.
    variant=${variants[(n + i) % ${#variants[@]}]}
    boot "$variant" >>"$work/$variant"
  done
done
printf '| console | median (ms), n = %s | min | max |\n|---|--:|--:|--:|\n' "$boots"
for variant in "${variants[@]}"; do
  sort -n "$work/$variant" | awk -v name="$variant" '{ v[NR] = $1 } END {
    median = NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2
    printf "| %s | %.0f | %d | %d |\n", name, median, v[1], v[NR] }'
done
printf '\nLoad: %s\n' "$(cut -d' ' -f1-3 /proc/loadavg)"
