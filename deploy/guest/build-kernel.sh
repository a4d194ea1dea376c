#!/usr/bin/env bash
# Builds the guest kernel from Debian's linux-source with kernel.config.
# Usage: build-kernel.sh OUTPUT      (writes OUTPUT, an uncompressed PVH ELF)
# GUEST_KERNEL=debian takes Debian's cloud kernel instead (slower to boot, no build).
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/../../tests/setup/lib.sh"

out=${1:?usage: build-kernel.sh OUTPUT}
config="$ROOT/deploy/guest/kernel.config"
source_version=6.12
tarball=/usr/src/linux-source-$source_version.tar.xz

build_own() {
  [ -f "$tarball" ] || die "kernel source $tarball is missing: install linux-source-$source_version"
  local version hash store
  version=$(dpkg-query -W -f '${Version}' linux-source-$source_version)
  hash=$(key "$config" "$version" "$(gcc -dumpfullversion)" "$(ld -v)" "$ROOT/deploy/guest/build-kernel.sh")
  store="$CACHE/kernel/$hash"
  if [ ! -f "$store/vmlinux" ]; then
    say "building the guest kernel $version (about 6 minutes on 2 cores)"
    local log="$CACHE/kernel/log"
    mkdir -p "$CACHE/kernel"
    staging kernel
    mkdir "$staging"/{src,obj,done}
    tar -xf "$tarball" -C "$staging/src" --strip-components=1
    # What the kernel embeds about its build must not differ between two builds.
    local repro=(KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=podhull KBUILD_BUILD_HOST=podhull KBUILD_BUILD_VERSION=1)
    make -C "$staging/src" O="$staging/obj" "${repro[@]}" KCONFIG_ALLCONFIG="$config" allnoconfig >"$log" 2>&1 \
      || { tail -20 "$log" >&2; die "kernel configuration failed; whole log: $log"; }
    check_config "$staging/obj/.config"
    make -C "$staging/src" O="$staging/obj" "${repro[@]}" KCFLAGS="-ffile-prefix-map=$staging=." -j"$(nproc)" vmlinux >>"$log" 2>&1 \
      || { tail -20 "$log" >&2; die "kernel build failed; whole log: $log"; }
    strip -o "$staging/done/vmlinux" "$staging/obj/vmlinux"
    cp "$staging/obj/.config" "$staging/done/config"
    # Whole, or not at all.
    rm -rf "$store" && mv "$staging/done" "$store"
  fi
  install -m 0644 "$store/vmlinux" "$out"
  install -m 0644 "$store/config" "$out.config"
}

# Kconfig drops a symbol silently when a dependency is missing: say so.
check_config() {
  local lost=0 line
  while read -r line; do
    case $line in
      CONFIG_*=n) grep -q "^${line%=n}=" "$1" && { echo "still set: $line" >&2; lost=1; } ;;
      CONFIG_*=*) grep -qxF "$line" "$1" || { echo "not taken: $line" >&2; lost=1; } ;;
    esac
  done <"$config"
  [ "$lost" = 0 ] || die "kernel.config asks for what this kernel does not offer"
}

mkdir -p "$(dirname "$out")"
case ${GUEST_KERNEL:-own} in
  own) rm -rf "$out.modules" && locked kernel build_own ;;
  debian) . "$ROOT/deploy/guest/debian-kernel.sh" && locked kernel build_debian ;;
  *) die "GUEST_KERNEL=${GUEST_KERNEL}: expected own or debian" ;;
esac
