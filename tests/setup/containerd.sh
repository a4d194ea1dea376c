#!/usr/bin/env bash
# containerd.sh [VERSION...]: builds containerd, ctr and the runc shim from the Go module proxy, once per version; 2.4.2
# if none is named. Debian's containerd 1.6, the oldest release under test, comes with packages.sh.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

DEFAULT=2.4.2
PROGRAMS=(containerd ctr containerd-shim-runc-v2)

# 2.x has its programs where `go install` finds them.
install_2() {
  local version=$1 module=github.com/containerd/containerd/v2 wanted
  wanted=("${PROGRAMS[@]/#/$module/cmd/}")
  GOBIN=$staging go install -trimpath -modcacherw -ldflags "-s -w -X $module/version.Version=v$version" "${wanted[@]/%/@v$version}"
}

# 1.7 excludes versions of others in its go.mod, for which `go install` refuses it: a module of our own requires it.
install_1() {
  local version=$1 module=github.com/containerd/containerd program
  mkdir "$staging/module"
  (
    cd "$staging/module"
    printf 'module tools\n\ngo 1.24\n' >go.mod
    {
      printf '//go:build tools\n\npackage tools\n\nimport (\n'
      printf '\t_ "%s"\n' "$module/cmd/containerd/builtins" "${PROGRAMS[@]/#/$module/cmd/}"
      printf ')\n'
    } >tools.go
    go mod edit -require "$module@v$version"
    go mod tidy -modcacherw
    for program in "${PROGRAMS[@]}"; do
      go build -mod=mod -modcacherw -trimpath -ldflags "-s -w -X $module/version.Version=v$version" -o "$staging/$program" "$module/cmd/$program"
    done
  ) || return
  rm -rf "$staging/module"
}

build() {
  local version=$1 program
  local bin=$CACHE/bin/containerd-$version missing=
  for program in "${PROGRAMS[@]}"; do [ -x "$bin/$program" ] || missing=yes; done
  [ -n "$missing" ] || return 0
  command -v go >/dev/null || die "building containerd $version needs Go (https://go.dev/dl)"
  say "building containerd $version, ctr and its runc shim from the Go module proxy, as Debian has only 1.6 (about 2 minutes)"
  staging "containerd-$version"
  # Only whole programs reach $bin: a run that was interrupted leaves nothing half-made there. The modules can be
  # removed as other files can.
  "install_${version%%.*}" "$version" || die "containerd $version cannot be built"
  mkdir -p "$bin"
  mv "$staging"/* "$bin/"
}

for version in "${@:-$DEFAULT}"; do locked "containerd-$version" build "$version"; done
