#!/usr/bin/env bash
# containerd.sh [VERSION...]: builds containerd, ctr and the runc shim from the Go module proxy, once per version; 2.4.2
# if none is named. Debian's containerd 1.6, the oldest release under test, comes with packages.sh.
# SPDX-License-Identifier: Apache-2.0
. "$(dirname "$0")/lib.sh"

DEFAULT=2.4.2
PROGRAMS=(containerd ctr containerd-shim-runc-v2)

module_of() { # VERSION
  case $1 in
    1.*) echo github.com/containerd/containerd ;;
    *) echo github.com/containerd/containerd/v2 ;;
  esac
}

# by_name VERSION: from where `go install` finds them.
by_name() {
  local version=$1 module wanted
  module=$(module_of "$version")
  wanted=("${PROGRAMS[@]/#/$module/cmd/}")
  GOBIN=$staging go install -trimpath -modcacherw -ldflags "-s -w -X $module/version.Version=v$version" "${wanted[@]/%/@v$version}"
}

# by_requirement VERSION: some releases exclude versions of others in their go.mod, for which `go install` refuses them. A
# module of our own requires them.
by_requirement() {
  local version=$1 module program
  module=$(module_of "$version")
  mkdir "$staging/module"
  (
    # Where a failure is looked at, `set -e` does not hold.
    cd "$staging/module" || exit 1
    printf 'module tools\n\ngo 1.24\n' >go.mod
    {
      printf '//go:build tools\n\npackage tools\n\nimport (\n'
      printf '\t_ "%s"\n' "$module/cmd/containerd/builtins" "${PROGRAMS[@]/#/$module/cmd/}"
      printf ')\n'
    } >tools.go
    go mod edit -require "$module@v$version" && go mod tidy -modcacherw || exit 1
    for program in "${PROGRAMS[@]}"; do
      go build -mod=mod -modcacherw -trimpath -ldflags "-s -w -X $module/version.Version=v$version" -o "$staging/$program" "$module/cmd/$program" || exit 1
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
  case $version in
    2.4.*) by_name "$version" ;;
    *) by_requirement "$version" ;;
  esac || die "containerd $version cannot be built"
  mkdir -p "$bin"
  mv "$staging"/* "$bin/"
}

for version in "${@:-$DEFAULT}"; do locked "containerd-$version" build "$version"; done
