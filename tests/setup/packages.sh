#!/usr/bin/env bash
# Installs the Debian packages that building and testing podhull need.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

# Rust and Go come from their projects, not from Debian, whose releases are too old.
for program in "cargo:Rust, https://rustup.rs" "go:Go, https://go.dev/dl"; do
  command -v "${program%%:*}" >/dev/null || die "${program%%:*} is not on PATH: install ${program#*:}"
done

# at_least NAME WANTED FOUND WHERE: fails if what is found is older. cargo and go would say so themselves, but only
# after minutes of other builds, and go perhaps by fetching another one.
at_least() {
  [[ $3 =~ ^[0-9]+(\.[0-9]+)* ]] || die "what release $1 is cannot be told from \"$3\" ($4)"
  printf '%s\n' "$2" "${BASH_REMATCH[0]}" | sort -C -V || die "$1 is $3, and podhull needs $2 or later ($4)"
}
wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$ROOT/Cargo.toml")
at_least Rust "$wanted" "$(rustc --version | cut -d ' ' -f 2)" https://rustup.rs
wanted=$(sed -n 's/^go \([0-9]*\.[0-9]*\).*/\1/p' "$ROOT/tests/streams/go.mod")
found=$(GOTOOLCHAIN=local go version | cut -d ' ' -f 3)
at_least Go "$wanted" "${found#go}" https://go.dev/dl

# package -> why it is needed; printed when it has to be installed.
PACKAGES=(
  "qemu-system-x86:the VMM that runs each pod"
  "containerd:containerd 1.6, one of the two releases under test"
  "runc:the runtime that podhull is compared with"
  "containernetworking-plugins:CNI plugins for the test node"
  "busybox-static:the only program in the test image"
  "iproute2:ip and tc, to look at the network from outside"
  "nftables:nft, to look at redirect rules from outside"
  "iptables:used by the CNI plugins for masquerading"
  "protobuf-compiler:needed by the build of the k8s-cri crate"
  "libseccomp-dev:linked by the shim's helpers and, statically, by the agent"
  "libcap-ng-dev:linked by virtiofsd's library"
  "pkg-config:finds the two libraries above"
  "linux-source-6.12:the guest kernel's source"
  "flex:kernel build"
  "bison:kernel build"
  "bc:kernel build"
  "libelf-dev:kernel build, and libelf.a for the agent's device filter"
  "zlib1g-dev:libz.a for the agent's device filter"
  "libssl-dev:kernel build"
  "cpio:kernel build"
  "kmod:finds the modules of Debian's kernel, if that is chosen"
  "xz-utils:unpacks the kernel's source"
  "gcc:C compiler"
  "make:kernel build"
)

# Docker's package takes the place of Debian's: installing the one would remove the other.
if dpkg-query -W -f '${db:Status-Status}\n' containerd.io 2>/dev/null | grep -qx installed; then
  die "containerd.io (Docker's package) is installed here, and the suite needs Debian's containerd: use another machine"
fi
missing=()
for entry in "${PACKAGES[@]}"; do
  name=${entry%%:*}
  if ! dpkg-query -W -f '${db:Status-Status}\n' "$name" 2>/dev/null | grep -qx installed; then
    missing+=("$name")
    say "package $name is missing: ${entry#*:}"
  fi
done
[ ${#missing[@]} -eq 0 ] && exit 0

[ "$(id -u)" = 0 ] || die "installing packages needs root: apt-get install ${missing[*]}"
say "installing ${#missing[@]} packages with apt-get"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# A package's service must not start here: this machine may run its own. Debian's
# maintainer scripts ask this program (invoke-rc.d(8)).
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 0755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get install -y -qq --no-install-recommends --no-remove "${missing[@]}" >"$CACHE/apt.log" 2>&1 \
  || { tail -20 "$CACHE/apt.log" >&2; die "apt-get install failed; whole log: $CACHE/apt.log"; }
