#!/usr/bin/env bash
# Fetches what the node with KVM is made of, once per version, and prints three paths: the folder of its
# emulator, that of its kernel, and its initramfs.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../setup/lib.sh"

# Debian 12's own QEMU, 7.2, freezes such a node now and then when a VM of the node is made or ended; 10.0 does not.
QEMU=1:10.0.2+ds-2+deb13u1~bpo12+1
SEABIOS=1.16.3-2~bpo12+1
KERNEL=6.1.0-50-amd64
KERNEL_PACKAGE=6.1.176-1
# In the order in which they are loaded; what they depend on comes before them. All others are loaded on demand.
MODULES="virtio_pci 9pnet_virtio 9p overlay virtio_blk crc32c_generic ext4 tun kvm_amd vhost_vsock vsock_loopback"

STORE=$CACHE/kvm
qemu=$STORE/qemu-${QEMU#*:}
kernel=$STORE/linux-$KERNEL_PACKAGE

# What a mirror does not give is not podhull's fault: the status says so (EX_TEMPFAIL of sysexits.h).
unavailable() { printf 'error: %s\n' "$*" >&2; exit 75; }

# download FOLDER PACKAGE=VERSION... : unpacks packages there. They come from sources of our own beside
# the machine's: its lists, and what it would install, stay as they are.
download() {
  local folder=$1 apt=$STORE/apt mirror package options; shift
  . /etc/os-release
  [ "${VERSION_CODENAME:-}" = bookworm ] || die "the node with KVM is made from Debian 12's packages; this is ${PRETTY_NAME:-another system}"
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' | head -1)
  [ -n "$mirror" ] || die "apt knows no mirror for bookworm: run apt-get update"
  mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
  printf 'Types: deb\nURIs: %s\nSuites: bookworm bookworm-backports\nComponents: main\nSigned-By: %s\n' \
    "$mirror" /usr/share/keyrings/debian-archive-keyring.gpg >"$apt/private.sources"
  options=(-qq -o APT::Sandbox::User=root -o "Dir::Etc::SourceList=$apt/private.sources" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::State::Lists=$apt/lists" -o "Dir::Cache=$apt/cache")
  say "fetching $* ($(basename "$folder"))"
  apt-get "${options[@]}" update || unavailable "apt-get update from a private list failed"
  rm -rf "$folder.new" && mkdir -p "$folder.new"
  ( cd "$folder.new" && apt-get "${options[@]}" download "$@" ) \
    || unavailable "apt-get download $* failed: if the mirror has other versions now, change them in tests/kvm/fetch.sh"
  for package in "$folder.new"/*.deb; do dpkg -x "$package" "$folder.new"; rm "$package"; done
}

fetch_qemu() {
  [ -d "$qemu" ] && return
  download "$qemu" "qemu-system-x86=$QEMU" "qemu-system-data=$QEMU" "seabios=$SEABIOS"
  local missing
  missing=$(ldd "$qemu.new/usr/bin/qemu-system-x86_64" | grep 'not found' || true)
  [ -z "$missing" ] || die "QEMU $QEMU lacks libraries of this machine: $missing"
  mv "$qemu.new" "$qemu"
}

# word FILE OFFSET BYTES: a number of the boot header (Documentation/arch/x86/boot.rst).
word() { od -An -v -t "u$3" -j "$2" -N "$3" "$1" | tr -d ' '; }

# The ELF file inside a bzImage starts 3 s faster: nothing is unpacked by an emulated CPU.
unpack_kernel() {
  local image=$1 out=$2 start length
  start=$(( ($(word "$image" 0x1f1 1) + 1) * 512 + $(word "$image" 0x248 4) ))
  length=$(word "$image" 0x24c 4)
  # Its last four bytes are the size, which xz does not know.
  dd if="$image" iflag=skip_bytes,count_bytes skip="$start" count=$((length - 4)) bs=1M status=none | xz -dc >"$out" \
    || die "$image is not packed with xz"
}

fetch_kernel() {
  [ -d "$kernel" ] && return
  download "$kernel" "linux-image-$KERNEL=$KERNEL_PACKAGE"
  depmod -b "$kernel.new" "$KERNEL"
  unpack_kernel "$kernel.new/boot/vmlinuz-$KERNEL" "$kernel.new/vmlinux"
  rm -rf "$kernel.new/boot" "$kernel.new/usr"
  mv "$kernel.new" "$kernel"
}

# busybox, modules, and /init.
make_initramfs() {
  local work number=0 module
  initramfs=$STORE/initramfs-$(key "$ROOT/tests/kvm/init.sh" "$ROOT/tests/kvm/fetch.sh" /bin/busybox).img
  [ -f "$initramfs" ] && return
  work=$(mktemp -d "$STORE/.initramfs.XXXXXX")
  mkdir "$work/bin" "$work/modules"
  install -m 0755 /bin/busybox "$work/bin/busybox"
  install -m 0755 "$ROOT/tests/kvm/init.sh" "$work/init"
  for module in $(modprobe -d "$kernel" -S "$KERNEL" --show-depends -a $MODULES | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'); do
    install -m 0644 "$module" "$work/modules/$(printf %02d $number)-$(basename "$module")"
    number=$((number + 1))
  done
  rm -f "$STORE"/initramfs-*.img
  ( cd "$work" && find . | cpio --quiet -o -H newc | gzip -1 ) >"$initramfs.new"
  rm -rf "$work"
  mv "$initramfs.new" "$initramfs"
}

all() {
  mkdir -p "$STORE"
  fetch_qemu >&2
  fetch_kernel >&2
  make_initramfs >&2
  rm -rf "$STORE/apt"
  printf '%s\n' "$qemu" "$kernel" "$initramfs"
}
locked kvm-packages all
