# Debian's kernel for build-kernel.sh, which sources this. A file of its own: the
# key that our own build is cached under includes the whole script.
# SPDX-License-Identifier: Apache-2.0
debian_modules="virtio_mmio virtio_net virtio_console vmw_vsock_virtio_transport virtiofs overlay"

# Debian's cloud kernel, and beside it the modules that a pod's guest needs, in
# the order in which they have to be loaded.
build_debian() {
  local real version store number=0 module
  real=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p')
  [ -n "$real" ] || die "linux-image-cloud-amd64 is unknown to apt: run apt-get update"
  version=${real#linux-image-}
  store="$CACHE/kernel/debian-$version"
  if [ ! -d "$store/boot" ]; then
    say "fetching Debian's kernel $version"
    mkdir -p "$CACHE/kernel"
    staging kernel
    ( cd "$staging" && apt-get -o APT::Sandbox::User=root download -qq "$real" >/dev/null && dpkg -x "$real"_*.deb . && rm -- *.deb ) \
      || die "apt-get download $real failed"
    depmod -b "$staging" "$version"
    mv "$staging" "$store"
  fi
  install -m 0644 "$store/boot/vmlinuz-$version" "$out"
  install -m 0644 "$store/boot/config-$version" "$out.config"
  rm -rf "$out.modules" && mkdir -p "$out.modules"
  for module in $(modprobe -d "$store" -S "$version" --show-depends -a $debian_modules \
      | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++'); do
    install -m 0644 "$module" "$out.modules/$(printf %02d $number)-$(basename "$module")"
    number=$((number + 1))
  done
}
